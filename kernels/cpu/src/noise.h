// Random numbers as functions of a key: Philox4x32-10 (Salmon et al., SC'11) with counter (call, position, start,
// stream), and Gumbel noise. See specdec.kernels.philox.
#pragma once

#include "simd.h"

namespace specdec {

struct NoiseKey {
  uint64_t seed;
  uint32_t position, start, stream;
};

// W: one word, or sixteen side by side.
template <class W>
inline void philox(W c[4], uint64_t seed) {
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const W a = multiply(c[0], 0xD2511F53u), b = multiply(c[2], 0xCD9E8D57u);
    c[0] = exclusive_or(high(b), c[1], k0);
    c[1] = b;
    c[2] = exclusive_or(high(a), c[3], k1);
    c[3] = a;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// 53 bits of call 0, in [0, 1).
inline double uniform(const NoiseKey& key) {
  uint64_t c[4] = {0, key.position, key.start, key.stream};
  philox(c, key.seed);
  return double((uint64_t(uint32_t(c[0])) << 21) ^ (uint32_t(c[1]) >> 11)) * 0x1p-53;
}

constexpr int64_t BLOCK = 4 * LANES;  // the tokens of sixteen calls: token t has word t % 4 of call t / 4

struct CallWords {
  Words c[4];
  uint32_t word(int64_t token) const {
    uint32_t all[LANES];
    store(all, c[token % 4]);
    return all[token / 4];
  }
  bool any_at_least(uint32_t least) const {
    return specdec::any_at_least(larger(larger(c[0], c[1]), larger(c[2], c[3])), least);
  }
};

inline CallWords sixteen_calls(int64_t first_token, const NoiseKey& key) {
  CallWords w{{words_from(uint32_t(first_token / 4)), same_words(key.position), same_words(key.start),
               same_words(key.stream)}};
  philox(w.c, key.seed);
  return w;
}

// -log((word + 1/2) / 2^32), to full relative precision at both ends.
inline V exponential(const uint32_t* words) {
  float u[LANES], below_one[LANES];
  for (int i = 0; i < LANES; ++i) {
    u[i] = float((double(words[i]) + 0.5) * 0x1p-32);
    below_one[i] = float((double(words[i]) + 0.5) * 0x1p-32 - 1.0);
  }
  V r, e = split(load(u), r);
  float exponent[LANES], rest[LANES];
  store(exponent, e);
  store(rest, r);
  for (int i = 0; i < LANES; ++i)
    if (words[i] >= 0xB504F334u) exponent[i] = 0.0f, rest[i] = below_one[i];  // u >= sqrt(1/2): log1p(u - 1)
  return sub(set1(0.0f), log_scaled(load(exponent), load(rest)));
}

// Gumbel noise of the tokens of sixteen calls, in their order.
inline void gumbel(const CallWords& calls, float* noise) {
  for (int w = 0; w < 4; ++w) {
    uint32_t words[LANES];
    float values[LANES];
    store(words, calls.c[w]);
    store(values, sub(set1(0.0f), log(exponential(words))));
    for (int i = 0; i < LANES; ++i) noise[4 * i + w] = values[i];
  }
}

}  // namespace specdec
