// The loops over one tensor's elements, for any storage formats. Included by walk.cpp, which is compiled once per
// instruction set: internal linkage keeps each set's copy to itself.
#pragma once

#include <algorithm>
#include <limits>

#include "../core/rule.h"
#include "access.h"

namespace fused_sgd::cpu {
namespace {

#if defined(__x86_64__) && !defined(__FMA__)
inline constexpr bool kHasFma = false;  // it is a call, beside which nothing else about a loop matters
#else
inline constexpr bool kHasFma = true;
#endif
#if defined(__SANITIZE_ADDRESS__)
inline constexpr bool kSanitized = true;
#else
inline constexpr bool kSanitized = false;
#endif
// Whether there are loops for fewer of the rule's terms, which are more than half of what is compiled. They access the
// same memory as those for all.
inline constexpr bool kHasFasterLoops = kHasFma && !kSanitized;

// Which of the rule's terms a loop can have. Beside narrow columns those are computed whether or not they are asked
// for, and then selected, so a loop for fewer is faster where conversions keep the processor busy.
//   Any                 all
//   Nesterov            Nesterov momentum, and no unscaling, which is a division
//   Plain               neither of the two
//   UsualWithDecay      nor the factors of clipping, maximize, decoupled weight decay and LARS, but weight decay
//   UsualWithoutDecay   nor that
enum class Terms { Any, Nesterov, Plain, UsualWithDecay, UsualWithoutDecay };

// What is known of a loop when it is compiled. kMomentum and kEma decide which memory is touched.
template <bool kHasMomentum, bool kHasEma, Terms kItsTerms>
struct Kind {
  static constexpr bool kMomentum = kHasMomentum, kEma = kHasEma;
  static constexpr Terms kTerms = kItsTerms;
};

// The hyperparameters with what the kind settles written out, for the compiler to see.
template <class K, class T>
FSGD_INLINE Hyperparameters<T> narrowed(Hyperparameters<T> h) {
  h.has_momentum = K::kMomentum;
  if constexpr (K::kTerms != Terms::Any) {
    h.has_grad_scale = false;
    h.nesterov = K::kTerms == Terms::Nesterov;
  }
  if constexpr (K::kTerms == Terms::UsualWithDecay || K::kTerms == Terms::UsualWithoutDecay) {
    h.grad_factor = h.decay_factor = h.trust_ratio = T(1);
    h.has_weight_decay = K::kTerms == Terms::UsualWithDecay;
  }
  return h;
}

// One tensor's columns in their formats, and the loop over its elements.
template <class P, class G, class M, class K>
class Loop {
 public:
  using Acc = typename P::Acc;

  FSGD_INLINE Loop(void* const* columns, const Hyperparameters<Acc>& hyperparameters)
      : param_(columns),
        grad_(columns + P::kColumns),
        momentum_(columns + P::kColumns + G::kColumns),
        ema_(K::kEma ? static_cast<Acc*>(columns[P::kColumns + G::kColumns + M::kColumns]) : nullptr),
        h_(narrowed<K>(hyperparameters)) {
    if constexpr (kForesees) moderate_ = moderate(h_);
  }

  // Elements [begin, end), one by one, where no format is in blocks.
  FSGD_INLINE void by_element(int64_t begin, int64_t end) const {
    each<1, false>(param_, grad_, momentum_, param_, momentum_, begin, end);
  }

  // Elements [begin, end). Where there are batches it begins with one, because chunks are whole batches.
  FSGD_INLINE void run(int64_t begin, int64_t end) const {
    Draws<P> draws(param_, end);
    Look look{begin, end, false};
    if constexpr (kCallsAhead || kBatch > 1) {
      for (; begin + kStrip <= end; begin += kStrip) {
        if (kCallsAhead && begin + kAhead < end) call(begin + kAhead);
        strip(begin, draws, look);
      }
    }
    if (begin == end) return;
    if constexpr (kInBlocks) {  // tensors in blocks are whole blocks
      for (; begin < end; begin += M::kBlock) batch<M::kBlock>(begin, draws, look);
    } else if constexpr (kDraws<P>) {
      const Drawn drawn{param_, draws.of(begin, end - begin), begin};
      each<kStep, false>(param_, grad_, momentum_, drawn, momentum_, begin, end);
    } else {
      each<kStep, false>(param_, grad_, momentum_, param_, momentum_, begin, end);
    }
  }

