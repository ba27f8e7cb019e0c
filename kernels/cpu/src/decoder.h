// A whole decoder as one call: embed (and, for the MTP layer, fuse with the previous hidden states), decoder
// layers, final norm. Every thread of the team runs the same phases; a barrier ends each.
#pragma once

#include <memory>

#include "attention.h"
#include "mlp.h"

namespace specdec {

struct Layer {
  const float *input_norm, *post_attention_norm;
  const float *q_norm, *k_norm;  // or null
  Matrix qkv, o;
  MLP mlp;         // dense, or the shared experts
  MLP experts;     // gate_up.data null: a dense layer
  Matrix router;
  const float* correction_bias;
};
SHARED_STRUCT(Layer, FIELD(input_norm) FIELD(post_attention_norm) FIELD(q_norm) FIELD(k_norm) FIELD(qkv) FIELD(o)
              FIELD(mlp) FIELD(experts) FIELD(router) FIELD(correction_bias))

struct Decoder {
  const void* embedding;  // [vocab, hidden]
  int32_t embedding_dtype;
  int64_t hidden, heads, kv_heads, head_dim, rotary_dim;
  float eps;
  const float* cos_sin;  // [positions, rotary_dim]
  const float *enorm, *hnorm;  // null: no fusion with previous hidden states
  Matrix eh_proj;
  const Layer* layers;
  int64_t num_layers;
  Routing routing;
  const float* norm;
};
SHARED_STRUCT(Decoder, FIELD(embedding) FIELD(embedding_dtype) FIELD(hidden) FIELD(heads) FIELD(kv_heads)
              FIELD(head_dim) FIELD(rotary_dim) FIELD(eps) FIELD(cos_sin) FIELD(enorm) FIELD(hnorm) FIELD(eh_proj)
              FIELD(layers) FIELD(num_layers) FIELD(routing) FIELD(norm))

struct Forward {
  int64_t rows;
  const int64_t* input_ids;  // [rows]
  const float* const* previous;  // [rows] of [hidden], or null
  Batch batch;
  Cache cache;               // of the first layer
  int64_t layer_stride;      // elements from one layer's cache to the next one's
  float *normed, *unnormed;  // [rows, hidden]; unnormed may be null
  int64_t* expert_ids;       // [layers, rows, top_k], or null; rows of dense layers are left alone
};
SHARED_STRUCT(Forward, FIELD(rows) FIELD(input_ids) FIELD(previous) FIELD(batch) FIELD(cache) FIELD(layer_stride)
              FIELD(normed) FIELD(unnormed) FIELD(expert_ids))

// Uninitialised memory that stays between calls.
class Buffer {
 public:
  void hold(int64_t size) {
    if (size <= capacity_) return;
    data_.reset(new float[size]);
    capacity_ = size;
  }
  float* data() const { return data_.get(); }

 private:
  std::unique_ptr<float[]> data_;
  int64_t capacity_ = 0;
};

// What a thread has to itself; with many rows the first one's serves all.
struct Local {
  Buffer x, pair, normed, logits, weights;
  std::vector<int64_t> ids, order;
  Assignments assignments;
  RouteScratch route;
  MLPWork work;
};

struct Workspace {
  Buffer qkv, attended, projected, both, inner, out;
  std::vector<int64_t> positions, slots;  // [rows]: in the sequence, and page * page_size + offset
  std::vector<Local> locals;
};

// Few rows: every thread normalises, routes and adds up all of them for itself, which is cheaper than a barrier.
constexpr int64_t REPLICATED_ROWS = 4096;     // rows * hidden
constexpr int64_t REPLICATED_ROUTER = 32768;  // experts * hidden

struct Sizes {
  int64_t hidden, q, kv, qkv, experts;  // floats per row, padded where a linear layer writes them
  bool replicated;

