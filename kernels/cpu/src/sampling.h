// From hidden states or logits to tokens.
#pragma once

#include <cfloat>

#include "noise.h"
#include "ops.h"

namespace specdec {

constexpr int64_t HEAD_BLOCKS = 32;  // blocks of the vocabulary scored at a time

struct Best {
  float value = -INFINITY;
  int64_t id = -1;
  bool finite = true;

  // The lowest id among equals, as long as ids come in ascending order or from other shares of them.
  void offer(float v, int64_t i) {
    if (v > value || (v == value && i < id)) *this = {v, i, finite};
  }
};

// The best of scores[0 .. size), whose first id is `first`.
inline void scan(const float* scores, int64_t size, int64_t first, Best& best) {
  V top = set1(-INFINITY), unsound = set1(0.0f);
  for_vectors(size, [&](int64_t i, int n) {
    V s = load_n(scores + i, n, -INFINITY);
    top = max(s, top);
    V kept = n == LANES ? s : load_n(scores + i, n, 0.0f);
    unsound = add(unsound, sub(kept, kept));  // NaN where a score is not finite
  });
  if (reduce_add(unsound) != 0.0f) best.finite = false;
  const float value = reduce_max(top);
  if (value < best.value) return;
  for (int64_t i = 0; i < size; ++i)
    if (scores[i] == value) return best.offer(value, first + i);
}

// One thread's share of the vocabulary: the best of each row so far.
inline void score_head(const Matrix& head, const Rows& rows, Best* best, const Team& team) {
  const Range mine = team.share(head.blocks());
  std::vector<float> logits(rows.count * HEAD_BLOCKS * LANES);
  for (int64_t b = mine.begin; b < mine.end; b += HEAD_BLOCKS) {
    const int64_t end = std::min(mine.end, b + HEAD_BLOCKS), size = std::min(head.out, end * LANES) - b * LANES;
    gemm(head, b, end, rows, logits.data(), HEAD_BLOCKS * LANES);
    for (int64_t r = 0; r < rows.count; ++r) scan(logits.data() + r * HEAD_BLOCKS * LANES, size, b * LANES, best[r]);
  }
}

// The best output's id per row, -1 where one is not finite.
inline void head_argmax(const Matrix& head, const Rows& rows, int64_t* ids, int threads) {
  std::vector<Best> best(threads * rows.count);
  parallel(threads, head.out * head.in,
           [&](const Team& team) { score_head(head, rows, best.data() + team.thread * rows.count, team); });
  for (int64_t r = 0; r < rows.count; ++r) {
    Best all = best[r];
    for (int t = 1; t < threads; ++t) {
      const Best& other = best[t * rows.count + r];
      all.finite &= other.finite;
      all.offer(other.value, other.id);
    }
    ids[r] = all.finite ? all.id : -1;
  }
}

// Adds exp((x - top) * scale) to the sum, and writes it to `weights` where there are any.
inline void weigh(const float* x, int64_t size, float top, float scale, float* weights, Doubles& sum) {
  Doubles chains = sum;
  for_vectors(size, [&](int64_t i, int n) {
    const V w = exp(mul(sub(load_n(x + i, n, -INFINITY), set1(top)), set1(scale)));
    chains.add(w);
    if (weights) store_n(weights + i, w, n);
  });
  sum = chains;
}

// y = softmax(x * scale), or nothing where y is null; returns the largest probability.
inline float softmax(const float* x, float scale, int64_t size, float* y) {
  V top = set1(-INFINITY);
  for_vectors(size, [&](int64_t i, int n) { top = max(load_n(x + i, n, -INFINITY), top); });
  Doubles sum;
  weigh(x, size, reduce_max(top), scale, y, sum);
  const float total = float(sum.total());
  if (y) for_vectors(size, [&](int64_t i, int n) { store_n(y + i, div(load_n(y + i, n), set1(total)), n); });
  return 1.0f / total;
}

// How rows of logits become tokens.
struct Sampling {
  int64_t rows;
  const double* reals;    // scales, top_p, min_p: [rows] each
  const int64_t* ints;    // top_k, streams, positions, starts: [rows] each
  const uint64_t* seeds;  // [rows]

