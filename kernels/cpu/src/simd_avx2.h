// simd.h for AVX2 with FMA: two registers for sixteen floats.
#pragma once

#include "simd_256.h"

namespace specdec {

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

inline void transpose(const V* rows, float* out) {
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
}

inline float reduce_add(V x) { return reduce_add(_mm256_add_ps(x.a, x.b)); }
inline float reduce_max(V x) { return reduce_max(_mm256_max_ps(x.a, x.b)); }

struct DoubleLanes {
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
};

inline V zero_below(V x, float least, V y) {
  __m256 limit = _mm256_set1_ps(least);
  return {_mm256_and_ps(y.a, _mm256_cmp_ps(x.a, limit, _CMP_NLT_UQ)),
          _mm256_and_ps(y.b, _mm256_cmp_ps(x.b, limit, _CMP_NLT_UQ))};
}

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

}  // namespace specdec
