// SwiGLU MLPs and mixtures of them: down(silu(gate(x)) * up(x)).
//
// gate and up are packed as one matrix whose blocks alternate, [gate 0, up 0, gate 1, up 1, ...], so the thread
// that computes a pair of blocks has all it needs to activate them. Experts and the shared MLP are items of one
// work list: each item's weights are read once, whatever number of rows chose it.
#pragma once

#include <numeric>

#include "ops.h"

namespace specdec {

// One MLP, or a stack of `Routing::num_experts`.
struct MLP {
  Matrix gate_up;  // out: twice the width, each half padded to whole blocks
  Matrix down;

  int64_t width() const { return gate_up.out / 2; }  // padded
};
SHARED_STRUCT(MLP, FIELD(gate_up) FIELD(down))

// Experts in ascending order with the rows that chose them.
struct Assignments {
  std::vector<int64_t> rows, places;    // rows by expert, then by row; places[r * k + j]: where row r's j-th choice is
  std::vector<int64_t> starts, active;  // of each active expert, and the experts themselves
  std::vector<int64_t> counts;

  void assign(const int64_t* ids, int64_t num_rows, int64_t k, int64_t num_experts) {
    counts.assign(num_experts + 1, 0);
    active.clear();
    starts.clear();
    for (int64_t i = 0; i < num_rows * k; ++i) ++counts[ids[i] + 1];
    for (int64_t e = 0; e < num_experts; ++e)
      if (counts[e + 1] > 0) active.push_back(e);
    std::partial_sum(counts.begin(), counts.end(), counts.begin());
    for (int64_t e : active) starts.push_back(counts[e]);
    starts.push_back(num_rows * k);
    rows.resize(num_rows * k);
    places.resize(num_rows * k);
    for (int64_t i = 0; i < num_rows * k; ++i) {
      places[i] = counts[ids[i]]++;
      rows[places[i]] = i / k;
    }
  }
};

// An MLP over some rows: x -> inner [rows, padded width] -> out [rows, ld_out].
struct MLPItem {
  Matrix gate_up, down;
  Rows x;
  float *both, *inner, *out;  // both: gate and up, [rows, 2 * padded width]
  int64_t ld_out;

  int64_t pairs() const { return gate_up.blocks() / 2; }
  int64_t width() const { return pairs() * LANES; }

  void compute_inner(int64_t begin, int64_t end) const {
    float* y = both + begin * 2 * LANES;
    gemm(gate_up, 2 * begin, 2 * end, x, y, 2 * width());
    for (int64_t r = 0; r < x.count; ++r)
      for (int64_t p = begin; p < end; ++p) {
        const float* pair = both + r * 2 * width() + p * 2 * LANES;
        store(inner + r * width() + p * LANES, mul(silu(load(pair)), load(pair + LANES)));
      }
  }

  void compute_out(int64_t begin, int64_t end) const {
    gemm(down, begin, end, {inner, width(), nullptr, x.count}, out + begin * LANES, ld_out);
  }
};

// The items of one layer, shared among threads by cost: reading a block costs about as much as four rows of it.
struct MLPWork {
  std::vector<MLPItem> items;

  // Both phases of every item; a barrier must lie between them.
  void inner(const Team& team) const {
    share(team, [](const MLPItem& i) { return i.pairs(); },
          [](const MLPItem& i, int64_t begin, int64_t end) { i.compute_inner(begin, end); });
  }
  void out(const Team& team) const {
    share(team, [](const MLPItem& i) { return i.down.blocks(); },
          [](const MLPItem& i, int64_t begin, int64_t end) { i.compute_out(begin, end); });
  }

 private:
  template <class Units, class F>
  void share(const Team& team, Units units, F body) const {
    int64_t total = 0, base = 0;
    for (const MLPItem& item : items) total += units(item) * (item.x.count + 4);
    const Range mine = team.share(total);
    for (const MLPItem& item : items) {
      const int64_t cost = item.x.count + 4, n = units(item);
      auto units_before = [&](int64_t at) { return at <= base ? 0 : std::min(n, (at - base + cost - 1) / cost); };
      const int64_t begin = units_before(mine.begin), end = units_before(mine.end);
      if (begin < end) body(item, begin, end);
      base += n * cost;
    }
  }
};

// Memory of the MLPs of one layer: experts first, then the shared or dense one.
struct MLPMemory {
  float *both, *inner, *out;
  int64_t ld_out;

  // Room for `rows` more rows of an MLP.
  MLPItem place(const MLP& mlp, const Rows& x) {
    MLPItem item{mlp.gate_up, mlp.down, x, both, inner, out, ld_out};
    both += x.count * 2 * item.width();
    inner += x.count * item.width();
    out += x.count * ld_out;
    return item;
  }
};

inline void add_experts(const MLP& experts, const Assignments& a, const float* x, int64_t ldx, MLPMemory& memory, MLPWork& work) {
  for (size_t i = 0; i < a.active.size(); ++i) {
    const MLP expert{experts.gate_up.expert(a.active[i]), experts.down.expert(a.active[i])};
    work.items.push_back(memory.place(expert, {x, ldx, a.rows.data() + a.starts[i], a.starts[i + 1] - a.starts[i]}));
  }
}

// y = the row's experts, weighted, added in ascending id.
inline void combine(const int64_t* ids, const float* weights, const int64_t* places, int64_t k, const float* out,
                    int64_t ld_out, int64_t size, std::vector<int64_t>& order, float* y) {
  order.resize(k);
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](int64_t i, int64_t j) { return ids[i] < ids[j]; });
  for_vectors(size, [&](int64_t c, int n) {
    V sum = set1(0.0f);
    for (int64_t j : order) sum = fma(set1(weights[j]), load(out + places[j] * ld_out + c), sum);
    store_n(y + c, sum, n);
  });
}

}  // namespace specdec
