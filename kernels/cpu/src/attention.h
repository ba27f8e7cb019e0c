// Causal attention over a paged cache, online softmax over tiles of keys at absolute positions.
//
// A query row sees its keys in tiles [0, 64), [64, 128), ...: scores, maximum, rescaling and sums of a tile
// depend on that row and its visible keys alone. Scores and weighted values are products with the tile's keys
// and values packed like weights, so their order of summation is that of a linear layer. Keys beyond a row are
// never multiplied into its output, so what lies in them (even NaN) cannot matter.
#pragma once

#include "ops.h"

namespace specdec {

constexpr int64_t KEY_TILE = 64;
constexpr int64_t QUERY_ROWS = 16;  // query rows of one task; a task covers all heads of one KV head

// One layer's cache.
struct Cache {
  void* data;  // [pages, 2, page_size, kv_heads, head_dim]
  int32_t dtype;
  int64_t page_size, kv_heads, head_dim;

  int64_t offset(int64_t page, int64_t kind, int64_t slot, int64_t head) const {
    return (((page * 2 + kind) * page_size + slot) * kv_heads + head) * head_dim;
  }
};
SHARED_STRUCT(Cache, FIELD(data) FIELD(dtype) FIELD(page_size) FIELD(kv_heads) FIELD(head_dim))

// The sequences of a forward.
struct Batch {
  int64_t num_sequences;
  const int64_t* query_starts;  // [B + 1]
  const int64_t* kv_lens;       // [B]
  const int64_t* page_starts;   // [B] into pages
  const int64_t* pages;
};
SHARED_STRUCT(Batch, FIELD(num_sequences) FIELD(query_starts) FIELD(kv_lens) FIELD(page_starts) FIELD(pages))

template <class C>
inline void append_row(const Cache& cache, int64_t slot, int64_t head, const float* k, const float* v) {
  C* data = static_cast<C*>(cache.data);
  int64_t page = slot / cache.page_size, at = slot % cache.page_size;
  C *kd = data + cache.offset(page, 0, at, head), *vd = data + cache.offset(page, 1, at, head);
  for (int64_t d = 0; d < cache.head_dim; ++d) {
    from_float(k[d], kd[d]);
    from_float(v[d], vd[d]);
  }
}

// One head of one token: k and v are [head_dim].
inline void append(const Cache& cache, int64_t slot, int64_t head, const float* k, const float* v) {
  if (cache.dtype == BF16) {
    append_row<bf16>(cache, slot, head, k, v);
  } else {
    append_row<float>(cache, slot, head, k, v);
  }
}

struct AttentionScratch {
  std::vector<float> query, keys, values, scores, accumulator, best, total;
};

// Query rows [row0, row1) of one sequence with all query heads of one KV head. Row m of the scratch is
// (query row m / group, head m % group).
template <class C>
struct AttentionTask {
  const Cache& cache;
  const int64_t* pages;
  int64_t row0, row1, first_position;  // position of the sequence's first query
  int64_t kv_head, group;
  const float* q;  // query row 0 of the sequence, [heads, dim] per row
  int64_t q_stride;
  float* out;
  int64_t out_stride;
  AttentionScratch& s;

  int64_t dim() const { return cache.head_dim; }
  int64_t rows() const { return (row1 - row0) * group; }

  void run() {
    const int64_t width = padded(dim());
    s.query.resize(rows() * width);
    s.keys.resize(KEY_TILE * width);
    s.values.resize(KEY_TILE * width);
    s.scores.resize(rows() * KEY_TILE);
    s.accumulator.assign(rows() * width, 0.0f);
    s.best.assign(rows(), -INFINITY);
    s.total.assign(rows(), 0.0f);
    const V scale = set1(1.0f / std::sqrt(float(dim())));
    for (int64_t m = 0; m < rows(); ++m) {
      const float* source = q + (row0 + m / group) * q_stride + (kv_head * group + m % group) * dim();
      for_vectors(dim(), [&](int64_t d, int n) { store(&s.query[m * width + d], mul(load_n(source + d, n), scale)); });
    }
    const int64_t end = first_position + row1;  // keys visible to the last row
    for (int64_t start = 0; start < end; start += KEY_TILE) run_tile(start, std::min(KEY_TILE, end - start));
    for (int64_t m = 0; m < rows(); ++m) {
      float* target = out + (row0 + m / group) * out_stride + (kv_head * group + m % group) * dim();
      const V total = set1(s.total[m]);
      for_vectors(dim(), [&](int64_t d, int n) { store_n(target + d, div(load(&s.accumulator[m * width + d]), total), n); });
    }
  }

  void run_tile(int64_t start, int64_t count) {
    const int64_t width = padded(dim());
    const C* key[KEY_TILE];
    find_keys(start, count, key);
    pack_keys(key, count);
    pack_values(key, count);
    const Matrix keys{s.keys.data(), nullptr, nullptr, KEY_TILE, dim(), FP32};
    gemm(keys, 0, num_blocks(count), {s.query.data(), width, nullptr, rows()}, s.scores.data(), KEY_TILE);
    for (int64_t m = 0; m < rows(); ++m) update_softmax(m, visible(m / group, start, count));
    for (int64_t row = 0; row < row1 - row0;) {  // query rows that see equally many keys of this tile
      const int64_t keys_seen = visible(row, start, count);
      int64_t next = row + 1;
      while (next < row1 - row0 && visible(next, start, count) == keys_seen) ++next;
      if (keys_seen > 0) add_values(row * group, (next - row) * group, keys_seen);
      row = next;
    }
  }

