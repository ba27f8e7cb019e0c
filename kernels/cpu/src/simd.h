// Sixteen floats at a time: AVX-512, AVX2 + FMA, or plain loops.
//
// All three do the same operations on the same lanes in the same order, so a result does not depend on
// which one was compiled (up to the compiler keeping fma fused, which every target here does).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace specdec {

constexpr int LANES = 16;

struct bf16 {
  uint16_t bits;
};
using int8 = int8_t;

// A bf16 of a packed weight, whose sixteen lie in the order that is the fastest to widen; see bf16_place.
struct PackedBf16 {
  uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(int8 x) { return float(x); }
inline float to_float(bf16 x) {
  uint32_t u = uint32_t(x.bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

inline void from_float(float x, float& out) { out = x; }
inline void from_float(float x, bf16& out) {  // round to nearest even; NaN stays NaN
  uint32_t u;
  std::memcpy(&u, &x, 4);
  if ((u & 0x7fffffff) > 0x7f800000) {
    out.bits = uint16_t((u >> 16) | 0x40);
  } else {
    out.bits = uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
  }
}

#if defined(__AVX512F__)

struct V {
  __m512 v;
};
inline V set1(float x) { return {_mm512_set1_ps(x)}; }
inline V load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline V load(const bf16* p) {
  __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
}
inline constexpr int64_t bf16_place(int64_t lane) { return lane; }
inline V load(const PackedBf16* p) { return load(reinterpret_cast<const bf16*>(p)); }
inline V load(const int8* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
inline void store(float* p, V x) { _mm512_storeu_ps(p, x.v); }
inline V fma(V a, V b, V c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline V add(V a, V b) { return {_mm512_add_ps(a.v, b.v)}; }
inline V sub(V a, V b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline V mul(V a, V b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline V div(V a, V b) { return {_mm512_div_ps(a.v, b.v)}; }
inline V max(V a, V b) { return {_mm512_max_ps(a.v, b.v)}; }
inline V min(V a, V b) { return {_mm512_min_ps(a.v, b.v)}; }
inline V round(V a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// x * 2^n for integral n in [-126, 127]
inline V scale_pow2(V x, V n) {
  __m512i e = _mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127)), 23);
  return {_mm512_mul_ps(x.v, _mm512_castsi512_ps(e))};
}

#elif defined(__AVX2__) && defined(__FMA__)

struct V {
  __m256 a, b;
};
inline V set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline V load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline V load(const bf16* p) {
  __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  __m256i lo = _mm256_cvtepu16_epi32(_mm256_castsi256_si128(h));
  __m256i hi = _mm256_cvtepu16_epi32(_mm256_extracti128_si256(h, 1));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(lo, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(hi, 16))};
}
// One instruction widens four at a time of each half, without crossing between the halves.
inline constexpr int64_t bf16_place(int64_t lane) { return lane / 4 == 1 ? lane + 4 : lane / 4 == 2 ? lane - 4 : lane; }
inline V load(const PackedBf16* p) {
  __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), zero = _mm256_setzero_si256();
  return {_mm256_castsi256_ps(_mm256_unpacklo_epi16(zero, h)), _mm256_castsi256_ps(_mm256_unpackhi_epi16(zero, h))};
}
inline V load(const int8* p) {
  __m128i q = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(q)), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(q, 8)))};
}
inline void store(float* p, V x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
inline V fma(V x, V y, V z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
inline V add(V x, V y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline V sub(V x, V y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline V mul(V x, V y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline V div(V x, V y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline V max(V x, V y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline V min(V x, V y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline V round(V x) {
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.a, mode), _mm256_round_ps(x.b, mode)};
}
inline V scale_pow2(V x, V n) {
  __m256i bias = _mm256_set1_epi32(127);
  __m256i ea = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.a), bias), 23);
  __m256i eb = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.b), bias), 23);
  return {_mm256_mul_ps(x.a, _mm256_castsi256_ps(ea)), _mm256_mul_ps(x.b, _mm256_castsi256_ps(eb))};
}

#else

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

#endif

