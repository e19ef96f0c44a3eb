// How elements come to a loop and go from it: what of a storage format a loop can use, arrays that elements are staged
// in, and random bits. Included by elements.h.
#pragma once

#include <algorithm>

#include "../core/formats.h"

namespace fused_sgd::cpu {
namespace {

template <class F>
inline constexpr bool kInPairs = requires(const F& format, float (&x)[2]) { format.load_pair(0, x); };
// Whether elements are converted together, on their way to and from an array.
template <class F>
inline constexpr bool kStaged = requires { requires F::kConvertsMany; };

// How a look at many elements can tell that none is large; and whether finite ones are loaded or stored faster.
template <class F>
inline constexpr bool kShowsNumbers = requires(const F& format) { format.numbers(0); };
template <class F>
inline constexpr bool kTellsLarge =
    kShowsNumbers<F> || requires(const F& format) { format.template are_below<64>(2.0f, 0); };
template <class F, class... Others>
inline constexpr bool kAlike = requires(const F& format, const Others&... others) {
  are_below<64>(2.0f, format.numbers(0), others.numbers(0)...);
};
template <class F>
inline constexpr bool kLoadsFinite = requires { typename F::LoadsFinite; };
template <class F>
inline constexpr bool kStoresFinite = requires { typename F::StoresFinite; };

// Elements from `first` on, in an array.
template <class T>
struct Array {
  T* x;
  int64_t first;
  FSGD_INLINE T load(int64_t i) const { return x[i - first]; }
  FSGD_INLINE T store(int64_t i, T value) const { return x[i - first] = value; }
};

// n elements from `first` on, an even number: those of even numbers before those of odd ones.
template <int n>
struct PairedArray {
  float* x;
  int64_t first;
  // Of two neighbours the first. (x[(i - first) / 2] hides from compilers that the address grows evenly with i.)
  FSGD_INLINE float* pair(int64_t i) const {
    constexpr int64_t kBytes = sizeof(float) / 2;
    return reinterpret_cast<float*>(reinterpret_cast<char*>(x) + (i - first) * kBytes);
  }
  FSGD_INLINE void load_pair(int64_t i, float (&two)[2]) const {
    two[0] = pair(i)[0];
    two[1] = pair(i)[n / 2];
  }
  FSGD_INLINE void store_pair(int64_t i, const float (&two)[2]) const {
    pair(i)[0] = two[0];
    pair(i)[n / 2] = two[1];
  }
};

// A format to store in, with the random bits of elements from `first` on.
template <class F, class Draw>
struct Drawn {
  F format;
  const Draw* draw;
  int64_t first;
  FSGD_INLINE Drawn(const F& its_format, const Draw* its_draw, int64_t i)
      : format(its_format), draw(its_draw), first(i) {}
  FSGD_INLINE float store(int64_t i, float x) const { return format.store(i, x, draw[i - first]); }
  FSGD_INLINE void store_pair(int64_t i, float (&x)[2]) const
    requires requires(uint32_t draws) { format.store_pair(i, x, draws); }
  {
    uint32_t draws;
    __builtin_memcpy(&draws, draw + (i - first), sizeof(draws));
    format.store_pair(i, x, draws);
  }
};

// The random bits of a format's elements before `end`, drawn for many at once. They are asked for in their order.
template <class F>
class Draws {
 public:
  FSGD_INLINE Draws(const F& format, int64_t end) : format_(format), end_(end) {}

  // Of n elements from i on.
  FSGD_INLINE const typename F::Draw* of(int64_t i, int64_t n) {
    if (i + n > drawn_) {
      const int64_t most = kAtOnce - i % kAtOnce;  // as the first words of calls must not wrap around
      const int64_t count = std::min<int64_t>(end_ - i + F::kBatch - 1, most) / F::kBatch * F::kBatch;
      format_.draw(i, static_cast<int>(count), draw_);
      first_ = i;
      drawn_ = i + count;
    }
    return draw_ + (i - first_);
  }

 private:
  static constexpr int kAtOnce = 512;
  static_assert(kAtOnce % F::kBatch == 0);
  F format_;  // a copy: draw_ goes to a call, after which compilers take all that this refers to for changed
  int64_t end_, first_ = 0, drawn_ = 0;  // draw_ is of elements [first_, drawn_)
  alignas(64) typename F::Draw draw_[kAtOnce];
};
// Of a format that draws none.
template <class F>
  requires(!kDraws<F>)
class Draws<F> {
 public:
  FSGD_INLINE Draws(const F&, int64_t) {}
};

template <class F, class T, int n>
FSGD_INLINE void load_step(const F& format, int64_t i, T (&x)[n]) {
  if constexpr (n == 2 && kInPairs<F>) {
    format.load_pair(i, x);
  } else {
    for (int k = 0; k < n; ++k) x[k] = format.load(i + k);
  }
}
template <class F, class T, int n>
FSGD_INLINE void store_step(const F& format, int64_t i, T (&x)[n]) {
  if constexpr (requires { format.store_pair(i, x); }) {
    format.store_pair(i, x);
  } else {
    for (int k = 0; k < n; ++k) x[k] = format.store(i + k, x[k]);
  }
}

}  // namespace
}  // namespace fused_sgd::cpu
