// The target's forward over new tokens and drafts, then the tokens that each sequence emits, as one call. The rules are
// those of specdec.kernels.rules; only the rows that a rule comes to see are edited, cut and normalised.
#pragma once

#include "draft.h"
#include "residual.h"

namespace specdec {

enum Rule : int64_t { EXACT_MATCH = 0, TOKEN_REJECTION = 1, BLOCK_VERIFICATION = 2 };  // as in specdec.kernels.decisions
enum Stream : uint32_t { ACCEPT = 2, RESIDUAL = 3 };  // as in specdec.kernels.philox

struct Verification {
  Sampling rows;              // of each sequence's first row
  const int64_t* rules;       // [B]
  const int64_t* first_rows;  // [B] of `hidden`
  const int64_t* starts;      // [B + 1] into drafts
  const int64_t* prob_rows;   // [B] of draft_probs, or -1
  const int64_t* drafts;
  const float* draft_probs;   // [Q, prob_steps, V]
  int64_t prob_steps;
  const Edits* edits;         // [B], or null
  float *raw, *processed;     // [R, V], or null: the logits, as they are and after the requests' transforms
  int64_t* tokens;            // [R]; -1 where logits are not finite
  int64_t* num_tokens;        // [B]

  int64_t num_drafts(int64_t b) const { return starts[b + 1] - starts[b]; }
  int64_t first(int64_t b) const { return starts[b] + b; }  // of the R rows
  int64_t num_rows() const { return starts[rows.rows] + rows.rows; }
  bool only_argmax() const {
    for (int64_t b = 0; b < rows.rows; ++b)
      if (rules[b] != EXACT_MATCH || !rows.greedy(b)) return false;
    return !edits && !raw;
  }
};
SHARED_STRUCT(Verification, FIELD(rows) FIELD(rules) FIELD(first_rows) FIELD(starts) FIELD(prob_rows) FIELD(drafts)
              FIELD(draft_probs) FIELD(prob_steps) FIELD(edits) FIELD(raw) FIELD(processed) FIELD(tokens)
              FIELD(num_tokens))

// One sequence's rows before its rule; logits [k + 1, V], each `stride` apart, are changed.
class Decision {
 public:
  Decision(const Verification& v, int64_t b, float* logits, int64_t stride, int64_t size)
      : v_(v), b_(b), k_(v.num_drafts(b)), drafts_(v.drafts + v.starts[b]), logits_(logits), stride_(stride), size_(size),
        tokens_(v.tokens + v.first(b)) {}

  void run() {
    static thread_local Scratch scratch;
    switch (v_.rules[b_]) {
      case EXACT_MATCH: return match(scratch);
      case TOKEN_REJECTION: return reject_tokens(scratch);
      case BLOCK_VERIFICATION: return reject_block(scratch);
    }
  }

 private:
  struct Scratch {
    Truncation truncation;
    Choice choice;
    std::vector<double> sums, reached;
  };

  float* row(int64_t i) const { return logits_ + i * stride_; }

  // Row i after all that the request does to it.
  void transform(int64_t i, Scratch& s) const {
    if (v_.edits) v_.edits[b_].run(drafts_, i, row(i));
    s.truncation.cut(row(i), size_, v_.rows, b_);
    if (v_.processed) std::copy(row(i), row(i) + size_, v_.processed + (v_.first(b_) + i) * size_);
  }

  void match(Scratch& s) const {
    for (int64_t i = 0; i <= k_; ++i) {
      transform(i, s);
      tokens_[i] = s.choice.run(row(i), size_, v_.rows.scale(b_), v_.rows.greedy(b_), v_.rows.key(b_, i));
      if (i == k_ || tokens_[i] != drafts_[i]) return emit(i);
    }
  }

  void reject_tokens(Scratch& s) const {
    for (int64_t i = 0; i <= k_; ++i) {
      to_law(i, s);
      if (i < k_ && uniform(key(i, ACCEPT)) < std::min(ratio(i), 1.0)) continue;  // in this order NaN stays
      return recover(i, 1.0, s);
    }
  }