  Sizes(const Decoder& d, const Forward& f)
      : hidden(padded(d.hidden)), q(d.heads * d.head_dim), kv(d.kv_heads * d.head_dim), qkv(padded(q + 2 * kv)),
        experts(padded(d.routing.num_experts)), replicated(f.rows * d.hidden <= REPLICATED_ROWS) {}
};

// Where each row lies: the rows of a sequence are the last of its cached ones.
inline void place(const Batch& batch, int64_t page_size, Workspace& w) {
  w.positions.clear();
  w.slots.clear();
  for (int64_t b = 0; b < batch.num_sequences; ++b) {
    const int64_t* pages = batch.pages + batch.page_starts[b];
    const int64_t count = batch.query_starts[b + 1] - batch.query_starts[b];
    for (int64_t at = batch.kv_lens[b] - count; at < batch.kv_lens[b]; ++at) {
      w.positions.push_back(at);
      w.slots.push_back(pages[at / page_size] * page_size + at % page_size);
    }
  }
}

// All the memory of a forward, before its threads start.
inline void prepare(const Decoder& d, const Forward& f, int num_threads, Workspace& w) {
  const Sizes size(d, f);
  if (w.locals.size() < size_t(num_threads)) w.locals.resize(num_threads);
  for (int i = 0; i < (size.replicated ? num_threads : 1); ++i) {
    Local& local = w.locals[i];
    local.x.hold(f.rows * size.hidden);
    local.pair.hold(d.enorm ? f.rows * 2 * d.hidden : 0);
    local.normed.hold(f.rows * size.hidden);
    local.logits.hold(f.rows * size.experts);
    local.weights.hold(f.rows * d.routing.top_k);
    local.ids.resize(f.rows * d.routing.top_k);
  }
  int64_t inner = 0;
  for (int64_t l = 0; l < d.num_layers; ++l)
    inner = std::max(inner, d.layers[l].mlp.width() + d.routing.top_k * d.layers[l].experts.width());
  w.qkv.hold(f.rows * size.qkv);
  w.attended.hold(f.rows * size.q);
  w.projected.hold(f.rows * size.hidden);
  w.both.hold(f.rows * 2 * inner);
  w.inner.hold(f.rows * inner);
  w.out.hold(f.rows * (1 + d.routing.top_k) * size.hidden);
  place(f.batch, f.cache.page_size, w);
}

// One thread's part of a forward. A phase reads what others wrote before the barrier, and no phase overwrites
// what another may still read before the next.
class DecoderRun {
 public:
  DecoderRun(const Decoder& d, const Forward& f, const Team& team, Workspace& w)
      : d_(d), f_(f), team_(team), size_(d, f), w_(w), home_(w.locals[size_.replicated ? team.thread : 0]),
        own_(w.locals[team.thread]), mine_(size_.replicated ? Range{0, f.rows} : team.share(f.rows)) {}

  void run() {
    embed();
    for (int64_t l = 0; l < d_.num_layers; ++l) layer(l);
    const Range rows = team_.share(f_.rows);
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      if (f_.unnormed) std::memcpy(f_.unnormed + r * d_.hidden, x(r), sizeof(float) * d_.hidden);
      rms_norm(x(r), d_.norm, d_.eps, d_.hidden, f_.normed + r * d_.hidden);
    }
  }

 private:
  float* x(int64_t r) const { return home_.x.data() + r * size_.hidden; }
  float* normed(int64_t r) const { return home_.normed.data() + r * size_.hidden; }
  float* qkv(int64_t r) const { return w_.qkv.data() + r * size_.qkv; }
  float* projected(int64_t r) const { return w_.projected.data() + r * size_.hidden; }
  Rows normed_rows() const { return {normed(0), size_.hidden, nullptr, f_.rows}; }

  // After phases in which each thread works on its own rows, or on all of them for itself.
  void sync_rows() const {
    if (!size_.replicated) team_.barrier();
  }

  void embed() {
    for (int64_t r = mine_.begin; r < mine_.end; ++r) {
      const int64_t at = f_.input_ids[r] * d_.hidden;
      for_vectors(d_.hidden, [&](int64_t i, int n) {
        const bool narrow = d_.embedding_dtype == BF16;
        store_n(x(r) + i, narrow ? load_n(static_cast<const bf16*>(d_.embedding) + at + i, n)
                                 : load_n(static_cast<const float*>(d_.embedding) + at + i, n), n);
      });
    }
    if (d_.enorm) fuse_previous();
  }

  // x = eh_proj([enorm(embedding), hnorm(previous)])
  void fuse_previous() {
    float* pair = home_.pair.data();
    for (int64_t r = mine_.begin; r < mine_.end; ++r) {
      rms_norm(x(r), d_.enorm, d_.eps, d_.hidden, pair + r * 2 * d_.hidden);
      rms_norm(f_.previous[r], d_.hnorm, d_.eps, d_.hidden, pair + (2 * r + 1) * d_.hidden);
    }
    sync_rows();
    linear(d_.eh_proj, {pair, 2 * d_.hidden, nullptr, f_.rows}, projected(0), size_.hidden, team_);
    team_.barrier();
    for (int64_t r = mine_.begin; r < mine_.end; ++r) std::memcpy(x(r), projected(r), sizeof(float) * d_.hidden);
  }

  void layer(int64_t index) {
    const Layer& layer = d_.layers[index];
    attention(layer, index);
    for (int64_t r = mine_.begin; r < mine_.end; ++r) {
      add_rows(x(r), projected(r), d_.hidden, x(r));
      rms_norm(x(r), layer.post_attention_norm, d_.eps, d_.hidden, normed(r));
    }
    sync_rows();
    if (layer.experts.gate_up.data) {
      mixture(layer, index);
    } else {
      dense(layer);
    }
  }