 private:
  static constexpr bool kInBlocks = K::kMomentum && M::kBlock > 1;
  // Whether a look at elements to come can tell that what the rule makes of them is finite. Where none are drawn, it
  // gives more than it costs if all columns are alike.
  static constexpr bool kForesees = kTellsLarge<P> && kTellsLarge<G> && kTellsLarge<M> && kStoresFinite<P> &&
                                    (kDraws<P> || (K::kMomentum && kAlike<P, G, M>));
  static constexpr int kBatch = std::max({kBatchOf<P>, kBatchOf<G>, kBatchOf<M>, kForesees ? 128 : 1});
  static constexpr bool kStagesMomentum = K::kMomentum && kStaged<M>;
  static constexpr bool kArrayOfMomentum = kInBlocks || kStagesMomentum;
  static constexpr int kStep = kInPairs<P> && kInPairs<G> && (kInPairs<M> || kInBlocks) ? 2 : 1;  // two in one word
  // Conversions take so many instructions that a processor sees too little of the memory ahead, and has to be told.
  // Where nothing is narrower than 32 bits, telling costs more than it gives.
  template <class F>
  static constexpr bool kNarrow = F::kBytes < 4 * F::kColumns;
  static constexpr bool kCallsAhead = kNarrow<P> || kNarrow<G> || (K::kMomentum && kNarrow<M>);
  static constexpr bool kSelects = kHasFma && kCallsAhead;
  static constexpr int kStrip = kBatch > 1 ? kBatch : 32;  // elements that are called together
  static constexpr int kAhead = 512;                       // elements
  static constexpr int kLook = kForesees ? 256 : kBatch;   // elements that one look takes in

  // The last look at elements that were to come.
  struct Look {
    int64_t seen;  // elements before it
    int64_t end;   // of all
    bool finite;
  };

  FSGD_INLINE void call(int64_t i) const {
    param_.template prefetch<kStrip>(i);
    grad_.template prefetch<kStrip>(i);
    if constexpr (K::kMomentum) momentum_.template prefetch<kStrip>(i);
    if constexpr (K::kEma) Column<Acc>(ema_).template prefetch<kStrip>(i);
  }

  FSGD_INLINE void strip(int64_t begin, Draws<P>& draws, Look& look) const {
    if constexpr (kBatch > 1) {
      batch<kBatch>(begin, draws, look);
    } else {
      each<kStep, false>(param_, grad_, momentum_, param_, momentum_, begin, begin + kStrip);
    }
  }

  // load -> rule -> store. Some formats may be arrays, or have their random bits with them.
  template <int kStep, bool kIsSet, class Param, class Grad, class Momentum, class ParamOut, class MomentumOut>
  FSGD_INLINE void each(const Param& param, const Grad& grad, const Momentum& momentum, const ParamOut& param_out,
                        const MomentumOut& momentum_out, int64_t begin, int64_t end) const {
    const int64_t steps_end = end - (end - begin) % kStep;
#pragma GCC ivdep
    for (int64_t i = begin; i < steps_end; i += kStep) {
      Acc p[kStep], b[kStep] = {};
      typename G::Acc g[kStep];
      load_step(param, i, p);
      load_step(grad, i, g);
      if constexpr (K::kMomentum) load_step(momentum, i, b);
      for (int k = 0; k < kStep; ++k) update<kSelects, kIsSet>(h_, static_cast<Acc>(g[k]), p[k], b[k]);
      store_step(param_out, i, p);
      if constexpr (K::kMomentum) store_step(momentum_out, i, b);
      if constexpr (K::kEma && !std::is_same_v<ParamOut, Array<Acc>>) {
        for (int k = 0; k < kStep; ++k) average<kSelects>(h_, p[k], ema_[i + k]);
      }
    }
    if constexpr (kStep > 1 && !kInBlocks) {  // blocks are even
      if (steps_end < end) each<1, kIsSet>(param, grad, momentum, param_out, momentum_out, steps_end, end);
    }
  }

  // Elements [first, first + n).
  template <int n>
  FSGD_INLINE void batch(int64_t first, Draws<P>& draws, [[maybe_unused]] Look& look) const {
    if constexpr (kForesees || kInBlocks) {
      if (first >= look.seen) {
        const bool many = n < kLook && first + kLook <= look.end;
        look.finite = many ? is_finite<kLook>(first) : is_finite<n>(first);
        look.seen = first + (many ? kLook : n);
      }
      if (look.finite) return batch<n, true>(first, draws);
    }
    batch<n, false>(first, draws);
  }

