// simd.h for AVX-512: one register for sixteen floats.
#pragma once

#include "simd_256.h"

namespace specdec {

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
inline V scale_pow2(V x, V n) {
  __m512i e = _mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127)), 23);
  return {_mm512_mul_ps(x.v, _mm512_castsi512_ps(e))};
}

inline void transpose(const V* rows, float* out) {
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
}

inline __m256 upper_half(V x) { return _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(x.v), 1)); }
inline float reduce_add(V x) { return reduce_add(_mm256_add_ps(_mm512_castps512_ps256(x.v), upper_half(x))); }
inline float reduce_max(V x) { return reduce_max(_mm256_max_ps(_mm512_castps512_ps256(x.v), upper_half(x))); }

struct DoubleLanes {
  __m512d a = _mm512_setzero_pd(), b = _mm512_setzero_pd();
  void add(V x) {
    a = _mm512_add_pd(a, _mm512_cvtps_pd(_mm512_castps512_ps256(x.v)));
    b = _mm512_add_pd(b, _mm512_cvtps_pd(upper_half(x)));
  }
  void store(double* p) const {
    _mm512_storeu_pd(p, a);
    _mm512_storeu_pd(p + 8, b);
  }
};

inline V zero_below(V x, float least, V y) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, _mm512_set1_ps(least), _CMP_NLT_UQ), y.v)};
}

struct Words {
  __m512i a, b;
};
inline Words same_words(uint32_t x) { return {_mm512_set1_epi64(x), _mm512_set1_epi64(x)}; }
inline Words words_from(uint32_t first) {
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

inline int ids_at_least(const V& x, float floor, int32_t first, int32_t* ids) {
  const __mmask16 mask = _mm512_cmp_ps_mask(x.v, _mm512_set1_ps(floor), _CMP_GE_OQ);
  const __m512i numbers = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  _mm512_mask_compressstoreu_epi32(ids, mask, _mm512_add_epi32(_mm512_set1_epi32(first), numbers));
  return __builtin_popcount(mask);
}

}  // namespace specdec
