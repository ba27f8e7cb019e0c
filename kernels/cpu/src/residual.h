// Laws max(0, scale * p - q), in fp64 and in one order of additions: blocks of tokens, then their sums.
#pragma once

#include "sampling.h"

namespace specdec {

class ResidualLaw {
 public:
  // q null: 0. excluded: a token, or -1.
  ResidualLaw(const float* p, double scale, const float* q, int64_t excluded, int64_t size)
      : p_(p), q_(q), scale_(scale), excluded_(excluded), size_(size) {}

  double mass(std::vector<double>& sums) const {
    sums.resize((size_ + WIDTH - 1) / WIDTH);
    double total = 0.0;
    for (size_t b = 0; b < sums.size(); ++b) {
      double law[WIDTH];
      fill(b * WIDTH, law);
      double lanes[LANES] = {};
      for (int64_t i = 0; i < WIDTH; ++i) lanes[i % LANES] += law[i];
      total += sums[b] = std::accumulate(lanes, lanes + LANES, 0.0);
    }
    return total;
  }

  // The token at which the CDF exceeds uniform * mass: one that the law has, whatever rounding does. `sums` by `mass`.
  int64_t at(double target, const std::vector<double>& sums) const {
    double below = 0.0;
    int64_t block = -1, token = -1;
    for (int64_t b = 0; b < int64_t(sums.size()); ++b) {
      if (!(sums[b] > 0.0)) continue;
      if (block >= 0) below += sums[block];
      block = b;
      if (below + sums[b] > target) break;
    }
    if (block < 0) return -1;
    double law[WIDTH];
    fill(block * WIDTH, law);
    for (int64_t i = 0; i < WIDTH; ++i) {
      if (!(law[i] > 0.0)) continue;
      token = block * WIDTH + i;
      if ((below += law[i]) > target) break;
    }
    return token;
  }

 private:
  static constexpr int64_t WIDTH = 512;

  // The law of WIDTH tokens, 0 beyond the last.
  void fill(int64_t first, double* law) const {
    const int64_t count = std::min(WIDTH, size_ - first);
    const float* p = p_ + first;
    if (q_) {
      const float* q = q_ + first;
      for (int64_t i = 0; i < count; ++i) {
        const double left = scale_ * double(p[i]) - double(q[i]);
        law[i] = left < 0.0 ? 0.0 : left;  // NaN stays
      }
    } else {
      for (int64_t i = 0; i < count; ++i) law[i] = scale_ * double(p[i]);
    }
    std::fill(law + count, law + WIDTH, 0.0);
    if (first <= excluded_ && excluded_ < first + count) law[excluded_ - first] = 0.0;
  }

  const float *p_, *q_;
  double scale_;
  int64_t excluded_, size_;
};

struct Residuals {
  int64_t num, size;
  const float *p, *q;    // [rows, size]; q may be null
  const double* scales;  // [num]
  const int64_t* ints;   // p_rows, q_rows, excluded: [num] each

  const float* p_row(int64_t i) const { return p + ints[i] * size; }
  ResidualLaw law(int64_t i) const {
    const int64_t q_row = ints[num + i];
    return {p_row(i), scales[i], q && q_row >= 0 ? q + q_row * size : nullptr, ints[2 * num + i], size};
  }
};
SHARED_STRUCT(Residuals, FIELD(num) FIELD(size) FIELD(p) FIELD(q) FIELD(scales) FIELD(ints))

// A token of the law, or of p [size] where it has no mass; -1 where the sum is not finite.
inline int64_t sample(ResidualLaw law, const float* p, int64_t size, double uniform, std::vector<double>& sums) {
  double mass = law.mass(sums);
  if (mass == 0.0) {
    law = {p, 1.0, nullptr, -1, size};
    mass = law.mass(sums);
  }
  return std::isfinite(mass) ? law.at(uniform * mass, sums) : -1;
}

}  // namespace specdec