// out[c * 16 + r] = rows[r][c], 16 x 16 values.
inline void transpose(const V* rows, float* out) {
#if defined(__AVX512F__)
  __m512 t[LANES], u[LANES];
#pragma GCC unroll 8
  for (int i = 0; i < LANES; i += 2) {
    t[i] = _mm512_unpacklo_ps(rows[i].v, rows[i + 1].v);
    t[i + 1] = _mm512_unpackhi_ps(rows[i].v, rows[i + 1].v);
  }
  auto lo = [](__m512 a, __m512 b) {
    return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  };
  auto hi = [](__m512 a, __m512 b) {
    return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  };
#pragma GCC unroll 4
  for (int i = 0; i < LANES; i += 4) {  // u[i + c]: columns c, c + 4, c + 8, c + 12 of rows i .. i + 3
    u[i] = lo(t[i], t[i + 2]);
    u[i + 1] = hi(t[i], t[i + 2]);
    u[i + 2] = lo(t[i + 1], t[i + 3]);
    u[i + 3] = hi(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    __m512 a = _mm512_shuffle_f32x4(u[c], u[4 + c], 0x88), b = _mm512_shuffle_f32x4(u[8 + c], u[12 + c], 0x88);
    __m512 d = _mm512_shuffle_f32x4(u[c], u[4 + c], 0xdd), e = _mm512_shuffle_f32x4(u[8 + c], u[12 + c], 0xdd);
    _mm512_storeu_ps(out + c * LANES, _mm512_shuffle_f32x4(a, b, 0x88));
    _mm512_storeu_ps(out + (4 + c) * LANES, _mm512_shuffle_f32x4(d, e, 0x88));
    _mm512_storeu_ps(out + (8 + c) * LANES, _mm512_shuffle_f32x4(a, b, 0xdd));
    _mm512_storeu_ps(out + (12 + c) * LANES, _mm512_shuffle_f32x4(d, e, 0xdd));
  }
#elif defined(__AVX2__) && defined(__FMA__)
  auto lo = [](__m256 a, __m256 b) {
    return _mm256_castpd_ps(_mm256_unpacklo_pd(_mm256_castps_pd(a), _mm256_castps_pd(b)));
  };
  auto hi = [](__m256 a, __m256 b) {
    return _mm256_castpd_ps(_mm256_unpackhi_pd(_mm256_castps_pd(a), _mm256_castps_pd(b)));
  };
  for (int half = 0; half < 2; ++half)  // columns
    for (int first = 0; first < LANES; first += 8) {
      __m256 t[8], u[8];
#pragma GCC unroll 4
      for (int i = 0; i < 8; i += 2) {
        __m256 x = half ? rows[first + i].b : rows[first + i].a, y = half ? rows[first + i + 1].b : rows[first + i + 1].a;
        t[i] = _mm256_unpacklo_ps(x, y);
        t[i + 1] = _mm256_unpackhi_ps(x, y);
      }
#pragma GCC unroll 2
      for (int i = 0; i < 8; i += 4) {
        u[i] = lo(t[i], t[i + 2]);
        u[i + 1] = hi(t[i], t[i + 2]);
        u[i + 2] = lo(t[i + 1], t[i + 3]);
        u[i + 3] = hi(t[i + 1], t[i + 3]);
      }
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) {
        float* column = out + (half * 8 + c) * LANES + first;
        _mm256_storeu_ps(column, _mm256_permute2f128_ps(u[c], u[4 + c], 0x20));
        _mm256_storeu_ps(column + 4 * LANES, _mm256_permute2f128_ps(u[c], u[4 + c], 0x31));
      }
    }
#else
  for (int r = 0; r < LANES; ++r)
    for (int c = 0; c < LANES; ++c) out[c * LANES + r] = rows[r].v[c];
#endif
}

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

// One fixed tree: lanes 8 apart, then 4, 2, 1.
inline float reduce_add(V x) {
#if defined(__AVX2__)
#if defined(__AVX512F__)
  __m256 a = _mm512_castps512_ps256(x.v);
  __m256 b = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(x.v), 1));
  __m256 s = _mm256_add_ps(a, b);
#else
  __m256 s = _mm256_add_ps(x.a, x.b);
