// Sixteen floats at a time: AVX-512, AVX2 + FMA, or plain loops.
//
// All three do the same operations on the same lanes in the same order, so a result does not depend on
// which one was compiled (up to the compiler keeping fma fused, which every target here does).
//
// One of the three headers below defines V (sixteen floats), DoubleLanes (sixteen doubles), Words (sixteen 32-bit words,
// each the low half of 64 bits whose high half may hold anything) and the same functions on them. Where the name does not
// say it all:
//   bf16_place(lane)           where a packed weight's lane lies among its sixteen
//   max(a, b), min(a, b)       b where either is NaN
//   scale_pow2(x, n)           x * 2^n for integral n in [-126, 127]
//   transpose(rows, out)       out[c * 16 + r] = rows[r][c], 16 x 16 values
//   reduce_add(x)              one fixed tree: lanes 8 apart, then 4, 2, 1
//   reduce_max(x)              of values without NaN
//   zero_below(x, least, y)    y, or 0 where x < least
//   words_from(first)          first, first + 1, ...
//   any_at_least(words, least) whether one of the sixteen is
#pragma once

#if defined(__AVX512F__)
#include "simd_avx512.h"
#elif defined(__AVX2__) && defined(__FMA__)
#include "simd_avx2.h"
#else
#include "simd_plain.h"
#endif

namespace specdec {

// n < 16 values, the rest `fill`.
template <class T>
inline V load_tail(const T* p, int n, float fill = 0.0f) {
  float buffer[LANES];
  for (int i = 0; i < LANES; ++i) buffer[i] = i < n ? to_float(p[i]) : fill;
  return load(buffer);
}
inline void store_tail(float* p, V x, int n) {
  float buffer[LANES];
  store(buffer, x);
  std::memcpy(p, buffer, sizeof(float) * n);
}

// Calls body(i, n) for i = 0, 16, ...: n is 16, or what is left at the end.
template <class F>
inline void for_vectors(int64_t size, F body) {
  int64_t i = 0;
  for (; i + LANES <= size; i += LANES) body(i, LANES);
  if (i < size) body(i, int(size - i));
}
template <class T>
inline V load_n(const T* p, int n, float fill = 0.0f) {
  return n == LANES ? load(p) : load_tail(p, n, fill);
}
inline void store_n(float* p, V x, int n) {
  if (n == LANES) {
    store(p, x);
  } else {
    store_tail(p, x, n);
  }
}

// Sixteen doubles: chains of additions side by side.
struct Doubles : DoubleLanes {
  double total() const {  // first to last
    double lanes[LANES], sum = 0.0;
    store(lanes);
    for (double lane : lanes) sum += lane;
    return sum;
  }
};

// e^x to about 1 ulp: 2^n * p(r), |r| <= ln 2 / 2. Below -87 it is 0 (no denormals), above 88.7 infinite.
inline V exp(V x) {
  V clamped = min(set1(89.0f), max(set1(-87.0f), x));  // in this order a NaN stays one
  V n = round(mul(clamped, set1(1.44269504088896341f)));
  V r = fma(n, set1(-0.693359375f), clamped);
  r = fma(n, set1(2.12194440e-4f), r);
  V p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = fma(mul(p, r), r, add(r, set1(1.0f)));
  // 2^127 * 2^1 at the upper end: scale in two steps
  V half = round(mul(n, set1(0.5f)));
  V result = scale_pow2(scale_pow2(p, half), sub(n, half));
  return zero_below(x, -87.0f, result);
}

// A positive normal x = m * 2^e with m in [sqrt(1/2), sqrt(2)): stores m - 1, returns e.
inline V split(V x, V& m_minus_1) {
  float values[LANES], exponents[LANES];
  store(values, x);
  for (int i = 0; i < LANES; ++i) {
    uint32_t u;
    std::memcpy(&u, &values[i], 4);
    uint32_t shifted = u - 0x3f3504f3;  // the bits of sqrt(1/2)
    exponents[i] = float(int32_t(shifted) >> 23);
    u = (shifted & 0x007fffff) + 0x3f3504f3;
    std::memcpy(&values[i], &u, 4);
  }
  m_minus_1 = sub(load(values), set1(1.0f));
  return load(exponents);
}

// log(2^e * (1 + r)), |r| < 0.42, to about 1 ulp (the polynomial of Cephes' logf).
inline V log_scaled(V e, V r) {
  V p = set1(7.0376836292e-2f);
  p = fma(p, r, set1(-1.1514610310e-1f));
  p = fma(p, r, set1(1.1676998740e-1f));
  p = fma(p, r, set1(-1.2420140846e-1f));
  p = fma(p, r, set1(1.4249322787e-1f));
  p = fma(p, r, set1(-1.6668057665e-1f));
  p = fma(p, r, set1(2.0000714765e-1f));
  p = fma(p, r, set1(-2.4999993993e-1f));
  p = fma(p, r, set1(3.3333331174e-1f));
  V square = mul(r, r);
  V tail = fma(mul(p, r), square, mul(e, set1(-2.12194440e-4f)));
  tail = fma(square, set1(-0.5f), tail);
  return fma(e, set1(0.693359375f), add(r, tail));
}

inline V log(V x) {
  V r, e = split(x, r);
  return log_scaled(e, r);
}

// Writes first + i for those of sixteen values that are at least `floor`, a number; returns how many.
#if !defined(__AVX512F__)  // which has an instruction for it
inline int ids_at_least(const V& x, float floor, int32_t first, int32_t* ids) {
  float values[LANES];
  store(values, x);
  int count = 0;
  for (int i = 0; i < LANES; ++i) {
    ids[count] = first + i;
    count += values[i] >= floor;
  }
  return count;
}
#endif

inline void store(uint32_t* p, const Words& x) {
  uint64_t wide[LANES];
  static_assert(sizeof x == sizeof wide, "in order, whatever they are made of");
  std::memcpy(wide, &x, sizeof wide);
  for (int i = 0; i < LANES; ++i) p[i] = uint32_t(wide[i]);
}

}  // namespace specdec