  // The last of the drafts that pass, so they are tried from the last one on; after r = 0 none can.
  void reject_block(Scratch& s) const {
    s.reached.assign(1, 1.0);
    int64_t accepted = 0;
    for (; accepted < k_ && s.reached[accepted] > 0.0; ++accepted) {
      to_law(accepted, s);
      s.reached.push_back(std::min(s.reached[accepted] * ratio(accepted), 1.0));
    }
    while (accepted > 0 && !(uniform(key(accepted - 1, ACCEPT)) < threshold(accepted, s))) --accepted;
    if (accepted == k_) to_law(k_, s);
    recover(accepted, s.reached[accepted], s);
  }

  double threshold(int64_t i, Scratch& s) const {
    const double r = s.reached[i];
    if (i == k_ || r == 0.0) return r;
    const double mass = law_after(i, r).mass(s.sums);
    return r == 1.0 ? 1.0 : mass / (mass + 1.0 - r);
  }

  void to_law(int64_t i, Scratch& s) const {
    transform(i, s);
    softmax(row(i), v_.rows.scale(b_), size_, row(i));
  }

  const float* draft_law(int64_t i) const {
    const int64_t at = v_.prob_rows[b_];
    return at < 0 ? nullptr : v_.draft_probs + (at * v_.prob_steps + i) * size_;
  }

  double ratio(int64_t i) const {
    const float* q = draft_law(i);
    return double(row(i)[drafts_[i]]) / (q ? double(q[drafts_[i]]) : 1.0);
  }

  NoiseKey key(int64_t i, Stream stream) const {
    const NoiseKey first = v_.rows.key(b_, 0);
    return {first.seed, uint32_t(first.position + i), first.position, stream};
  }

  // (r p_{i+1} - q_{i+1})+ after i accepted drafts; p_{k+1} after all.
  ResidualLaw law_after(int64_t i, double r) const {
    const float* q = i < k_ ? draft_law(i) : nullptr;
    return {row(i), r, q, i < k_ && !q ? drafts_[i] : -1, size_};
  }

  void recover(int64_t accepted, double r, Scratch& s) const {
    std::copy(drafts_, drafts_ + accepted, tokens_);
    tokens_[accepted] = sample(law_after(accepted, r), row(accepted), size_, uniform(key(accepted, RESIDUAL)), s.sums);
    emit(accepted);
  }

  void emit(int64_t accepted) const { v_.num_tokens[b_] = accepted + 1; }

  const Verification& v_;
  const int64_t b_, k_;
  const int64_t* drafts_;
  float* logits_;
  const int64_t stride_, size_;
  int64_t* tokens_;
};

// Greedy verification without the logits.
inline void match_argmaxes(const Matrix& head, const Rows& rows, const Verification& v, int threads) {
  head_argmax(head, rows, v.tokens, threads);
  for (int64_t b = 0; b < v.rows.rows; ++b) {
    const int64_t* choices = v.tokens + v.first(b);
    const int64_t* drafts = v.drafts + v.starts[b];
    v.num_tokens[b] = std::mismatch(drafts, drafts + v.num_drafts(b), choices).first - drafts + 1;
  }
}

// hidden [T, H]
inline void decide(const Matrix& head, const float* hidden, const Verification& v, int threads) {
  static thread_local std::vector<int64_t> index;
  static thread_local Buffer buffer;
  index.resize(v.num_rows());
  for (int64_t b = 0; b < v.rows.rows; ++b)
    std::iota(index.begin() + v.first(b), index.begin() + v.first(b) + v.num_drafts(b) + 1, v.first_rows[b]);
  const Rows rows{hidden, head.in, index.data(), int64_t(index.size())};
  if (v.only_argmax()) return match_argmaxes(head, rows, v, threads);
  const int64_t stride = padded(head.out), size = head.out;
  buffer.hold(rows.count * stride);
  float* logits = buffer.data();
  std::atomic<int64_t> next{0};
  parallel(threads, head.out * head.in, [&](const Team& team) {
    linear(head, rows, logits, stride, team);
    team.barrier();
    for (int64_t b; (b = next.fetch_add(1)) < v.rows.rows;) {
      float* first = logits + v.first(b) * stride;
      for (int64_t i = 0; v.raw && i <= v.num_drafts(b); ++i)
        std::copy(first + i * stride, first + i * stride + size, v.raw + (v.first(b) + i) * size);
      Decision(v, b, first, stride, size).run();
    }
  });
}

inline void verify(const Decoder& decoder, const Matrix& head, const Forward& forward, const Verification& v, int threads) {
  decode(decoder, forward, threads);
  if (v.rows.rows > 0) decide(head, forward.normed, v, threads);
}

}  // namespace specdec