#endif
  __m128 t = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  t = _mm_add_ps(t, _mm_movehl_ps(t, t));
  t = _mm_add_ss(t, _mm_shuffle_ps(t, t, 1));
  return _mm_cvtss_f32(t);
#else
  float a[LANES];
  store(a, x);
  for (int width = LANES / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) a[i] += a[i + width];
  return a[0];
#endif
}

// Of values without NaN.
inline float reduce_max(V x) {
#if defined(__AVX2__)
#if defined(__AVX512F__)
  __m256 s = _mm256_max_ps(_mm512_castps512_ps256(x.v),
                           _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(x.v), 1)));
#else
  __m256 s = _mm256_max_ps(x.a, x.b);
#endif
  __m128 t = _mm_max_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  t = _mm_max_ps(t, _mm_movehl_ps(t, t));
  t = _mm_max_ss(t, _mm_shuffle_ps(t, t, 1));
  return _mm_cvtss_f32(t);
#else
  float a[LANES];
  store(a, x);
  for (int width = LANES / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) a[i] = a[i] > a[i + width] ? a[i] : a[i + width];
  return a[0];
#endif
}

// Sixteen doubles: chains of additions side by side.
struct Doubles {
#if defined(__AVX512F__)
  __m512d a = _mm512_setzero_pd(), b = _mm512_setzero_pd();
  void add(V x) {
    a = _mm512_add_pd(a, _mm512_cvtps_pd(_mm512_castps512_ps256(x.v)));
    b = _mm512_add_pd(b, _mm512_cvtps_pd(_mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(x.v), 1))));
  }
  void store(double* p) const {
    _mm512_storeu_pd(p, a);
    _mm512_storeu_pd(p + 8, b);
  }
#elif defined(__AVX2__) && defined(__FMA__)
  __m256d a = _mm256_setzero_pd(), b = a, c = a, d = a;
  void add(V x) {
    a = _mm256_add_pd(a, _mm256_cvtps_pd(_mm256_castps256_ps128(x.a)));
    b = _mm256_add_pd(b, _mm256_cvtps_pd(_mm256_extractf128_ps(x.a, 1)));
    c = _mm256_add_pd(c, _mm256_cvtps_pd(_mm256_castps256_ps128(x.b)));
    d = _mm256_add_pd(d, _mm256_cvtps_pd(_mm256_extractf128_ps(x.b, 1)));
  }
  void store(double* p) const {
    _mm256_storeu_pd(p, a);
    _mm256_storeu_pd(p + 4, b);
    _mm256_storeu_pd(p + 8, c);
    _mm256_storeu_pd(p + 12, d);
  }
#else
  double v[LANES] = {};
  void add(V x) {
    for (int i = 0; i < LANES; ++i) v[i] += double(x.v[i]);
  }
  void store(double* p) const { std::memcpy(p, v, sizeof v); }
#endif
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
#if defined(__AVX512F__)
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, _mm512_set1_ps(-87.0f), _CMP_NLT_UQ), result.v)};
#elif defined(__AVX2__) && defined(__FMA__)
  __m256 low = _mm256_set1_ps(-87.0f);
  return {_mm256_and_ps(result.a, _mm256_cmp_ps(x.a, low, _CMP_NLT_UQ)),
          _mm256_and_ps(result.b, _mm256_cmp_ps(x.b, low, _CMP_NLT_UQ))};
#else
  return each([&](int i) { return x.v[i] < -87.0f ? 0.0f : result.v[i]; });
#endif
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

// Sixteen 32-bit words, each the low half of 64 bits whose high half may hold anything; and one of them.
inline uint64_t multiply(uint64_t x, uint32_t y) { return uint64_t(uint32_t(x)) * y; }  // the low half in place
inline uint64_t high(uint64_t x) { return x >> 32; }
inline uint64_t exclusive_or(uint64_t x, uint64_t y, uint32_t z) { return x ^ y ^ z; }

#if defined(__AVX512F__)

