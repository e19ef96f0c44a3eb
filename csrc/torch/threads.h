// Work in parts, on torch's threads.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "parts.h"

namespace fused_sgd {

// How many threads so much work is worth, counted in elements that are in a cache. Below 2^15 of them a second thread
// costs more than it gives.
inline int64_t threads_for(int64_t work) {
  constexpr int64_t kAThread = 1 << 14;
  return work < 2 * kAThread ? 1 : std::min<int64_t>(work / kAThread, at::get_num_threads());
}

// Calls run(Parts) until all of `count` parts are done: on as many threads at the same time, of which the calling one
// is the first, or on fewer, which then have several parts each. Only OpenMP's threads are sure to run at the same
// time.
template <class F>
void in_parts(int64_t count, const F& run) {
#if AT_PARALLEL_OPENMP
  if (count > 1) return at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) { run({begin, end, count}); });
#endif
  run({0, count, count});
}

// Where the threads of one in_parts() wait for each other, as often as they like; made with the same count. None of
// them may leave without having come for its parts: the others would wait for ever.
class Meeting {
 public:
  explicit Meeting(int64_t count) : count_(count), missing_(count) {}

  // Returns when all parts have come. The last to come runs last(), which must not throw, before the others go on.
  template <class F>
  void wait(const Parts& parts, const F& last) {
    const uint32_t round = round_.load(std::memory_order_relaxed);
    if (come(parts, last)) return;
    for (int spins = 0; spins < kSpins; ++spins) {
      if (round_.load(std::memory_order_acquire) != round) return;
      pause();
    }
    round_.wait(round, std::memory_order_acquire);  // asleep: another may have no core
  }
  void wait(const Parts& parts) {
    wait(parts, [] {});
  }
  // For a thread that leaves.
  void come(const Parts& parts) {
    come(parts, [] {});
  }

 private:
  template <class F>
  bool come(const Parts& parts, const F& last) {
    const int64_t here = parts.end - parts.begin;
    if (missing_.fetch_sub(here, std::memory_order_acq_rel) != here) return false;
    last();
    missing_.store(count_, std::memory_order_relaxed);
    round_.fetch_add(1, std::memory_order_release);
    round_.notify_all();
    return true;
  }
  // Leaves a core to its other thread, if it has two.
  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  static constexpr int kSpins = 1000;  // what is waited for is mostly near
  const int64_t count_;
  std::atomic<int64_t> missing_;
  std::atomic<uint32_t> round_ = 0;
};

}  // namespace fused_sgd
