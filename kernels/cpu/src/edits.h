// What a request's parameters do to single logits. See specdec.kernels.decisions.LogitEdits.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "layout.h"

namespace specdec {

// All zero: nothing.
struct Edits {
  int64_t num_biases;
  const int64_t* bias_ids;
  const double* biases;
  int64_t num_ends, ends_banned;
  const int64_t* ends;
  int64_t num_words;
  const int64_t *word_starts, *word_tokens;
  int64_t num_recent;
  const int64_t* recent;
  int64_t num_counted;
  const int64_t *counted_ids, *counts;
  double repetition, presence, frequency;

  // A row of logits, of the token that follows the committed ones and `num` drafts.
  void run(const int64_t* drafts, int64_t num, float* x) const {
    for (int64_t i = 0; i < num_biases; ++i) x[bias_ids[i]] += float(biases[i]);
    if (num < ends_banned)
      for (int64_t i = 0; i < num_ends; ++i) x[ends[i]] = -INFINITY;
    for (int64_t w = 0; w < num_words; ++w) {
      const int64_t last = word_starts[w + 1] - 1;
      if (stands_before(word_tokens + word_starts[w], word_tokens + last, drafts, num)) x[word_tokens[last]] = -INFINITY;
    }
    if (num_counted > 0) penalise(drafts, num, x);
  }

 private:
  // Whether the tokens are the last ones of `recent` and the drafts.
  bool stands_before(const int64_t* token, const int64_t* end, const int64_t* drafts, int64_t num) const {
    for (int64_t at = num_recent + num - (end - token); token < end; ++token, ++at)
      if (at < 0 || *token != (at < num_recent ? recent[at] : drafts[at - num_recent])) return false;
    return true;
  }

  float penalised(float logit, int64_t count) const {
    const float r = float(repetition), value = logit > 0.0f ? logit / r : logit * r;
    return (count > 0 ? value - float(presence) : value) - float(frequency) * float(count);
  }

  void penalise(const int64_t* drafts, int64_t num, float* x) const {
    float before[MAX_DRAFTS];
    for (int64_t i = 0; i < num; ++i) before[i] = x[drafts[i]];
    for (int64_t i = 0; i < num_counted; ++i) x[counted_ids[i]] = penalised(x[counted_ids[i]], counts[i]);
    for (int64_t i = 0; i < num; ++i) {
      const int64_t* counted = std::find(counted_ids, counted_ids + num_counted, drafts[i]);
      const int64_t committed = counted < counted_ids + num_counted ? counts[counted - counted_ids] : 0;
      x[drafts[i]] = penalised(before[i], committed + std::count(drafts, drafts + num, drafts[i]));
    }
  }

  static constexpr int64_t MAX_DRAFTS = 64;
};
SHARED_STRUCT(Edits, FIELD(num_biases) FIELD(bias_ids) FIELD(biases) FIELD(num_ends) FIELD(ends_banned) FIELD(ends)
              FIELD(num_words) FIELD(word_starts) FIELD(word_tokens) FIELD(num_recent) FIELD(recent)
              FIELD(num_counted) FIELD(counted_ids) FIELD(counts) FIELD(repetition) FIELD(presence) FIELD(frequency))

}  // namespace specdec
