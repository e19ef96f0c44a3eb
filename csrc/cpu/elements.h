// The loops over one tensor's elements, for any storage formats. Included by walk.cpp, which is compiled once per
// instruction set: internal linkage keeps each set's copy to itself.
#pragma once

#include <algorithm>

#include "../core/formats.h"
#include "../core/rule.h"
#include "../core/squares.h"

namespace fused_sgd::cpu {
namespace {

// What a loop does beside the step, known when it is compiled. kMomentum and kEma decide which memory is touched;
// kUsual keeps a division, three factors and two selects out of the usual loop, which matters where conversions to 16
// bits keep the processor busy.
template <bool kHasMomentum, bool kHasEma, bool kIsUsual>
struct Kind {
  static constexpr bool kMomentum = kHasMomentum, kEma = kHasEma, kUsual = kIsUsual;
};

template <class T>
bool is_usual(const Hyperparameters<T>& h) {
  return !h.has_grad_scale && !h.nesterov && !h.has_ema && h.grad_factor == T(1) && h.decay_factor == T(1) &&
         h.trust_ratio == T(1);
}

// The hyperparameters with what the kind settles written out, for the compiler to see.
template <class K, class T>
FSGD_INLINE Hyperparameters<T> narrowed(Hyperparameters<T> h) {
  h.has_momentum = K::kMomentum;
  if constexpr (K::kUsual) {
    h.has_grad_scale = h.nesterov = false;
    h.grad_factor = h.decay_factor = h.trust_ratio = T(1);
  }
  return h;
}

template <class F>
inline constexpr bool kInPairs = requires(const F& format, float (&x)[2]) { format.load_pair(0, x); };

// Elements [begin, end) of one tensor, where every format stores each element by itself.
template <class P, class G, class M, class K>
void walk_elements(void* const* columns, const Hyperparameters<typename P::Acc>& hyperparameters, int64_t begin,
                   int64_t end) {
  using Acc = typename P::Acc;
  const P param(columns);
  const G grad(columns + P::kColumns);
  const M momentum(columns + P::kColumns + G::kColumns);
  Acc* ema = K::kEma ? static_cast<Acc*>(columns[P::kColumns + G::kColumns + M::kColumns]) : nullptr;
  const Hyperparameters<Acc> h = narrowed<K>(hyperparameters);
#pragma GCC ivdep
  for (int64_t i = begin; i < end; ++i) {
    Acc p = param.load(i);
    Acc b = K::kMomentum ? momentum.load(i) : Acc(0);
    update(h, static_cast<Acc>(grad.load(i)), p, b);
    p = param.store(i, p);
    if constexpr (K::kMomentum) momentum.store(i, b);
    if constexpr (K::kEma) average(h, p, ema[i]);
  }
}

// The same, two at a time.
template <class P, class G, class M, class K>
void walk_pairs(void* const* columns, const Hyperparameters<float>& hyperparameters, int64_t begin, int64_t end) {
  const P param(columns);
  const G grad(columns + P::kColumns);
  const M momentum(columns + P::kColumns + G::kColumns);
  float* ema = K::kEma ? static_cast<float*>(columns[P::kColumns + G::kColumns + M::kColumns]) : nullptr;
  const Hyperparameters<float> h = narrowed<K>(hyperparameters);
#pragma GCC ivdep
  for (int64_t i = begin; i < end - 1; i += 2) {
    float p[2], g[2], b[2] = {};
    param.load_pair(i, p);
    grad.load_pair(i, g);
    if constexpr (K::kMomentum) momentum.load_pair(i, b);
    update(h, g[0], p[0], b[0]);
    update(h, g[1], p[1], b[1]);
    param.store_pair(i, p);
    if constexpr (K::kMomentum) momentum.store_pair(i, b);
    if constexpr (K::kEma) {
      average(h, p[0], ema[i]);
      average(h, p[1], ema[i + 1]);
    }
  }
  if ((end - begin) % 2 != 0) walk_elements<P, G, M, K>(columns, hyperparameters, end - 1, end);
}

// A whole batch, element by element where the format has nothing better.
template <class F, class T, int n>
FSGD_INLINE void load_batch(const F& format, int64_t i, T (&x)[n]) {
  if constexpr (kBatchOf<F> > 1) {
    F::unpack(format.template load_pack<n>(i, false), x);
  } else {
    for (int k = 0; k < n; ++k) x[k] = format.load(i + k);
  }
}
template <class F, class T, int n>
FSGD_INLINE void store_batch(const F& format, int64_t i, T (&x)[n]) {
  if constexpr (kBatchOf<F> > 1) {
    format.store_pack(i, false, x);
  } else {
    for (int k = 0; k < n; ++k) x[k] = format.store(i + k, x[k]);
  }
}
template <class M, int n>
FSGD_INLINE void load_blocks(const M& momentum, int64_t i, float (&x)[n]) {
  for (int first = 0; first < n; first += M::kBlock) {
    momentum.load_block((i + first) / M::kBlock, *reinterpret_cast<float (*)[M::kBlock]>(x + first));
  }
}
template <class M, int n>
FSGD_INLINE void store_blocks(const M& momentum, int64_t i, const float (&x)[n]) {
  for (int first = 0; first < n; first += M::kBlock) {
    momentum.store_block((i + first) / M::kBlock, *reinterpret_cast<const float (*)[M::kBlock]>(x + first));
  }
}

// The same where some format stores elements together: load -> rule -> reduce over the block -> store. Ranges begin at
// a batch's first element, because chunks are multiples of every batch; and tensors in blocks are whole blocks.
template <class P, class G, class M, class K>
void walk_batches(void* const* columns, const Hyperparameters<typename P::Acc>& hyperparameters, int64_t begin,
                  int64_t end) {
  using Acc = typename P::Acc;
  constexpr int kBatch = std::max({kBatchOf<P>, kBatchOf<G>, kBatchOf<M>});
  const P param(columns);
  const G grad(columns + P::kColumns);
  const M momentum(columns + P::kColumns + G::kColumns);
  Acc* ema = K::kEma ? static_cast<Acc*>(columns[P::kColumns + G::kColumns + M::kColumns]) : nullptr;
  const Hyperparameters<Acc> h = narrowed<K>(hyperparameters);
  const auto some = [&]<int n>(int64_t i) __attribute__((always_inline)) {
    alignas(64) Acc p[n], b[n];
    alignas(64) typename G::Acc g[n];
    load_batch(param, i, p);
    load_batch(grad, i, g);
    if constexpr (K::kMomentum && M::kBlock > 1) {
      load_blocks(momentum, i, b);
    } else if constexpr (K::kMomentum) {
      load_batch(momentum, i, b);
    }
    for (int k = 0; k < n; ++k) {
      Acc none = 0;
      update(h, static_cast<Acc>(g[k]), p[k], K::kMomentum ? b[k] : none);
    }
    store_batch(param, i, p);
    if constexpr (K::kMomentum && M::kBlock > 1) {
      store_blocks(momentum, i, b);
    } else if constexpr (K::kMomentum) {
      store_batch(momentum, i, b);
    }
    if constexpr (K::kEma) {
      for (int k = 0; k < n; ++k) average(h, p[k], ema[i + k]);
    }
  };
  for (; begin + kBatch <= end; begin += kBatch) some.template operator()<kBatch>(begin);
  if constexpr (M::kBlock > 1) {
    for (; begin < end; begin += M::kBlock) some.template operator()<M::kBlock>(begin);
  } else if (begin < end) {
    walk_elements<P, G, M, K>(columns, hyperparameters, begin, end);
  }
}

// The sum of squares of one tile, by the scheme of squares.h. load(i): element i of the tile, below `count`.
// prefetch(i): element i of the tile after this one will be wanted. It is called with every 16th, in order: memory is
// fastest when it is asked in its own order, and the lanes' order is another.
template <class T, class Load, class Prefetch>
double tile_squares(int count, Load load, Prefetch prefetch) {
  constexpr int kStrip = 16;  // lanes that stay in registers while their pairs are added
  alignas(64) double lanes[kLanes] = {};
  if (count == kTile) {
    for (int strip = 0; strip < kLanes; strip += kStrip) {
      double sums[kStrip] = {};
#pragma GCC unroll 8
      for (int pair = 0; pair < kPairs; ++pair) {
        const int row = pair * 2 * kLanes + strip, done = 2 * (strip * kPairs + pair * kStrip);
        prefetch(done);
        prefetch(done + kStrip);
        for (int lane = 0; lane < kStrip; ++lane) {
          const T first = load(row + lane), second = load(row + lane + kLanes);
          sums[lane] += square_pair(static_cast<double>(first), static_cast<double>(second));
        }
      }
      for (int lane = 0; lane < kStrip; ++lane) lanes[strip + lane] = sums[lane];
    }
    return fold(lanes, kLanes);
  }
  alignas(64) T padded[2 * kLanes];
  for (int begin = 0; begin < count; begin += 2 * kLanes) {
    for (int i = 0; i < 2 * kLanes; ++i) padded[i] = begin + i < count ? load(begin + i) : T(0);
    for (int lane = 0; lane < kLanes; ++lane) {
      lanes[lane] += square_pair(static_cast<double>(padded[lane]), static_cast<double>(padded[lane + kLanes]));
    }
  }
  return fold(lanes, kLanes);
}

}  // namespace
}  // namespace fused_sgd::cpu