  // projected = o(attention(norm(x)))
  void attention(const Layer& layer, int64_t index) {
    Cache cache = f_.cache;
    cache.data = static_cast<char*>(cache.data) + index * f_.layer_stride * (cache.dtype == BF16 ? 2 : 4);
    for (int64_t r = mine_.begin; r < mine_.end; ++r) rms_norm(x(r), layer.input_norm, d_.eps, d_.hidden, normed(r));
    sync_rows();
    linear(layer.qkv, normed_rows(), qkv(0), size_.qkv, team_);
    team_.barrier();
    rotate_and_append(layer, cache);
    team_.barrier();
    attend(cache, f_.batch, d_.heads, qkv(0), size_.qkv, w_.attended.data(), size_.q, team_);
    team_.barrier();
    linear(layer.o, {w_.attended.data(), size_.q, nullptr, f_.rows}, projected(0), size_.hidden, team_);
    team_.barrier();
  }

  void rotate_and_append(const Layer& layer, const Cache& cache) const {
    const int64_t heads = d_.heads + d_.kv_heads;  // queries, then keys with their values
    const Range units = team_.share(f_.rows * heads);
    for (int64_t u = units.begin; u < units.end; ++u) {
      const int64_t r = u / heads, h = u % heads;
      float* head = qkv(r) + h * d_.head_dim;
      const float* norm = h < d_.heads ? layer.q_norm : layer.k_norm;
      if (norm) rms_norm(head, norm, d_.eps, d_.head_dim, head);
      rotate(head, d_.cos_sin + w_.positions[r] * d_.rotary_dim, d_.rotary_dim);
      if (h >= d_.heads) append(cache, w_.slots[r], h - d_.heads, head, head + size_.kv);
    }
  }

  MLPMemory memory() const { return {w_.both.data(), w_.inner.data(), w_.out.data(), size_.hidden}; }

  void run_work() const {
    own_.work.inner(team_);
    team_.barrier();
    own_.work.out(team_);
    team_.barrier();
  }

  void dense(const Layer& layer) {
    MLPMemory room = memory();
    own_.work.items = {room.place(layer.mlp, normed_rows())};
    run_work();
    for (int64_t r = mine_.begin; r < mine_.end; ++r) add_rows(x(r), w_.out.data() + r * size_.hidden, d_.hidden, x(r));
  }

  void mixture(const Layer& layer, int64_t index) {
    const int64_t k = d_.routing.top_k;
    route_rows(layer);
    copy_expert_ids(index);
    MLPMemory room = memory();
    own_.assignments.assign(home_.ids.data(), f_.rows, k, d_.routing.num_experts);
    own_.work.items.clear();
    add_experts(layer.experts, own_.assignments, normed(0), size_.hidden, room, own_.work);
    const float* shared = room.out;
    own_.work.items.push_back(room.place(layer.mlp, normed_rows()));
    run_work();
    for (int64_t r = mine_.begin; r < mine_.end; ++r) {
      combine(home_.ids.data() + r * k, home_.weights.data() + r * k, own_.assignments.places.data() + r * k, k, w_.out.data(),
              size_.hidden, d_.hidden, own_.order, normed(r));
      add_rows(normed(r), shared + r * size_.hidden, d_.hidden, normed(r));
      add_rows(x(r), normed(r), d_.hidden, x(r));
    }
  }

  void route_rows(const Layer& layer) {
    const bool alone = size_.replicated && d_.routing.num_experts * d_.hidden <= REPLICATED_ROUTER;
    float* logits = alone ? home_.logits.data() : w_.locals[0].logits.data();
    linear(layer.router, normed_rows(), logits, size_.experts, alone ? Team::alone() : team_);
    if (!alone) team_.barrier();
    for (int64_t r = mine_.begin; r < mine_.end; ++r)
      route(d_.routing, logits + r * size_.experts, layer.correction_bias, home_.ids.data() + r * d_.routing.top_k,
            home_.weights.data() + r * d_.routing.top_k, own_.route);
    sync_rows();
  }

  void copy_expert_ids(int64_t index) const {
    if (!f_.expert_ids) return;
    const Range rows = team_.share(f_.rows);
    const int64_t k = d_.routing.top_k;
    std::copy(home_.ids.data() + rows.begin * k, home_.ids.data() + rows.end * k,
              f_.expert_ids + (index * f_.rows + rows.begin) * k);
  }

  const Decoder& d_;
  const Forward& f_;
  const Team team_;
  const Sizes size_;
  Workspace& w_;
  Local &home_, &own_;
  const Range mine_;
};

inline void decode(const Decoder& decoder, const Forward& forward, int threads) {
  static thread_local Workspace kept;
  Workspace& workspace = kept;  // the caller's, for all threads
  prepare(decoder, forward, threads, workspace);
  parallel(threads, LEAST_SHARED_WORK, [&](const Team& team) { DecoderRun(decoder, forward, team, workspace).run(); });
}

}  // namespace specdec
