// y = x @ W.T with each weight read once for all rows.
//
// W [out, in] is packed as [ceil(out / 16)][in][16], zero-padded: 16 outputs lie side by side. Each output
// is one chain of fused multiply-adds over the inputs, first to last, whatever the number of rows, so a
// row's bits do not depend on its neighbours, the tile it falls into, or the number of threads.
#pragma once

#include <algorithm>

#include "simd.h"

namespace specdec {

#if defined(__AVX512F__)
constexpr int MAX_TILE_ROWS = 8;
constexpr int tile_blocks(int rows) { return rows <= 4 ? 4 : 2; }
#else
constexpr int MAX_TILE_ROWS = 6;
constexpr int tile_blocks(int rows) { return rows == 1 ? 4 : rows == 2 ? 3 : rows == 3 ? 2 : 1; }
#endif
constexpr int64_t GROUP_BLOCKS = 4;   // weights of so many blocks stay in L2 while the rows pass
constexpr int64_t K_CHUNK = 512;      // inputs per pass where there are many rows
constexpr int64_t MANY_ROWS = 24;

inline int64_t num_blocks(int64_t out) { return (out + LANES - 1) / LANES; }

// R rows x NB blocks over inputs [0, k). Accumulators start at zero, or where the pass before left them in y,
// whose rows have room for whole blocks. Everything is unrolled, or the accumulators would live on the stack.
template <int R, int NB, bool RESUME, class W>
inline void tile(const W* w, int64_t block_stride, const float* x, int64_t ldx, int64_t k, float* y, int64_t ldy) {
  V acc[R][NB];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int n = 0; n < NB; ++n) acc[r][n] = RESUME ? load(y + r * ldy + n * LANES) : set1(0.0f);
  for (int64_t i = 0; i < k; ++i) {
    V wv[NB];
#pragma GCC unroll 4
    for (int n = 0; n < NB; ++n) wv[n] = load(w + n * block_stride + i * LANES);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      V xv = set1(x[r * ldx + i]);
#pragma GCC unroll 4
      for (int n = 0; n < NB; ++n) acc[r][n] = fma(wv[n], xv, acc[r][n]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int n = 0; n < NB; ++n) store(y + r * ldy + n * LANES, acc[r][n]);
}

template <class W>
struct Gemm {
  const W* packed;
  int64_t in;
  const float* x;
  int64_t ldx;
  float* y;
  int64_t ldy;

  template <int R, int NB>
  void run_tile(int64_t row, int64_t block, int64_t k0, int64_t k1) const {
    const W* w = packed + (block * in + k0) * LANES;
    float* out = y + row * ldy + block * LANES;
    if (k0 > 0) {
      tile<R, NB, true>(w, in * LANES, x + row * ldx + k0, ldx, k1 - k0, out, ldy);
    } else {
      tile<R, NB, false>(w, in * LANES, x + row * ldx, ldx, k1, out, ldy);
    }
  }

  template <int R>
  void run_rows(int64_t row, int64_t b0, int64_t b1, int64_t k0, int64_t k1) const {
    constexpr int NB = tile_blocks(R);
    int64_t b = b0;
    for (; b + NB <= b1; b += NB) run_tile<R, NB>(row, b, k0, k1);
    for (; b < b1; ++b) run_tile<R, 1>(row, b, k0, k1);
  }

  void dispatch(int rows, int64_t row, int64_t b0, int64_t b1, int64_t k0, int64_t k1) const {
    switch (rows) {
      case 1: return run_rows<1>(row, b0, b1, k0, k1);
      case 2: return run_rows<2>(row, b0, b1, k0, k1);
      case 3: return run_rows<3>(row, b0, b1, k0, k1);
      case 4: return run_rows<4>(row, b0, b1, k0, k1);
      case 5: return run_rows<5>(row, b0, b1, k0, k1);
      case 6: return run_rows<6>(row, b0, b1, k0, k1);
#if defined(__AVX512F__)
      case 7: return run_rows<7>(row, b0, b1, k0, k1);
      case 8: return run_rows<8>(row, b0, b1, k0, k1);
#endif
    }
  }

  // Output blocks [b0, b1) of all rows.
  void run(int64_t rows, int64_t b0, int64_t b1) const {
    int64_t chunk = rows >= MANY_ROWS ? K_CHUNK : in;
    int64_t tiles = (rows + MAX_TILE_ROWS - 1) / MAX_TILE_ROWS;
    for (int64_t k0 = 0; k0 < in; k0 += chunk) {
      int64_t k1 = std::min(in, k0 + chunk);
      for (int64_t b = b0; b < b1; b += GROUP_BLOCKS) {
        int64_t row = 0;
        for (int64_t t = 0; t < tiles; ++t) {  // tiles of nearly equal height
          int64_t next = rows * (t + 1) / tiles;
          dispatch(int(next - row), row, b, std::min(b1, b + GROUP_BLOCKS), k0, k1);
          row = next;
        }
      }
    }
  }
};

enum DType : int32_t { FP32 = 0, BF16 = 1 };

struct Linear {
  const void* packed;
  const float* bias;  // or null
  int64_t out, in;
  int32_t dtype;
};

inline void gemm(const void* packed, int32_t dtype, int64_t in, const float* x, int64_t ldx, float* y, int64_t ldy,
                 int64_t rows, int64_t b0, int64_t b1) {
  if (rows == 0 || b0 >= b1) return;
  if (dtype == BF16) {
    Gemm<bf16>{static_cast<const bf16*>(packed), in, x, ldx, y, ldy}.run(rows, b0, b1);
  } else {
    Gemm<float>{static_cast<const float*>(packed), in, x, ldx, y, ldy}.run(rows, b0, b1);
  }
}

inline void add_bias(const float* bias, float* y, int64_t ldy, int64_t rows, int64_t n0, int64_t n1) {
  for (int64_t r = 0; r < rows; ++r)
    for_vectors(n1 - n0, [&](int64_t i, int n) {
      float* p = y + r * ldy + n0 + i;
      store_n(p, add(load_n(p, n), load_n(bias + n0 + i, n)), n);
    });
}

struct Range {
  int64_t begin, end;
};
inline Range share(int64_t total, int thread, int num_threads) {
  return {total * thread / num_threads, total * (thread + 1) / num_threads};
}

// One thread's share of a linear layer, split by output blocks.
inline void linear(const Linear& l, const float* x, int64_t ldx, float* y, int64_t ldy, int64_t rows, int thread,
                   int num_threads) {
  Range blocks = share(num_blocks(l.out), thread, num_threads);
  gemm(l.packed, l.dtype, l.in, x, ldx, y, ldy, rows, blocks.begin, blocks.end);
  if (l.bias) add_bias(l.bias, y, ldy, rows, blocks.begin * LANES, std::min(l.out, blocks.end * LANES));
}

template <class W>
void pack_rows(const W* source, int64_t rows, int64_t in, W* packed) {
  for (int64_t r = 0; r < rows; ++r) {
    W* p = packed + (r / LANES) * in * LANES + r % LANES;
    for (int64_t i = 0; i < in; ++i) p[i * LANES] = source[r * in + i];
  }
}

}  // namespace specdec
