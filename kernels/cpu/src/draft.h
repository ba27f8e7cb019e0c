// A chain of greedy drafts as one call: head, decoder, head, ... without a word from the host in between.
#pragma once

#include "decoder.h"
#include "sampling.h"

namespace specdec {

// Mirrored by specdec.kernels.cpu.native.Chain.
struct Chain {
  int64_t num_sequences;
  const int64_t* counts;       // [B] >= 1, descending: drafts of each sequence
  const int64_t* positions;    // [B] of the rows that `normed` is the output of
  const int64_t* page_starts;  // [B + 1] into pages
  const int64_t* pages;
  Cache cache;
  const float *normed, *recycled;  // [B, hidden]: for the head, and what the next row takes
  int32_t recycle_unnormed;
  int64_t* drafts;      // [B, counts[0]]
  int64_t* expert_ids;  // [counts[0] - 1, 1, B, top_k], or null
};

inline void draft_chain(const Decoder& decoder, const Matrix& head, const Chain& c, int threads) {
  const int64_t b = c.num_sequences, steps = c.counts[0], hidden = decoder.hidden;
  std::fill(c.drafts, c.drafts + b * steps, -1);
  std::vector<float> normed(c.normed, c.normed + b * hidden), recycled(c.recycled, c.recycled + b * hidden);
  std::vector<float> next_normed(b * hidden), next_unnormed(b * hidden);
  std::vector<int64_t> ids(b), positions(b), slots(b), query_starts(b + 1), kv_lens(b);
  std::iota(query_starts.begin(), query_starts.end(), 0);
  int64_t active = b;
  for (int64_t step = 0;; ++step) {
    while (active > 0 && c.counts[active - 1] <= step) --active;
    if (active == 0) return;
    if (step > 0) {
      for (int64_t s = 0; s < active; ++s) {
        const int64_t at = positions[s] = c.positions[s] + step, page = c.pages[c.page_starts[s] + at / c.cache.page_size];
        slots[s] = page * c.cache.page_size + at % c.cache.page_size;
        kv_lens[s] = at + 1;
      }
      const Batch batch{active, query_starts.data(), kv_lens.data(), c.page_starts, c.pages};
      int64_t* experts = c.expert_ids ? c.expert_ids + (step - 1) * b * decoder.routing.top_k : nullptr;
      decode(decoder,
             {active, ids.data(), positions.data(), slots.data(), recycled.data(), batch, c.cache, 0, next_normed.data(),
              next_unnormed.data(), experts},
             threads);
      normed.swap(next_normed);
      recycled = c.recycle_unnormed ? next_unnormed : normed;
    }
    head_argmax(head, {normed.data(), hidden, nullptr, active}, ids.data(), threads);
    for (int64_t s = 0; s < active; ++s) c.drafts[s * steps + step] = ids[s];
    if (*std::min_element(ids.begin(), ids.begin() + active) < 0) return;
  }
}

}  // namespace specdec
