// Work in parts, on torch's threads.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <thread>
#include <utility>

namespace fused_sgd {

// Parts [begin, end) of `count` equal ones.
struct Parts {
  int64_t begin = 0, end = 1, count = 1;

  // What they are of [from, to).
  template <class T>
  std::pair<T, T> of(T from, T to) const {
    const auto at = [&](int64_t part) { return static_cast<T>(from + (to - from) * part / count); };
    return {at(begin), at(end)};
  }
};

// How many threads so much work is worth, counted in elements that are in a cache. Below 2^15 of them a second thread
// costs more than it gives.
inline int64_t threads_for(int64_t work) {
  constexpr int64_t kAThread = 1 << 14;
  return work < 2 * kAThread ? 1 : std::clamp<int64_t>(work / kAThread, 1, at::get_num_threads());
}

// run(Parts), on up to `count` threads at the same time; this is one of them.
template <class F>
void in_parts(int64_t count, const F& run) {
  if (count == 1) return run(Parts());
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) { run(Parts{begin, end, count}); });
}

// Where threads wait for each other within one in_parts(), whose parts do run at the same time: at::parallel_for()
// gives each of OpenMP's threads one piece, and where there is no OpenMP, all to this one.
class Meeting {
 public:
  explicit Meeting(int64_t count) : count_(count), missing_(count) {}

  // Returns when all parts are here. The last one runs `last()`, and the others go on when that is done.
  template <class F>
  void wait(const Parts& parts, const F& last) {
    const uint32_t round = round_.load(std::memory_order_relaxed);
    if (come(parts, last)) return;
    for (int spins = 0; round_.load(std::memory_order_acquire) == round; ++spins) {
      if (spins < kSpins) {
        pause();
      } else {
        std::this_thread::yield();  // what is waited for may have no core
      }
    }
  }
  void wait(const Parts& parts) {
    wait(parts, [] {});
  }
  // Does not wait.
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
    return true;
  }
  // Leaves a core to its other thread, if it has two.
  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  static constexpr int kSpins = 1000;
  const int64_t count_;
  std::atomic<int64_t> missing_;
  std::atomic<uint32_t> round_ = 0;
};

}  // namespace fused_sgd