  float scale(int64_t r) const { return float(reals[r]); }
  double top_p(int64_t r) const { return reals[rows + r]; }
  double min_p(int64_t r) const { return reals[2 * rows + r]; }
  int64_t top_k(int64_t r) const { return ints[r]; }
  bool cuts(int64_t r) const { return top_k(r) > 0 || top_p(r) < 1.0 || min_p(r) > 0.0; }
  bool greedy(int64_t r) const { return ints[rows + r] < 0; }
  NoiseKey key(int64_t r, int64_t advance) const {
    return {seeds[r], uint32_t(ints[2 * rows + r] + advance), uint32_t(ints[3 * rows + r]), uint32_t(ints[rows + r])};
  }
};
SHARED_STRUCT(Sampling, FIELD(rows) FIELD(reals) FIELD(ints) FIELD(seeds))

// The largest logit of each block; returns the largest of all, NaN where one is NaN or infinite, or none is finite.
inline float survey(const float* x, int64_t size, std::vector<float>& tops) {
  tops.resize((size + BLOCK - 1) / BLOCK);
  const V lowest = set1(-INFINITY), least = set1(-FLT_MAX);
  V top = lowest, unsound = set1(0.0f);
  for (int64_t first = 0; first < size; first += BLOCK) {
    V block = lowest;
    for_vectors(std::min(BLOCK, size - first), [&](int64_t i, int n) {
      const V v = load_n(x + first + i, n, -INFINITY), finite = max(least, v);
      block = max(v, block);
      unsound = add(unsound, sub(finite, finite));
    });
    tops[first / BLOCK] = reduce_max(block);
    top = max(block, top);
  }
  const float all = reduce_max(top);
  return reduce_add(unsound) == 0.0f && all >= -FLT_MAX ? all : NAN;
}

// G <= -log(1 - u) for every word's noise and u, as computed: to within a part of this.
constexpr double NOISE_ERROR = 1e-4;

// The first of the largest logits, or of the largest sums of scaled logits and noise. -1 for a row of NaN.
class Choice {
 public:
  int64_t run(const float* logits, int64_t size, float scale, bool greedy, const NoiseKey& key) {
    const float top = survey(logits, size, tops_);
    if (std::isnan(top)) return -1;
    const int64_t block = std::find(tops_.begin(), tops_.end(), top) - tops_.begin();
    const int64_t likely = std::find(logits + block * BLOCK, logits + size, top) - logits;
    if (greedy) return likely;
    Candidates candidates(logits, size, scale);
    candidates.push(likely, sixteen_calls(block * BLOCK, key).word(likely % BLOCK));
    candidates.score();
    for (int64_t b = 0; b < int64_t(tops_.size()); ++b) {
      // How much noise the largest logit needs, less what rounding may hide. G <= -log(1 - u), so a word makes so
      // much only if (1 - u) * e^needed <= 1; and 1 - u >= 2^-33.
      const double best = candidates.best.value;
      const double needed = best - double(tops_[b]) * scale - NOISE_ERROR - 1e-6 * std::fabs(best);
      if (needed > 22.9) continue;
      const double least = 0x1p32 - 1.0 - 0x1p32 * std::exp(-needed);
      candidates.add(b * BLOCK, sixteen_calls(b * BLOCK, key), least > 0.0 ? uint32_t(least) : 0);
    }
    candidates.score();
    return candidates.best.id;
  }

 private:
  // Tokens whose noise is worth its two logarithms, taken a vector at a time.
  struct Candidates {
    const float* logits;
    int64_t size;
    float scale;
    Best best;
    int count = 0;
    int64_t ids[LANES];
    uint32_t words[LANES] = {};

    Candidates(const float* logits, int64_t size, float scale) : logits(logits), size(size), scale(scale) {}

    // Those of a block whose words are at least so large.
    void add(int64_t first, const CallWords& calls, uint32_t least) {
      if (!calls.any_at_least(least)) return;
      for (int w = 0; w < 4; ++w) {
        uint32_t all[LANES];
        store(all, calls.c[w]);
        for (int i = 0; i < LANES; ++i) {
          const int64_t id = first + 4 * i + w;
          if (all[i] >= least && id < size) push(id, all[i]);
        }
      }
    }

    void push(int64_t id, uint32_t word) {
      ids[count] = id;
      words[count++] = word;
      if (count == LANES) score();
    }

    void score() {
      if (count == 0) return;
      float noise[LANES];
      store(noise, sub(set1(0.0f), log(exponential(words))));
      for (int i = 0; i < count; ++i) best.offer(std::fma(logits[ids[i]], scale, noise[i]), ids[i]);
      count = 0;
    }
  };

  std::vector<float> tops_;  // of each block
};

}  // namespace specdec
