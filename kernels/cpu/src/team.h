// The threads of one parallel region, and where they wait for each other.
#pragma once

#include <omp.h>

#include <atomic>
#include <thread>

#include "simd.h"

namespace specdec {

struct Range {
  int64_t begin, end;
};

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// A forward has some hundred barriers, so they must be cheap; and a thread that waits for one which the system
// has put aside for another process must not hold on to its core.
class Barrier {
 public:
  void wait(int size) {
    const int generation = generation_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      generation_.store(generation + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; generation_.load(std::memory_order_acquire) == generation; ++spins) {
      if (spins < SPINS) {
        pause();
      } else {
        std::this_thread::yield();
      }
    }
  }

 private:
  static constexpr int SPINS = 2000;
  std::atomic<int> arrived_{0}, generation_{0};
};

// Every phase of an operation is written for one thread of a team.
struct Team {
  int thread, size;
  Barrier* shared;

  static Team alone() { return {0, 1, nullptr}; }
  Range share(int64_t total) const { return {total * thread / size, total * (thread + 1) / size}; }
  void barrier() const {
    if (size > 1) shared->wait(size);
  }
};

constexpr int64_t LEAST_SHARED_WORK = 1 << 15;  // below it a parallel region costs more than it saves

// body(team) on every thread; on one alone where there is little to do.
template <class F>
void parallel(int threads, int64_t work, F body) {
  if (threads == 1 || work < LEAST_SHARED_WORK) return body(Team::alone());
  Barrier barrier;
#pragma omp parallel num_threads(threads)
  body(Team{omp_get_thread_num(), omp_get_num_threads(), &barrier});
}

template <class F>
void parallel_rows(int64_t rows, int64_t work, int threads, F body) {
  parallel(threads, work, [&](const Team& team) {
    const Range mine = team.share(rows);
    for (int64_t r = mine.begin; r < mine.end; ++r) body(r);
  });
}

}  // namespace specdec