struct Words {
  __m512i a, b;
};
inline Words same_words(uint32_t x) { return {_mm512_set1_epi64(x), _mm512_set1_epi64(x)}; }
inline Words words_from(uint32_t first) {  // first, first + 1, ...
  const __m512i lanes = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7);
  return {_mm512_add_epi64(lanes, _mm512_set1_epi64(first)), _mm512_add_epi64(lanes, _mm512_set1_epi64(first + 8))};
}
inline Words multiply(Words x, uint32_t y) {
  const __m512i m = _mm512_set1_epi64(y);
  return {_mm512_mul_epu32(x.a, m), _mm512_mul_epu32(x.b, m)};
}
inline Words high(Words x) { return {_mm512_srli_epi64(x.a, 32), _mm512_srli_epi64(x.b, 32)}; }
inline Words exclusive_or(Words x, Words y, uint32_t z) {
  const __m512i k = _mm512_set1_epi64(z);
  return {_mm512_ternarylogic_epi64(x.a, y.a, k, 0x96), _mm512_ternarylogic_epi64(x.b, y.b, k, 0x96)};
}
inline Words larger(Words x, Words y) {  // of the high halves, too
  return {_mm512_max_epu32(x.a, y.a), _mm512_max_epu32(x.b, y.b)};
}
inline bool any_at_least(Words x, uint32_t least) {
  return _mm512_cmpge_epu32_mask(_mm512_max_epu32(x.a, x.b), _mm512_set1_epi32(int(least))) & 0x5555;
}

#elif defined(__AVX2__) && defined(__FMA__)

struct Words {
  __m256i v[4];
};
template <class F>
inline Words each_quarter(F f) {
  return {{f(0), f(1), f(2), f(3)}};
}
inline Words same_words(uint32_t x) {
  return each_quarter([&](int) { return _mm256_set1_epi64x(x); });
}
inline Words words_from(uint32_t first) {
  return each_quarter(
      [&](int i) { return _mm256_add_epi64(_mm256_setr_epi64x(0, 1, 2, 3), _mm256_set1_epi64x(first + 4 * i)); });
}
inline Words multiply(Words x, uint32_t y) {
  return each_quarter([&](int i) { return _mm256_mul_epu32(x.v[i], _mm256_set1_epi64x(y)); });
}
inline Words high(Words x) {
  return each_quarter([&](int i) { return _mm256_srli_epi64(x.v[i], 32); });
}
inline Words exclusive_or(Words x, Words y, uint32_t z) {
  return each_quarter(
      [&](int i) { return _mm256_xor_si256(_mm256_xor_si256(x.v[i], y.v[i]), _mm256_set1_epi64x(z)); });
}
inline Words larger(Words x, Words y) {
  return each_quarter([&](int i) { return _mm256_max_epu32(x.v[i], y.v[i]); });
}
inline bool any_at_least(Words x, uint32_t least) {
  __m256i top = _mm256_max_epu32(_mm256_max_epu32(x.v[0], x.v[1]), _mm256_max_epu32(x.v[2], x.v[3]));
  __m256i reached = _mm256_cmpeq_epi32(_mm256_max_epu32(top, _mm256_set1_epi32(int(least))), top);
  return _mm256_movemask_ps(_mm256_castsi256_ps(reached)) & 0x55;
}

#else

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

#endif

// Writes first + i for those of sixteen values that are at least `floor`, a number; returns how many.
inline int ids_at_least(const V& x, float floor, int32_t first, int32_t* ids) {
#if defined(__AVX512F__)
  const __mmask16 mask = _mm512_cmp_ps_mask(x.v, _mm512_set1_ps(floor), _CMP_GE_OQ);
  const __m512i numbers = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  _mm512_mask_compressstoreu_epi32(ids, mask, _mm512_add_epi32(_mm512_set1_epi32(first), numbers));
  return __builtin_popcount(mask);
#else
  float values[LANES];
  store(values, x);
  int count = 0;
  for (int i = 0; i < LANES; ++i) {
    ids[count] = first + i;
    count += values[i] >= floor;
  }
  return count;
#endif
}

inline void store(uint32_t* p, const Words& x) {
  uint64_t wide[LANES];
  static_assert(sizeof x == sizeof wide, "in order, whatever they are made of");
  std::memcpy(wide, &x, sizeof wide);
  for (int i = 0; i < LANES; ++i) p[i] = uint32_t(wide[i]);
}

}  // namespace specdec
