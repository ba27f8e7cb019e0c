// simd.h for every other processor: loops, which the compiler may turn into what it has.
#pragma once

#include "scalar.h"

namespace specdec {

struct V {
  float v[LANES];
};
template <class F>
inline V each(F f) {
  V r;
  for (int i = 0; i < LANES; ++i) r.v[i] = f(i);
  return r;
}
inline V set1(float x) { return each([&](int) { return x; }); }
inline V load(const float* p) { return each([&](int i) { return p[i]; }); }
inline V load(const bf16* p) { return each([&](int i) { return to_float(p[i]); }); }
inline constexpr int64_t bf16_place(int64_t lane) { return lane; }
inline V load(const PackedBf16* p) { return load(reinterpret_cast<const bf16*>(p)); }
inline V load(const int8* p) { return each([&](int i) { return float(p[i]); }); }
inline void store(float* p, V x) { std::memcpy(p, x.v, sizeof x.v); }
inline V fma(V a, V b, V c) { return each([&](int i) { return std::fma(a.v[i], b.v[i], c.v[i]); }); }
inline V add(V a, V b) { return each([&](int i) { return a.v[i] + b.v[i]; }); }
inline V sub(V a, V b) { return each([&](int i) { return a.v[i] - b.v[i]; }); }
inline V mul(V a, V b) { return each([&](int i) { return a.v[i] * b.v[i]; }); }
inline V div(V a, V b) { return each([&](int i) { return a.v[i] / b.v[i]; }); }
// as the x86 instructions: the second operand where either is NaN
inline V max(V a, V b) { return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; }); }
inline V min(V a, V b) { return each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; }); }
inline V round(V a) { return each([&](int i) { return std::nearbyint(a.v[i]); }); }
inline V scale_pow2(V x, V n) {
  return each([&](int i) {
    uint32_t u = uint32_t(int(n.v[i]) + 127) << 23;
    float f;
    std::memcpy(&f, &u, 4);
    return x.v[i] * f;
  });
}

inline void transpose(const V* rows, float* out) {
  for (int r = 0; r < LANES; ++r)
    for (int c = 0; c < LANES; ++c) out[c * LANES + r] = rows[r].v[c];
}

inline float reduce_add(V x) {
  float a[LANES];
  store(a, x);
  for (int width = LANES / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) a[i] += a[i + width];
  return a[0];
}

inline float reduce_max(V x) {
  float a[LANES];
  store(a, x);
  for (int width = LANES / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) a[i] = a[i] > a[i + width] ? a[i] : a[i + width];
  return a[0];
}

struct DoubleLanes {
  double v[LANES] = {};
  void add(V x) {
    for (int i = 0; i < LANES; ++i) v[i] += double(x.v[i]);
  }
  void store(double* p) const { std::memcpy(p, v, sizeof v); }
};

inline V zero_below(V x, float least, V y) {
  return each([&](int i) { return x.v[i] < least ? 0.0f : y.v[i]; });
}

struct Words {
  uint64_t v[LANES];
};
template <class F>
inline Words each_word(F f) {
  Words r;
  for (int i = 0; i < LANES; ++i) r.v[i] = f(i);
  return r;
}
inline Words same_words(uint32_t x) { return each_word([&](int) { return x; }); }
inline Words words_from(uint32_t first) { return each_word([&](int i) { return first + i; }); }
inline Words multiply(const Words& x, uint32_t y) { return each_word([&](int i) { return multiply(x.v[i], y); }); }
inline Words high(const Words& x) { return each_word([&](int i) { return high(x.v[i]); }); }
inline Words exclusive_or(const Words& x, const Words& y, uint32_t z) {
  return each_word([&](int i) { return exclusive_or(x.v[i], y.v[i], z); });
}
inline Words larger(const Words& x, const Words& y) {
  return each_word([&](int i) { return uint32_t(x.v[i]) > uint32_t(y.v[i]) ? x.v[i] : y.v[i]; });
}
inline bool any_at_least(const Words& x, uint32_t least) {
  bool any = false;
  for (uint64_t word : x.v) any |= uint32_t(word) >= least;
  return any;
}

}  // namespace specdec
