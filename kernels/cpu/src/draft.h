// The MTP layer's drafts as one call: the committed pairs, then head, decoder, head, ... without a word from the host
// in between.
#pragma once

#include "decoder.h"
#include "edits.h"
#include "truncate.h"

namespace specdec {

constexpr int64_t NOT_DRAFTED = -1, NOT_FINITE = -2;  // as in specdec.kernels.decisions

struct DraftSampling {
  Sampling rows;                 // of the first step
  const double* min_confidence;  // [B]
  const int64_t* prob_rows;      // [B] rows of probs, or -1
  float* probs;                  // [Q, prob_steps, V], or null where every prob_row is -1
  int64_t prob_steps;
  const Edits* edits;            // [B], or null
};
SHARED_STRUCT(DraftSampling, FIELD(rows) FIELD(min_confidence) FIELD(prob_rows) FIELD(probs) FIELD(prob_steps)
              FIELD(edits))

struct Chain {
  Forward pairs;  // normed and unnormed are left out
  int64_t steps;
  const int64_t* counts;  // [B], from 0 to `steps`: the most drafts of each sequence
  int32_t recycle_unnormed;
  const DraftSampling* sampling;  // null: every draft is an argmax
  int64_t* drafts;                // [B, steps]
};
SHARED_STRUCT(Chain, FIELD(pairs) FIELD(steps) FIELD(counts) FIELD(recycle_unnormed) FIELD(sampling) FIELD(drafts))

class ChainRun {
 public:
  ChainRun(const Decoder& decoder, const Matrix& head, const Chain& chain, int threads)
      : decoder_(decoder), head_(head), c_(chain), threads_(threads), b_(chain.pairs.batch.num_sequences),
        m_(memory(chain.pairs.rows, b_, decoder.hidden)) {}

  void run() {
    std::fill(c_.drafts, c_.drafts + b_ * c_.steps, NOT_DRAFTED);
    Forward pairs = c_.pairs;
    pairs.normed = m_.normed.data();
    pairs.unnormed = m_.unnormed.data();
    decode(decoder_, pairs, threads_);
    start();
    for (int64_t step = 0; !m_.active.empty(); ++step) {
      draw(step);
      const int64_t num = m_.active.size();
      for (int64_t i = 0; i < num; ++i) c_.drafts[m_.active[i] * c_.steps + step] = m_.ids[i];
      if (std::find(m_.ids.begin(), m_.ids.begin() + num, NOT_FINITE) != m_.ids.begin() + num) return;
      advance(step + 1);
    }
  }

 private:
  // Kept between calls. active: the sequences that still draft; ids: their last drafts; row i of the outputs is theirs.
  struct Memory {
    Buffer previous, normed, unnormed, logits;
    std::vector<int64_t> active, ids, query_starts, kv_lens, page_starts;
    std::vector<const float*> previous_rows;
  };

  static Memory& memory(int64_t rows, int64_t b, int64_t hidden) {
    static thread_local Memory m;
    m.normed.hold(rows * hidden);
    m.unnormed.hold(rows * hidden);
    m.previous.hold(b * hidden);
    m.previous_rows.resize(b);
    for (int64_t i = 0; i < b; ++i) m.previous_rows[i] = m.previous.data() + i * hidden;
    m.active.clear();
    for (auto* v : {&m.ids, &m.kv_lens, &m.page_starts}) v->resize(b);
    m.query_starts.resize(b + 1);
    std::iota(m.query_starts.begin(), m.query_starts.end(), 0);
    return m;
  }

  const float* recycled() const { return (c_.recycle_unnormed ? m_.unnormed : m_.normed).data(); }

  // The last rows of the sequences that draft move to the front.
  void start() {
    for (int64_t s = 0; s < b_; ++s) {
      if (c_.counts[s] == 0) continue;
      const int64_t from = (c_.pairs.batch.query_starts[s + 1] - 1) * decoder_.hidden, to = m_.active.size() * decoder_.hidden;
      for (Buffer* rows : {&m_.normed, &m_.unnormed})
        if (to != from) std::copy(rows->data() + from, rows->data() + from + decoder_.hidden, rows->data() + to);
      m_.active.push_back(s);
    }
  }

  // One more row of each sequence that drafts on: its last draft after the output that this came from.
  void advance(int64_t step) {
    const int64_t hidden = decoder_.hidden;
    int64_t kept = 0;
    for (size_t i = 0; i < m_.active.size(); ++i) {
      const int64_t s = m_.active[i];
      if (m_.ids[i] < 0 || c_.counts[s] <= step) continue;
      std::copy(recycled() + i * hidden, recycled() + (i + 1) * hidden, m_.previous.data() + kept * hidden);
      m_.active[kept] = s;
      m_.ids[kept] = m_.ids[i];
      m_.kv_lens[kept] = c_.pairs.batch.kv_lens[s] + step;
      m_.page_starts[kept] = c_.pairs.batch.page_starts[s];
      ++kept;
    }
    m_.active.resize(kept);
    if (kept == 0) return;
    const Batch batch{kept, m_.query_starts.data(), m_.kv_lens.data(), m_.page_starts.data(), c_.pairs.batch.pages};
    int64_t* experts = c_.pairs.expert_ids;
    if (experts) experts += (c_.pairs.rows + (step - 1) * b_) * decoder_.routing.top_k;
    decode(decoder_,
           {kept, m_.ids.data(), m_.previous_rows.data(), batch, c_.pairs.cache, 0, m_.normed.data(), m_.unnormed.data(), experts},
           threads_);
  }

  void draw(int64_t step) {
    const int64_t num = m_.active.size(), stride = padded(head_.out);
    const Rows rows{m_.normed.data(), decoder_.hidden, nullptr, num};
    if (!c_.sampling) {
      head_argmax(head_, rows, m_.ids.data(), threads_);
      std::replace(m_.ids.begin(), m_.ids.begin() + num, int64_t{-1}, NOT_FINITE);
      return;
    }
    m_.logits.hold(num * stride);
    parallel(threads_, head_.out * head_.in, [&](const Team& team) {
      linear(head_, rows, m_.logits.data(), stride, team);
      team.barrier();
      const Range mine = team.share(num);
      for (int64_t i = mine.begin; i < mine.end; ++i) m_.ids[i] = draw(m_.active[i], step, m_.logits.data() + i * stride);
    });
  }

  // Draft `step` of sequence `b` from its logits, which it changes.
  int64_t draw(int64_t b, int64_t step, float* logits) const {
    static thread_local Truncation truncation;
    static thread_local Choice choice;
    const DraftSampling& s = *c_.sampling;
    const float scale = s.rows.scale(b);
    if (s.edits) s.edits[b].run(c_.drafts + b * c_.steps, step, logits);
    truncation.cut(logits, head_.out, s.rows, b);
    float* probs = s.prob_rows[b] >= 0 ? s.probs + (s.prob_rows[b] * s.prob_steps + step) * head_.out : nullptr;
    if (probs || s.min_confidence[b] > 0.0)
      if (softmax(logits, scale, head_.out, probs) < s.min_confidence[b]) return NOT_DRAFTED;
    const int64_t id = choice.run(logits, head_.out, scale, s.rows.greedy(b), s.rows.key(b, step));
    return id < 0 ? NOT_FINITE : id;
  }

  const Decoder& decoder_;
  const Matrix& head_;
  const Chain& c_;
  const int threads_;
  const int64_t b_;
  Memory& m_;
};

inline void draft_chain(const Decoder& decoder, const Matrix& head, const Chain& chain, int threads) {
  ChainRun(decoder, head, chain, threads).run();
}

}  // namespace specdec
