// From hidden states or logits to tokens.
#pragma once

#include "ops.h"

namespace specdec {

constexpr int64_t HEAD_BLOCKS = 32;  // blocks of the vocabulary scored at a time

struct Best {
  float value = -INFINITY;
  int64_t id = -1;
  bool finite = true;

  // The lowest id among equals, as long as ids come in ascending order or from other shares of them.
  void offer(float v, int64_t i) {
    if (v > value || (v == value && i < id)) *this = {v, i, finite};
  }
};

// The best of scores[0 .. size), whose first id is `first`.
inline void scan(const float* scores, int64_t size, int64_t first, Best& best) {
  V top = set1(-INFINITY), unsound = set1(0.0f);
  for_vectors(size, [&](int64_t i, int n) {
    V s = load_n(scores + i, n, -INFINITY);
    top = max(s, top);
    V kept = n == LANES ? s : load_n(scores + i, n, 0.0f);
    unsound = add(unsound, sub(kept, kept));  // NaN where a score is not finite
  });
  if (reduce_add(unsound) != 0.0f) best.finite = false;
  float values[LANES];
  store(values, top);
  const float value = *std::max_element(values, values + LANES);
  if (value <= best.value) return;
  for (int64_t i = 0; i < size; ++i)
    if (scores[i] == value) return best.offer(value, first + i);
}

// One thread's share of the vocabulary: the best of each row so far.
inline void score_head(const Matrix& head, const Rows& rows, Best* best, const Team& team) {
  const Range mine = team.share(head.blocks());
  std::vector<float> logits(rows.count * HEAD_BLOCKS * LANES);
  for (int64_t b = mine.begin; b < mine.end; b += HEAD_BLOCKS) {
    const int64_t end = std::min(mine.end, b + HEAD_BLOCKS), size = std::min(head.out, end * LANES) - b * LANES;
    gemm(head, b, end, rows, logits.data(), HEAD_BLOCKS * LANES);
    for (int64_t r = 0; r < rows.count; ++r) scan(logits.data() + r * HEAD_BLOCKS * LANES, size, b * LANES, best[r]);
  }
}

// The best output's id per row, -1 where one is not finite.
inline void head_argmax(const Matrix& head, const Rows& rows, int64_t* ids, int threads) {
  std::vector<Best> best(threads * rows.count);
  parallel(threads, head.out * head.in,
           [&](const Team& team) { score_head(head, rows, best.data() + team.thread * rows.count, team); });
  for (int64_t r = 0; r < rows.count; ++r) {
    Best all = best[r];
    for (int t = 1; t < threads; ++t) {
      const Best& other = best[t * rows.count + r];
      all.finite &= other.finite;
      all.offer(other.value, other.id);
    }
    ids[r] = all.finite ? all.id : -1;
  }
}

// y = softmax(x * scale)
inline void softmax(const float* x, float scale, int64_t size, float* y) {
  V top = set1(-INFINITY);
  for_vectors(size, [&](int64_t i, int n) { top = max(load_n(x + i, n, -INFINITY), top); });
  float values[LANES];
  store(values, top);
  const V shift = set1(*std::max_element(values, values + LANES)), factor = set1(scale);
  V sum = set1(0.0f);
  for_vectors(size, [&](int64_t i, int n) {
    V p = exp(mul(sub(load_n(x + i, n, -INFINITY), shift), factor));
    sum = add(sum, p);
    store_n(y + i, p, n);
  });
  const V total = set1(reduce_add(sum));
  for_vectors(size, [&](int64_t i, int n) { store_n(y + i, div(load_n(y + i, n), total), n); });
}

struct Philox {
  uint32_t c[4][LANES];
};

// Philox4x32-10 (Salmon et al., SC'11): counters (first + lane, position, 0, 0), the target's own stream.
inline Philox philox(uint32_t first, uint32_t position, uint64_t seed) {
  Philox p;
  for (int i = 0; i < LANES; ++i) {
    p.c[0][i] = first + i;
    p.c[1][i] = position;
    p.c[2][i] = p.c[3][i] = 0;
  }
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < LANES; ++i) {
      const uint64_t a = uint64_t(p.c[0][i]) * 0xD2511F53u, b = uint64_t(p.c[2][i]) * 0xCD9E8D57u;
      p.c[0][i] = uint32_t(b >> 32) ^ p.c[1][i] ^ k0;
      p.c[1][i] = uint32_t(b);
      p.c[2][i] = uint32_t(a >> 32) ^ p.c[3][i] ^ k1;
      p.c[3][i] = uint32_t(a);
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return p;
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

// argmax of logits * scale + Gumbel noise keyed by (seed, position, token): a sample of softmax(logits * scale).
inline Best gumbel_argmax(const float* logits, float scale, int64_t size, uint64_t seed, uint32_t position) {
  Best best;
  for (int64_t first = 0; first < size; first += 4 * LANES) {
    const Philox p = philox(uint32_t(first / 4), position, seed);
    float noise[4][LANES], scores[4 * LANES];
    for (int w = 0; w < 4; ++w) store(noise[w], sub(set1(0.0f), log(exponential(p.c[w]))));
    const int64_t count = std::min<int64_t>(4 * LANES, size - first);
    for (int64_t i = 0; i < count; ++i) scores[i] = std::fma(logits[first + i], scale, noise[i % 4][i / 4]);
    scan(scores, count, first, best);
  }
  return best;
}

}  // namespace specdec
