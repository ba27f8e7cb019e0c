// Eight floats, as AVX-512 and AVX2 both have them.
#pragma once

#include <immintrin.h>

#include "scalar.h"

namespace specdec {

// All in one fixed order: lanes 4 apart, then 2, 1.
inline float reduce_add(__m256 x) {
  __m128 t = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  t = _mm_add_ps(t, _mm_movehl_ps(t, t));
  t = _mm_add_ss(t, _mm_shuffle_ps(t, t, 1));
  return _mm_cvtss_f32(t);
}

// Of values without NaN.
inline float reduce_max(__m256 x) {
  __m128 t = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  t = _mm_max_ps(t, _mm_movehl_ps(t, t));
  t = _mm_max_ss(t, _mm_shuffle_ps(t, t, 1));
  return _mm_cvtss_f32(t);
}

}  // namespace specdec
