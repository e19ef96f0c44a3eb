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

// Elements [begin, end) of one tensor, where every format stores each element by itself.
template <class P, class G, class M, class K>
void walk_elements(void* const* columns, const Hyperparameters<typename P::Acc>& hyperparameters, int64_t begin,
                   int64_t end) {
  using Acc = typename P::Acc;
  const P param(columns);
  const G grad(columns + P::kColumns);
  const M momentum(columns + P::kColumns + G::kColumns);
  Acc* ema = K::kEma ? static_cast<Acc*>(columns[P::kColumns + G::kColumns + M::kColumns]) : nullptr;
  Hyperparameters<Acc> h = hyperparameters;
  h.has_momentum = K::kMomentum;
  if constexpr (K::kUsual) {
    h.has_grad_scale = h.nesterov = false;
    h.grad_factor = h.decay_factor = h.trust_ratio = Acc(1);
  }
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

// The same where the momentum is stored in blocks: load -> rule -> reduce over the block -> store. Ranges begin at a
// block's first element, because chunks are multiples of every block.
template <class P, class G, class M>
void walk_blocks(void* const* columns, const Hyperparameters<typename P::Acc>& h, int64_t begin, int64_t end) {
  using Acc = typename P::Acc;
  const P param(columns);
  const G grad(columns + P::kColumns);
  const M momentum(columns + P::kColumns + G::kColumns);
  Acc* ema = static_cast<Acc*>(columns[P::kColumns + G::kColumns + M::kColumns]);
  for (int64_t block = begin; block < end; block += M::kBlock) {
    const int64_t count = end - block < M::kBlock ? end - block : M::kBlock;
    Acc values[M::kBlock];
    typename M::Reduction reduction{};
    for (int64_t i = 0; i < count; ++i) {
      Acc p = param.load(block + i);
      values[i] = momentum.load(block + i);
      update(h, static_cast<Acc>(grad.load(block + i)), p, values[i]);
      p = param.store(block + i, p);
      M::reduce(reduction, values[i]);
      if (h.has_ema) average(h, p, ema[block + i]);
    }
    for (int64_t i = 0; i < count; ++i) momentum.store(block + i, values[i], reduction);
    momentum.finish(block / M::kBlock, reduction);
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
