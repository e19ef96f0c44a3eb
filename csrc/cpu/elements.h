// The loops over one tensor's elements, for any storage formats. Included by walk.cpp, which is compiled once per
// instruction set: internal linkage keeps each set's copy to itself.
#pragma once

#include "../core/formats.h"
#include "../core/rule.h"

namespace fused_sgd::cpu {
namespace {

// Elements [begin, end) of one tensor, where every format stores each element by itself.
// The constants repeat what the hyperparameters say: kMomentum decides which memory is touched; kUsual keeps a division
// and three selects out of the usual loop, which matters where conversions to 16 bits keep the processor busy.
template <class P, class G, class M, bool kMomentum, bool kUsual>
void walk_elements(void* const* columns, const Hyperparameters<typename P::Acc>& hyperparameters, int64_t begin,
                   int64_t end) {
  using Acc = typename P::Acc;
  const P param(columns);
  const G grad(columns + P::kColumns);
  const M momentum(columns + P::kColumns + G::kColumns);
  Hyperparameters<Acc> h = hyperparameters;
  h.has_momentum = kMomentum;
  if constexpr (kUsual) h.has_grad_scale = h.maximize = h.nesterov = h.first_step = false;
#pragma GCC ivdep
  for (int64_t i = begin; i < end; ++i) {
    Acc p = param.load(i);
    Acc b = kMomentum ? momentum.load(i) : Acc(0);
    update(h, static_cast<Acc>(grad.load(i)), p, b);
    param.store(i, p);
    if constexpr (kMomentum) momentum.store(i, b);
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
  for (int64_t block = begin; block < end; block += M::kBlock) {
    const int64_t count = end - block < M::kBlock ? end - block : M::kBlock;
    Acc values[M::kBlock];
    typename M::Reduction reduction{};
    for (int64_t i = 0; i < count; ++i) {
      Acc p = param.load(block + i);
      values[i] = momentum.load(block + i);
      update(h, static_cast<Acc>(grad.load(block + i)), p, values[i]);
      param.store(block + i, p);
      M::reduce(reduction, values[i]);
    }
    for (int64_t i = 0; i < count; ++i) momentum.store(block + i, values[i], reduction);
    momentum.finish(block / M::kBlock, reduction);
  }
}

}  // namespace
}  // namespace fused_sgd::cpu