  // What a look at n elements tells: the momentum is set, and the parameter is finite where that makes loads faster;
  // with kForesees all is finite, before the step and after it.
  template <int n>
  FSGD_INLINE bool is_finite(int64_t first) const {
    if constexpr (kForesees) {
      if (!moderate_) return false;
      if constexpr (K::kMomentum && kAlike<P, G, M>) {
        return are_below<n>(kModerate, param_.numbers(first), grad_.numbers(first), momentum_.numbers(first));
      } else {
        const bool below = is_below<n>(param_, kModerate, first) && is_below<n>(grad_, kModerate, first);
        return below && (!K::kMomentum || is_below<n>(momentum_, kModerate, first));
      }
    } else {
      constexpr float kInfinity = std::numeric_limits<float>::infinity();
      if constexpr (kLoadsFinite<P>) {
        if (!is_below<n>(param_, kInfinity, first)) return false;
      }
      return is_below<n>(momentum_, kInfinity, first);
    }
  }
  template <int n, class F>
  FSGD_INLINE static bool is_below(const F& format, float limit, int64_t first) {
    if constexpr (kShowsNumbers<F>) {
      return are_below<n>(limit, format.numbers(first));
    } else {
      return format.template are_below<n>(limit, first);
    }
  }

  // kFinite: is_finite() said so.
  template <int n, bool kFinite>
  FSGD_INLINE void batch(int64_t first, [[maybe_unused]] Draws<P>& draws) const {
    alignas(64) Acc p[n], b[n];
    alignas(64) typename G::Acc g[n];
    if constexpr (kStaged<P>) P::unpack(param_.template load_pack<n>(first, false), p);
    if constexpr (kStaged<G>) G::unpack(grad_.template load_pack<n>(first, false), g);
    if constexpr (kStagesMomentum) M::unpack(momentum_.template load_pack<n>(first, false), b);
    if constexpr (kInBlocks) {
      const auto load = [&](int64_t block, auto&... x)
                            __attribute__((always_inline)) { momentum_.load_block(block, x...); };
      each_block(first, b, load);
    }
    const auto param_out = staged<kStaged<P>>(param_, p, first);
    const auto param = loads<kFinite>(param_out);
    const auto grad = staged<kStaged<G>>(grad_, g, first);
    const auto momentum = staged_momentum(b, first);
    if constexpr (kDraws<P>) {
      const Drawn drawn{stores<kFinite>(param_), draws.of(first, n), first};
      each<kStep, kFinite>(param, grad, momentum, drawn, stores<kFinite>(momentum), first, first + n);
    } else {
      each<kStep, kFinite>(param, grad, momentum, stores<kFinite>(param_out), stores<kFinite>(momentum), first,
                           first + n);
      if constexpr (kStaged<P>) {
        param_.store_pack(first, false, p);
        if constexpr (K::kEma) {
          for (int k = 0; k < n; ++k) average<kSelects>(h_, p[k], ema_[first + k]);
        }
      }
    }
    if constexpr (kStagesMomentum) momentum_.store_pack(first, false, b);
    if constexpr (kInBlocks) {
      const auto store = [&](int64_t block, auto&... x)
                             __attribute__((always_inline)) { momentum_.store_block(block, x...); };
      each_block(first, b, store);
    }
  }

  template <bool kIsStaged, class F, class T>
  FSGD_INLINE static auto staged(const F& format, T* x, int64_t first) {
    if constexpr (kIsStaged) {
      return Array<T>{x, first};
    } else {
      return format;
    }
  }

  template <int n>
  FSGD_INLINE auto staged_momentum(Acc (&b)[n], int64_t first) const {
    if constexpr (kInBlocks && kStep == 2) {
      return PairedArray<n>{b, first};
    } else {
      return staged<kArrayOfMomentum>(momentum_, b, first);
    }
  }

  template <bool kFinite, class F>
  FSGD_INLINE static auto loads(const F& format) {
    if constexpr (kFinite && kLoadsFinite<F>) {
      return typename F::LoadsFinite{format};
    } else {
      return format;
    }
  }
  template <bool kFinite, class F>
  FSGD_INLINE static auto stores(const F& format) {
    if constexpr (kFinite && kForesees && kStoresFinite<F>) {
      return typename F::StoresFinite{format};
    } else {
      return format;
    }
  }

  // run(block, its elements), or run(block, its even elements, its odd ones) where two are in one word.
  template <int n, class F>
  FSGD_INLINE static void each_block(int64_t first, float (&x)[n], F run) {
    for (int k = 0; k < n; k += M::kBlock) {
      const int64_t block = (first + k) / M::kBlock;
      if constexpr (kStep == 2) {
        using Half = float[M::kBlock / 2];
        run(block, reinterpret_cast<Half&>(x[k / 2]), reinterpret_cast<Half&>(x[n / 2 + k / 2]));
      } else {
        run(block, reinterpret_cast<float (&)[M::kBlock]>(x[k]));
      }
    }
  }

  P param_;
  G grad_;
  M momentum_;
  Acc* ema_;
  Hyperparameters<Acc> h_;
  bool moderate_ = false;  // h_, if kForesees
};

}  // namespace
}  // namespace fused_sgd::cpu
