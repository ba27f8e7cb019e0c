// y = x @ W.T with each weight read once for all rows.
//
// W [out, in] is packed as [ceil(out / 16)][in][16], zero-padded: 16 outputs lie side by side. Each output
// is one chain of fused multiply-adds over the inputs, first to last, whatever the number of rows, so a
// row's bits do not depend on its neighbours, the tile it falls into, or the number of threads.
#pragma once

#include <algorithm>

#include "layout.h"
#include "team.h"

namespace specdec {

enum DType : int32_t { FP32 = 0, BF16 = 1, INT8 = 2 };

inline int64_t num_blocks(int64_t out) { return (out + LANES - 1) / LANES; }
inline int64_t padded(int64_t size) { return num_blocks(size) * LANES; }


// A packed weight.
struct Matrix {
  const void* data;
  const float* scales;  // int8 only: one per output, padded like them; the product is scale * (q . x)
  const float* bias;    // [out], or null
  int64_t out, in;
  int32_t dtype;

  int64_t blocks() const { return num_blocks(out); }

  // The e-th of a stack of equal matrices.
  Matrix expert(int64_t e) const {
    const int64_t size = padded(out) * in, bytes = dtype == FP32 ? 4 : dtype == BF16 ? 2 : 1;
    return {static_cast<const char*>(data) + e * size * bytes, scales ? scales + e * padded(out) : nullptr, nullptr, out, in,
            dtype};
  }
};
SHARED_STRUCT(Matrix, FIELD(data) FIELD(scales) FIELD(bias) FIELD(out) FIELD(in) FIELD(dtype))

// Rows of x: the index-th ones, or 0, 1, ... where there is no index.
struct Rows {
  const float* x;
  int64_t stride;
  const int64_t* index;
  int64_t count;

