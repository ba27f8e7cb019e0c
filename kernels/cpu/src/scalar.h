// One number at a time: formats and words of which simd.h has sixteen.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

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

// A 32-bit word in the low half of 64 bits, whose high half may hold anything.
inline uint64_t multiply(uint64_t x, uint32_t y) { return uint64_t(uint32_t(x)) * y; }  // the low half in place
inline uint64_t high(uint64_t x) { return x >> 32; }
inline uint64_t exclusive_or(uint64_t x, uint64_t y, uint32_t z) { return x ^ y ^ z; }

}  // namespace specdec
