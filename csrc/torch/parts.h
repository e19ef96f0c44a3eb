// Parts of work, for threads.
#pragma once

#include <cstdint>
#include <utility>

namespace fused_sgd {

// Parts [begin, end) of `count` equal ones.
struct Parts {
  int64_t begin, end, count;

  // What they are of [from, to).
  template <class T>
  std::pair<T, T> of(T from, T to) const {
    const auto at = [&](int64_t part) { return static_cast<T>(from + static_cast<int64_t>(to - from) * part / count); };
    return {at(begin), at(end)};
  }
};

}  // namespace fused_sgd
