// Row-wise operations. Each works on the rows (or items) that the caller gives it, one at a time, so a row's
// bits depend on nothing else.
#pragma once

#include <vector>

#include "linear.h"

namespace specdec {

// y = x / rms(x) * w
inline void rms_norm(const float* x, const float* w, float eps, int64_t size, float* y) {
  V sum = set1(0.0f);
  for_vectors(size, [&](int64_t i, int n) {
    V v = load_n(x + i, n);
    sum = fma(v, v, sum);
  });
  V scale = set1(1.0f / std::sqrt(reduce_add(sum) / float(size) + eps));
  for_vectors(size, [&](int64_t i, int n) { store_n(y + i, mul(mul(load_n(x + i, n), scale), load_n(w + i, n)), n); });
}

inline void add_rows(const float* a, const float* b, int64_t size, float* y) {
  for_vectors(size, [&](int64_t i, int n) { store_n(y + i, add(load_n(a + i, n), load_n(b + i, n)), n); });
}

// Half-split rotation of the first `rotary` dims; cos_sin holds rotary/2 cosines, then sines.
inline void rotate(float* x, const float* cos_sin, int64_t rotary) {
  int64_t half = rotary / 2;
  const float *c = cos_sin, *s = cos_sin + half;
  for_vectors(half, [&](int64_t i, int n) {
    V x1 = load_n(x + i, n), x2 = load_n(x + half + i, n);
    V cv = load_n(c + i, n), sv = load_n(s + i, n);
    store_n(x + i, fma(x1, cv, mul(sub(set1(0.0f), x2), sv)), n);
    store_n(x + half + i, fma(x2, cv, mul(x1, sv)), n);
  });
}

inline V silu(V x) { return div(x, add(set1(1.0f), exp(sub(set1(0.0f), x)))); }

// y = silu(gate) * up
inline void silu_and_mul(const float* gate, const float* up, int64_t size, float* y) {
  for_vectors(size, [&](int64_t i, int n) { store_n(y + i, mul(silu(load_n(gate + i, n)), load_n(up + i, n)), n); });
}

struct Routing {
  int64_t num_experts, top_k, n_group, topk_group;
  int32_t norm_topk_prob;
  float scaling;
};
SHARED_STRUCT(Routing, FIELD(num_experts) FIELD(top_k) FIELD(n_group) FIELD(topk_group) FIELD(norm_topk_prob)
              FIELD(scaling))

// The k best of `scores` in descending order, the lowest id first among equals.
inline void top_ids(const float* scores, int64_t size, int64_t k, int64_t* ids) {
  for (int64_t i = 0; i < size; ++i) {
    int64_t at = std::min(i, k);
    if (at == k && !(scores[i] > scores[ids[k - 1]])) continue;
    if (at == k) --at;
    for (; at > 0 && scores[i] > scores[ids[at - 1]]; --at) ids[at] = ids[at - 1];
    ids[at] = i;
  }
}

struct RouteScratch {
  std::vector<float> scores, choice, groups;
  std::vector<int64_t> kept;
};

// One row: logits [E] -> expert ids [k] and weights [k].
inline void route(const Routing& r, const float* logits, const float* bias, int64_t* ids, float* weights,
                  RouteScratch& scratch) {
  const int64_t e = r.num_experts;
  scratch.scores.resize(e);
  scratch.choice.resize(e);
  float *scores = scratch.scores.data(), *choice = scratch.choice.data();
  for_vectors(e, [&](int64_t i, int n) {
    V s = div(set1(1.0f), add(set1(1.0f), exp(sub(set1(0.0f), load_n(logits + i, n)))));
    store_n(scores + i, s, n);
    store_n(choice + i, add(s, load_n(bias + i, n)), n);
  });
  if (r.topk_group < r.n_group) {
    const int64_t size = e / r.n_group;
    scratch.groups.resize(r.n_group);
    scratch.kept.resize(r.topk_group);
    for (int64_t g = 0; g < r.n_group; ++g) {
      int64_t two[2];
      top_ids(choice + g * size, size, 2, two);
      scratch.groups[g] = choice[g * size + two[0]] + choice[g * size + two[1]];
    }
    top_ids(scratch.groups.data(), r.n_group, r.topk_group, scratch.kept.data());
    for (int64_t g = 0; g < r.n_group; ++g)
      if (std::find(scratch.kept.begin(), scratch.kept.end(), g) == scratch.kept.end())
        std::fill(choice + g * size, choice + (g + 1) * size, -INFINITY);
  }
  top_ids(choice, e, r.top_k, ids);
  float sum = 0.0f;
  for (int64_t j = 0; j < r.top_k; ++j) sum += weights[j] = scores[ids[j]];
  for (int64_t j = 0; j < r.top_k; ++j) {
    if (r.norm_topk_prob) weights[j] /= sum + 1e-20f;
    weights[j] *= r.scaling;
  }
}

}  // namespace specdec
