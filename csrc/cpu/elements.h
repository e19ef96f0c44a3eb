// The loops over one tensor's elements, for any storage formats. Included by walk.cpp, which is compiled once per
// instruction set: internal linkage keeps each set's copy to itself.
#pragma once

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

// The same where some format stores elements together: load -> rule -> reduce over the block -> store. Ranges begin at
// a batch's first element, because chunks are multiples of every batch; and tensors in blocks are whole blocks.
template <class P, class G, class M, class K>
void walk_batches(void* const* columns, const Hyperparameters<typename P::Acc>& hyperparameters, int64_t begin,
                  int64_t end) {
  using Acc = typename P::Acc;
  constexpr int kBatch = kBatchOf<P> > kBatchOf<M> ? kBatchOf<P> : kBatchOf<M>;
  const P param(columns);
  const G grad(columns + P::kColumns);
  const M momentum(columns + P::kColumns + G::kColumns);
  Acc* ema = K::kEma ? static_cast<Acc*>(columns[P::kColumns + G::kColumns + M::kColumns]) : nullptr;
  const Hyperparameters<Acc> h = narrowed<K>(hyperparameters);
  alignas(64) Acc p[kBatch];
  alignas(64) Acc b[kBatch];
  const auto each_block = [](int count, auto f) __attribute__((always_inline)) {
    for (int first = 0; first < count; first += M::kBlock) f(first);
  };
  const auto batch = [&](int64_t i, int count) __attribute__((always_inline)) {
    if constexpr (K::kMomentum && M::kBlock == 1) {
      for (int k = 0; k < count; ++k) b[k] = momentum.load(i + k);
    } else if constexpr (K::kMomentum) {
      each_block(count, [&](int first) __attribute__((always_inline)) {
        const auto common = momentum.open((i + first) / M::kBlock);
        for (int k = first; k < first + M::kBlock; ++k) b[k] = momentum.load(i + k, common);
      });
    }
    for (int k = 0; k < count; ++k) {
      Acc none = 0;
      p[k] = param.load(i + k);
      update(h, static_cast<Acc>(grad.load(i + k)), p[k], K::kMomentum ? b[k] : none);
    }
    if constexpr (kBatchOf<P> > 1) {
      if (count == kBatch) {
        param.store_pack(i, false, p);
      } else {
        for (int k = 0; k < count; ++k) p[k] = param.store(i + k, p[k]);
      }
    } else {
      for (int k = 0; k < count; ++k) p[k] = param.store(i + k, p[k]);
    }
    if constexpr (K::kMomentum && M::kBlock == 1) {
      for (int k = 0; k < count; ++k) momentum.store(i + k, b[k]);
    } else if constexpr (K::kMomentum) {
      each_block(count, [&](int first) __attribute__((always_inline)) {
        typename M::Reduction reduction{};
        for (int k = first; k < first + M::kBlock; ++k) M::reduce(reduction, b[k]);
        for (int k = first; k < first + M::kBlock; ++k) momentum.store(i + k, b[k], reduction);
        momentum.finish((i + first) / M::kBlock, reduction);
      });
    }
    if constexpr (K::kEma) {
      for (int k = 0; k < count; ++k) average(h, p[k], ema[i + k]);
    }
  };
  for (; begin + kBatch <= end; begin += kBatch) batch(begin, kBatch);
  if (begin < end) batch(begin, static_cast<int>(end - begin));
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
