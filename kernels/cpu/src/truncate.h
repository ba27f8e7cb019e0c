// Top-k, top-p and min-p on a row of logits. Each keeps a beginning of the descending order (the lowest ids first
// among equals), so each is a point where the row is cut; no order is ever made beyond what finds that point.
#pragma once

#include <functional>

#include "sampling.h"

namespace specdec {

// Logits above `value` stay, and of those equal to it the ones up to id `last`.
struct Cut {
  float value;
  int64_t last;
};

class Truncation {
 public:
  // What row r of the sampling cuts, if it cuts anything.
  void cut(float* x, int64_t size, const Sampling& s, int64_t r) {
    if (s.cuts(r)) run(x, size, s.scale(r), s.top_k(r), s.top_p(r), s.min_p(r));
  }

  // In place; all NaN where a logit is NaN or infinite, or none is finite.
  void run(float* x, int64_t size, float scale, int64_t top_k, double top_p, double min_p) {
    const float top = survey(x, size, tops_);
    if (std::isnan(top)) return std::fill(x, x + size, NAN);
    Cut cut{-FLT_MAX, size};
    if (0 < top_k && top_k < size) apply(x, size, cut = {kth_largest(x, size, top_k), size});
    const float floor = min_p > 0.0 ? std::min(top, at_least(top + std::log(min_p) / scale)) : -FLT_MAX;
    if (top_p < 1.0) {
      apply(x, size, top_p_cut(x, size, top, scale, top_p, cut.value, floor));
    } else if (floor > cut.value) {
      apply(x, size, {floor, size});
    }
  }

 private:
  static constexpr uint32_t BUCKETS = 4096, FEW = 64;

  static float at_least(double value) {
    const float nearest = float(value);
    return nearest < value ? std::nextafter(nearest, INFINITY) : nearest;
  }

  // In the order of the floats; 0 and -0 are the same.
  static uint32_t ordinal(float value) {
    value += 0.0f;
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits ^ (uint32_t(int32_t(bits) >> 31) | 0x80000000u);
  }

  static void apply(float* x, int64_t size, const Cut& cut) {
    const int64_t tied = std::min(size, cut.last + 1);
    for (int64_t i = 0; i < tied; ++i) x[i] = x[i] >= cut.value ? x[i] : -INFINITY;
    for (int64_t i = tied; i < size; ++i) x[i] = x[i] > cut.value ? x[i] : -INFINITY;
  }

  // As many blocks as have a largest logit of at least some value, so many logits are: no lower ones need be seen.
  float kth_largest(const float* x, int64_t size, int64_t k) {
    float floor = -FLT_MAX;
    if (k <= int64_t(tops_.size())) {
      copy_ = tops_;
      std::nth_element(copy_.begin(), copy_.begin() + (k - 1), copy_.end(), std::greater<float>());
      floor = std::max(floor, copy_[k - 1]);
    }
    collect(x, size, floor);
    return crossing(x, double(k), [](int64_t) { return 1.0; }).value;
  }

  // What lies below `floor` goes in any case, and what lies below `least` has gone.
  Cut top_p_cut(const float* x, int64_t size, float top, float scale, double top_p, float least, float floor) {
    weights_.resize(size);
    Doubles sum;
    for (int64_t first = 0; first < size; first += BLOCK)
      if (tops_[first / BLOCK] >= least)
        weigh(x + first, std::min(BLOCK, size - first), top, scale, weights_.data() + first, sum);
    const double total = sum.total();
    // `size` tokens that far down weigh less than what top-p drops, even with 1 % off for rounding
    const double far = std::log(double(size) / ((1.0 - top_p) * total)) + 0.01;
    collect(x, size, std::max({least, floor, std::nextafter(float(top - far / scale), -INFINITY)}));
    return crossing(x, top_p * total, [&](int64_t id) { return double(weights_[id]); });
  }

  // The ids of the logits from `floor` on, ascending.
  void collect(const float* x, int64_t size, float floor) {
    if (int64_t(ids_.size()) < size + LANES) ids_.resize(size + LANES);
    num_ids_ = 0;
    for (int64_t b = 0; b < int64_t(tops_.size()); ++b) {
      if (tops_[b] < floor) continue;
      const int64_t first = b * BLOCK;
      for_vectors(std::min(BLOCK, size - first), [&](int64_t i, int n) {
        num_ids_ += ids_at_least(load_n(x + first + i, n, -INFINITY), floor, int32_t(first + i), ids_.data() + num_ids_);
      });
    }
  }

  // Where the weight of the collected ids, in descending order of their logits, reaches `target`; else the last one.
  template <class Weight>
  Cut crossing(const float* x, double target, Weight weight) {
    double above = 0.0;  // the weight of all that lie above those still in question
    int32_t* ids = ids_.data();
    for (;;) {
      uint32_t low = UINT32_MAX, high = 0;
      for (int64_t i = 0; i < num_ids_; ++i) {
        const uint32_t at = ordinal(x[ids[i]]);
        low = std::min(low, at);
        high = std::max(high, at);
      }
      if (low == high) break;
      if (num_ids_ <= FEW) {
        std::stable_sort(ids, ids + num_ids_, [&](int32_t a, int32_t b) { return x[a] > x[b]; });
        break;
      }
      int shift = 0;
      while (((high - low) >> shift) >= std::min(int64_t(BUCKETS), num_ids_)) ++shift;
      sums_.assign(((high - low) >> shift) + 1, 0.0);
      const auto bucket = [&](int32_t id) { return (high - ordinal(x[id])) >> shift; };
      for (int64_t i = 0; i < num_ids_; ++i) sums_[bucket(ids[i])] += weight(ids[i]);
      uint32_t crossed = 0;
      while (crossed + 1 < sums_.size() && above + sums_[crossed] < target) above += sums_[crossed++];
      int64_t count = 0;
      for (int64_t i = 0; i < num_ids_; ++i) {
        const int32_t id = ids[i];
        ids[count] = id;
        count += bucket(id) == crossed;
      }
      num_ids_ = count;
    }
    for (int64_t i = 0; i < num_ids_; ++i) {
      above += weight(ids[i]);
      if (above >= target) return {x[ids[i]], ids[i]};
    }
    const int32_t last = ids[num_ids_ - 1];
    return {x[last], last};
  }

  std::vector<float> tops_, copy_, weights_;  // the largest logit of each block; and a copy; exp of each logit
  std::vector<int32_t> ids_;  // the first num_ids_ of them
  int64_t num_ids_ = 0;
  std::vector<double> sums_;
};

}  // namespace specdec