  int64_t visible(int64_t row, int64_t start, int64_t count) const {
    return std::clamp<int64_t>(first_position + row0 + row + 1 - start, 0, count);
  }

  void find_keys(int64_t start, int64_t count, const C** key) const {
    int64_t page = start / cache.page_size, slot = start % cache.page_size;
    for (int64_t j = 0; j < count; ++page, slot = 0) {
      const C* first = static_cast<const C*>(cache.data) + cache.offset(pages[page], 0, slot, kv_head);
      const int64_t end = std::min(count, j + cache.page_size - slot), stride = cache.kv_heads * cache.head_dim;
      for (; j < end; ++j, first += stride) key[j] = first;
    }
  }

  // [4][dim][16]: sixteen keys side by side
  void pack_keys(const C* const* key, int64_t count) {
    for (int64_t j = 0; j < count; j += LANES) {
      float* block = &s.keys[j * dim()];
      for_vectors(dim(), [&](int64_t d, int n) {
        V rows[LANES];
        for (int i = 0; i < LANES; ++i) rows[i] = load_n(key[std::min(j + i, count - 1)] + d, n);  // repeated: never visible
        if (n == LANES) return transpose(rows, block + d * LANES);
        float columns[LANES * LANES];
        transpose(rows, columns);
        std::memcpy(block + d * LANES, columns, sizeof(float) * n * LANES);
      });
    }
  }

  // [dim / 16][64][16]: sixteen dimensions side by side
  void pack_values(const C* const* key, int64_t count) {
    const int64_t to_value = cache.offset(0, 1, 0, 0);
    for (int64_t j = 0; j < count; ++j) {
      const C* value = key[j] + to_value;
      for_vectors(dim(), [&](int64_t d, int n) { store(&s.values[d * KEY_TILE + j * LANES], load_n(value + d, n)); });
    }
  }

  // Scores of row m become exp(score - best); what was summed so far is rescaled to the new maximum.
  void update_softmax(int64_t m, int64_t keys_seen) {
    if (keys_seen <= 0) return;
    float* scores = &s.scores[m * KEY_TILE];
    V most = set1(s.best[m]);
    for_vectors(keys_seen, [&](int64_t j, int n) { most = max(load_n(scores + j, n, -INFINITY), most); });  // NaN never wins
    const float best = reduce_max(most);
    const V shift = set1(best);
    V sum = set1(0.0f);
    for_vectors(keys_seen, [&](int64_t j, int n) {
      V p = exp(sub(load_n(scores + j, n, -INFINITY), shift));
      sum = add(sum, p);
      store_n(scores + j, p, n);
    });
    const float keep = std::exp(s.best[m] - best);
    s.best[m] = best;
    s.total[m] = s.total[m] * keep + reduce_add(sum);
    const int64_t width = padded(dim());
    for (int64_t d = 0; d < width; d += LANES) {
      float* a = &s.accumulator[m * width + d];
      store(a, mul(load(a), set1(keep)));
    }
  }

  void add_values(int64_t first, int64_t count, int64_t keys_seen) {
    const int64_t width = padded(dim());
    Pass<float>{s.values.data(), KEY_TILE * LANES, num_blocks(dim()), keys_seen, true, nullptr,
                &s.accumulator[first * width], width}
        .run({&s.scores[first * KEY_TILE], KEY_TILE, nullptr, count});
  }
};

// One thread's share of the tasks (sequence, block of query rows, KV head): neighbours, whose keys lie side by side, of
// equally many tiles.
inline void attend(const Cache& cache, const Batch& b, int64_t heads, const float* q, int64_t q_stride, float* out,
                   int64_t out_stride, const Team& team) {
  static thread_local AttentionScratch scratch;
  auto each_task = [&](auto run) {
    for (int64_t s = 0; s < b.num_sequences; ++s) {
      const int64_t query_len = b.query_starts[s + 1] - b.query_starts[s], position = b.kv_lens[s] - query_len;
      for (int64_t row = 0; row < query_len; row += QUERY_ROWS) {
        const int64_t end = std::min(query_len, row + QUERY_ROWS), tiles = (position + end + KEY_TILE - 1) / KEY_TILE;
        for (int64_t head = 0; head < cache.kv_heads; ++head) run(s, row, end, position, head, tiles);
      }
    }
  };
  int64_t total = 0, before = 0;
  each_task([&](int64_t, int64_t, int64_t, int64_t, int64_t, int64_t tiles) { total += tiles; });
  each_task([&](int64_t s, int64_t row, int64_t end, int64_t position, int64_t head, int64_t tiles) {
    const int64_t owner = (2 * before + tiles) * team.size / (2 * total);
    before += tiles;
    if (owner != team.thread) return;
    const int64_t first = b.query_starts[s];
    auto run = [&](auto type) {
      AttentionTask<decltype(type)>{cache, b.pages + b.page_starts[s], row, end, position, head, heads / cache.kv_heads,
                                    q + first * q_stride, q_stride, out + first * out_stride, out_stride, scratch}
          .run();
    };
    if (cache.dtype == BF16) {
      run(bf16{});
    } else {
      run(float{});
    }
  });
}

}  // namespace specdec