  const float* operator[](int64_t r) const { return x + (index ? index[r] : r) * stride; }
};

// GROUP_BLOCKS: with several tiles of rows, so many blocks stay in cache while the tiles pass.
#if defined(__AVX512F__)
constexpr int MAX_TILE_ROWS = 12;
constexpr int64_t GROUP_BLOCKS = 2;
constexpr int tile_blocks(int rows) { return rows <= 4 ? 4 : 2; }
#else
constexpr int MAX_TILE_ROWS = 6;
constexpr int64_t GROUP_BLOCKS = 1;
constexpr int tile_blocks(int rows) { return rows == 1 ? 4 : rows == 2 ? 3 : rows == 3 ? 2 : 1; }
#endif
constexpr int64_t AHEAD = 64;  // inputs by which weights are asked for before they are used

// R rows x NB blocks over inputs [0, k). Accumulators start at zero, or with what y holds, whose rows have room
// for whole blocks. Everything is unrolled, or the accumulators would live on the stack.
template <int R, int NB, class W>
inline void tile(const W* w, int64_t block_stride, const float* const* x, int64_t k, bool resume, const float* scales,
                 float* y, int64_t ldy) {
  V acc[R][NB];
  const float* row[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    row[r] = x[r];
#pragma GCC unroll 4
    for (int n = 0; n < NB; ++n) acc[r][n] = resume ? load(y + r * ldy + n * LANES) : set1(0.0f);
  }
  for (int64_t i = 0; i < k; ++i) {
    V wv[NB];
#pragma GCC unroll 4
    for (int n = 0; n < NB; ++n) {
      __builtin_prefetch(w + n * block_stride + (i + AHEAD) * LANES);
      wv[n] = load(w + n * block_stride + i * LANES);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      V xv = set1(row[r][i]);
#pragma GCC unroll 4
      for (int n = 0; n < NB; ++n) acc[r][n] = fma(wv[n], xv, acc[r][n]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int n = 0; n < NB; ++n)
      store(y + r * ldy + n * LANES, scales ? mul(acc[r][n], load(scales + n * LANES)) : acc[r][n]);
}

// Some output blocks over `k` inputs, for all rows.
template <class W>
struct Pass {
  const W* w;            // the first block
  int64_t block_stride;  // between blocks
  int64_t blocks, k;
  bool resume;          // add to what y holds
  const float* scales;  // the first block's, or null
  float* y;             // the first block's outputs of row 0
  int64_t ldy;

  // In tiles of nearly equal height.
  void run(const Rows& rows) const {
    const int64_t tiles = (rows.count + MAX_TILE_ROWS - 1) / MAX_TILE_ROWS;
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t begin = rows.count * t / tiles, end = rows.count * (t + 1) / tiles;
      const float* x[MAX_TILE_ROWS];
      for (int64_t r = begin; r < end; ++r) x[r - begin] = rows[r];
      dispatch<MAX_TILE_ROWS>(int(end - begin), x, begin);
    }
  }

 private:
  template <int R>
  void dispatch(int count, const float* const* x, int64_t row) const {
    if (count == R) return run_rows<R>(x, row);
    if constexpr (R > 1) dispatch<R - 1>(count, x, row);
  }

  template <int R>
  void run_rows(const float* const* x, int64_t row) const {
    constexpr int NB = tile_blocks(R);
    int64_t b = 0;
    for (; b + NB <= blocks; b += NB) run_tile<R, NB>(x, row, b);
    for (; b < blocks; ++b) run_tile<R, 1>(x, row, b);
  }

  template <int R, int NB>
  void run_tile(const float* const* x, int64_t row, int64_t b) const {
    tile<R, NB>(w + b * block_stride, block_stride, x, k, resume, scales ? scales + b * LANES : nullptr,
                y + row * ldy + b * LANES, ldy);
  }
};

// y[r][0 ..] = output blocks [b0, b1) of every row; y's rows have room for whole blocks.
template <class W>
inline void gemm_typed(const Matrix& m, int64_t b0, int64_t b1, const Rows& rows, float* y, int64_t ldy) {
  const int64_t stride = m.in * LANES;
  const W* w = static_cast<const W*>(m.data) + b0 * stride;
  const float* scales = m.scales ? m.scales + b0 * LANES : nullptr;
  const int64_t group = rows.count <= MAX_TILE_ROWS ? b1 - b0 : GROUP_BLOCKS;
  for (int64_t b = 0; b < b1 - b0; b += group)
    Pass<W>{w + b * stride, stride, std::min(group, b1 - b0 - b), m.in, false, scales ? scales + b * LANES : nullptr,
            y + b * LANES, ldy}
        .run(rows);
}

inline void add_bias(const float* bias, int64_t size, int64_t rows, float* y, int64_t ldy) {
  for (int64_t r = 0; r < rows; ++r)
    for_vectors(size, [&](int64_t i, int n) {
      float* p = y + r * ldy + i;
      store_n(p, add(load_n(p, n), load_n(bias + i, n)), n);
    });
}

inline void gemm(const Matrix& m, int64_t b0, int64_t b1, const Rows& rows, float* y, int64_t ldy) {
  if (rows.count == 0 || b0 >= b1) return;
  switch (m.dtype) {
    case FP32: gemm_typed<float>(m, b0, b1, rows, y, ldy); break;
    case BF16: gemm_typed<PackedBf16>(m, b0, b1, rows, y, ldy); break;
    case INT8: gemm_typed<int8>(m, b0, b1, rows, y, ldy); break;
  }
  if (m.bias) add_bias(m.bias + b0 * LANES, std::min(m.out, b1 * LANES) - b0 * LANES, rows.count, y, ldy);
}

// One thread's share of a linear layer, split by output blocks.
inline void linear(const Matrix& m, const Rows& rows, float* y, int64_t ldy, const Team& team) {
  const Range blocks = team.share(m.blocks());
  gemm(m, blocks.begin, blocks.end, rows, y + blocks.begin * LANES, ldy);
}

// weight [out, in] -> packed, zeroed by the caller
template <class W>
void pack_rows(const W* source, int64_t out, int64_t in, W* packed) {
  for (int64_t r = 0; r < out; ++r) {
    W* p = packed + (r / LANES) * in * LANES + (sizeof(W) == sizeof(bf16) ? bf16_place(r % LANES) : r % LANES);
    for (int64_t i = 0; i < in; ++i) p[i * LANES] = source[r * in + i];
  }
}

}  // namespace specdec
