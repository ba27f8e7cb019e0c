// A chain of drafts as one call: head, decoder, head, ... without a word from the host in between.
#pragma once

#include "decoder.h"
#include "truncate.h"

namespace specdec {

constexpr int64_t NOT_DRAFTED = -1, NOT_FINITE = -2;  // as in specdec.kernels.interface

// Mirrored by specdec.kernels.cpu.native.DraftSampling.
struct DraftSampling {
  Sampling rows;                 // of the first step
  const double* min_confidence;  // [B]
  const int64_t* prob_rows;      // [B] rows of probs, or -1
  float* probs;                  // [Q, prob_steps, V], or null where every prob_row is -1
  int64_t prob_steps;
};

// Mirrored by specdec.kernels.cpu.native.Chain.
struct Chain {
  int64_t num_sequences, steps;
  const int64_t* counts;       // [B], from 1 to `steps`: the most drafts of each sequence
  const int64_t* positions;    // [B] of the rows that `normed` is the output of
  const int64_t* page_starts;  // [B + 1] into pages
  const int64_t* pages;
  Cache cache;
  const float *normed, *recycled;  // [B, hidden]: for the head, and what the next row takes
  int32_t recycle_unnormed;
  const DraftSampling* sampling;  // null: every draft is an argmax
  int64_t* drafts;                // [B, steps]
  int64_t* expert_ids;            // [steps - 1, 1, B, top_k], or null
};

// Draft `step` of sequence `b` from its logits, which it changes.
inline int64_t draw(const DraftSampling& s, int64_t b, int64_t step, float* logits, int64_t size) {
  static thread_local Truncation truncation;
  static thread_local Choice choice;
  const float scale = s.rows.scale(b);
  truncation.run(logits, size, scale, s.rows.top_k(b), s.rows.top_p(b), s.rows.min_p(b));
  float* probs = s.prob_rows[b] >= 0 ? s.probs + (s.prob_rows[b] * s.prob_steps + step) * size : nullptr;
  if (probs || s.min_confidence[b] > 0.0)
    if (softmax(logits, scale, size, probs) < s.min_confidence[b]) return NOT_DRAFTED;
  const int64_t id = choice.run(logits, size, scale, s.rows.greedy(b), s.rows.key(b, step));
  return id < 0 ? NOT_FINITE : id;
}

// Hidden states -> the next draft of each of the sequences.
inline void draw_all(const Matrix& head, const Rows& normed, const DraftSampling& s, const int64_t* sequences, int64_t step,
                     std::vector<float>& logits, int64_t* ids, int threads) {
  const int64_t ld = padded(head.out);
  logits.resize(normed.count * ld);
  parallel(threads, head.out * head.in, [&](const Team& team) {
    linear(head, normed, logits.data(), ld, team);
    team.barrier();
    const Range mine = team.share(normed.count);
    for (int64_t i = mine.begin; i < mine.end; ++i) ids[i] = draw(s, sequences[i], step, logits.data() + i * ld, head.out);
  });
}

inline void draft_chain(const Decoder& decoder, const Matrix& head, const Chain& c, int threads) {
  const int64_t b = c.num_sequences, hidden = decoder.hidden;
  std::vector<int64_t> active(b), ids(b), positions(b), slots(b), query_starts(b + 1), kv_lens(b), page_starts(b);
  std::vector<float> previous(b * hidden), normed(c.normed, c.normed + b * hidden), unnormed(b * hidden), logits;
  std::fill(c.drafts, c.drafts + b * c.steps, NOT_DRAFTED);
  std::iota(active.begin(), active.end(), 0);
  std::iota(query_starts.begin(), query_starts.end(), 0);
  const float* recycled = c.recycled;
  for (int64_t step = 0; step < c.steps; ++step) {
    if (step > 0) {
      int64_t kept = 0;
      for (size_t i = 0; i < active.size(); ++i) {
        const int64_t s = active[i];
        if (ids[i] < 0 || c.counts[s] <= step) continue;
        const int64_t at = c.positions[s] + step, size = c.cache.page_size, page = c.pages[c.page_starts[s] + at / size];
        active[kept] = s;
        ids[kept] = ids[i];
        positions[kept] = at;
        slots[kept] = page * size + at % size;
        kv_lens[kept] = at + 1;
        page_starts[kept] = c.page_starts[s];
        std::copy(recycled + i * hidden, recycled + (i + 1) * hidden, previous.data() + kept * hidden);
        ++kept;
      }
      if (kept == 0) return;
      active.resize(kept);
      const Batch batch{kept, query_starts.data(), kv_lens.data(), page_starts.data(), c.pages};
      int64_t* experts = c.expert_ids ? c.expert_ids + (step - 1) * b * decoder.routing.top_k : nullptr;
      decode(decoder,
             {kept, ids.data(), positions.data(), slots.data(), previous.data(), batch, c.cache, 0, normed.data(),
              unnormed.data(), experts},
             threads);
      recycled = (c.recycle_unnormed ? unnormed : normed).data();
    }
    const int64_t num = active.size();
    const Rows rows{normed.data(), hidden, nullptr, num};
    if (c.sampling) {
      draw_all(head, rows, *c.sampling, active.data(), step, logits, ids.data(), threads);
    } else {
      head_argmax(head, rows, ids.data(), threads);
      std::replace(ids.begin(), ids.begin() + num, int64_t{-1}, NOT_FINITE);
    }
    for (int64_t i = 0; i < num; ++i) c.drafts[active[i] * c.steps + step] = ids[i];
    if (std::find(ids.begin(), ids.begin() + num, NOT_FINITE) != ids.begin() + num) return;
  }
}

}  // namespace specdec
