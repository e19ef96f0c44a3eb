// What one thread of the grid does. A block walks one chunk of the table; its threads take packs of elements in turn,
// 16 bytes of the narrowest column or 8 elements.
//
// Nothing here is special to a GPU: tests/native/test_grid.cpp runs every thread of every block on the host, under
// sanitizers, and compares with the CPU walk to the bit.
#pragma once

#include "../core/table.h"

namespace fused_sgd::cuda {

inline constexpr uint32_t kThreads = 256;   // of a block
inline constexpr int kBytesInFlight = 192;  // a thread loads no second pack before its first store beyond so many

constexpr int smallest(int a, int b) { return a < b ? a : b; }

// kCount neighbouring threads, which share a block of elements. On a GPU each of them does its own part, and they meet
// in shuffles; on the host the first one does the parts of all.
template <int kCount>
class Neighbours {
  static_assert(kCount <= 32 && (kCount & (kCount - 1)) == 0);

 public:
#if defined(__CUDA_ARCH__)
  static constexpr int kParts = 1;  // that one thread does
  FSGD_INLINE static bool takes_part(uint32_t) { return true; }
  template <class M>
  FSGD_INLINE static void merge(typename M::Reduction (&reduction)[kParts]) {
    static_assert(sizeof(typename M::Reduction) == 4);
    const uint32_t mask = ((kCount == 32 ? 0u : 1u << kCount) - 1u) << (threadIdx.x % 32 / kCount * kCount);
    FSGD_UNROLL
    for (int distance = 1; distance < kCount; distance *= 2) {
      const auto other = __shfl_xor_sync(mask, bit_cast<uint32_t>(reduction[0]), distance);
      M::merge(reduction[0], bit_cast<typename M::Reduction>(other));
    }
  }
#else
  static constexpr int kParts = kCount;
  FSGD_INLINE static bool takes_part(uint32_t thread) { return thread % kCount == 0; }
  template <class M>
  FSGD_INLINE static void merge(typename M::Reduction (&reduction)[kParts]) {
    for (int part = 1; part < kParts; ++part) M::merge(reduction[0], reduction[part]);
    for (int part = 1; part < kParts; ++part) reduction[part] = reduction[0];
  }
#endif
};

// The part of one tensor that one thread walks. kEma: whether some row of the table has an average.
template <class P, class G, class M, bool kEma>
class ThreadWalk {
  static_assert(P::kBlock == 1 && G::kBlock == 1, "only the momentum buffer may be stored in blocks");
  using Acc = typename P::Acc;
  using Ema = Plain<Acc, Acc, identity<Acc>, identity<Acc>>;
  // Elements a pack: 16 bytes of the narrowest column, and as many elements of the others; but no more than eight,
  // whose numbers fill the registers.
  static constexpr int kPack = smallest(8, 16 / smallest(P::kBytes, smallest(G::kBytes, M::kBytes)));
  static constexpr int kPackBytes = kPack * (P::kBytes + G::kBytes + M::kBytes + (kEma ? int{sizeof(Acc)} : 0));
  static constexpr int kTurns = kChunk / (kPack * int{kThreads});  // packs of a thread, in a whole chunk

  // Which columns are aligned where the packs begin; the others are accessed element by element.
  struct Wide {
    bool param, grad, momentum, ema;
  };

 public:
  FSGD_INLINE ThreadWalk(void* const* columns, const Hyperparameters<Acc>& hyperparameters)
      : param_(columns),
        grad_(columns + P::kColumns),
        momentum_(columns + P::kColumns + G::kColumns),
        ema_(columns + P::kColumns + G::kColumns + M::kColumns),
        h_(hyperparameters) {}

  // Chunk number `chunk` of this tensor. Heads are peeled per tensor: its first chunk is longer by the elements before
  // the first 16-byte boundary, and all others begin on one. But batches and blocks count from element 0, whatever its
  // address.
  FSGD_INLINE void chunk(uint32_t chunk, int64_t length, uint32_t thread) const {
    if constexpr (M::kBlock == 1) {
      chunk_of_elements(chunk, length, thread);
    } else {
      chunk_of_blocks(chunk, length, thread);
    }
  }

 private:
  FSGD_INLINE void chunk_of_elements(uint32_t chunk, int64_t length, uint32_t thread) const {
    const int64_t head = elements_before_packs();
    const int64_t begin = clamp(chunk == 0 ? 0 : head + chunk * kChunk, length);
    const int64_t first_pack = clamp(head + chunk * kChunk, length);
    const int64_t end = clamp(first_pack + kChunk, length);
    if (begin + thread < first_pack) element(begin + thread);  // they are fewer than a block's threads
    const Wide wide{param_.aligned(head), grad_.aligned(head), !h_.has_momentum || momentum_.aligned(head),
                    !has_ema() || ema_.aligned(head)};
    const int64_t first = first_pack + int64_t{thread} * kPack;
    if (end - first_pack == kChunk && wide.param && wide.grad && wide.momentum && wide.ema) {
      constexpr int kAtOnce = packs_at_once();
      for (int turn = 0; turn < kTurns; turn += kAtOnce) {
        walk_packs<kAtOnce>(first + int64_t{turn} * kPack * kThreads, Wide{true, true, true, true});
      }
      return;
    }
    const auto packs = static_cast<uint32_t>((end - first_pack) / kPack);
    const int64_t tail = first_pack + int64_t{packs} * kPack;
    if (tail + thread < end) element(tail + thread);
    for (uint32_t j = 0; thread + j * kThreads < packs; ++j) {
      walk_packs<1>(first + int64_t{j} * kPack * kThreads, wide);
    }
  }

  // As many as have kBytesInFlight.
  FSGD_INLINE static constexpr int packs_at_once() {
    int packs = 1;
    while (2 * packs <= kTurns && 2 * packs * kPackBytes <= kBytesInFlight) packs *= 2;
    return packs;
  }

  // kCount packs, of which the first begins with element `first`, and each of the others a block of threads behind.
  template <int kCount>
  FSGD_INLINE void walk_packs(int64_t first, Wide wide) const {
    // All loads come before the first store. What they bring stays packed until its turn comes, to save registers.
    typename P::template Packed<kPack> packed_p[kCount];
    typename G::template Packed<kPack> packed_g[kCount];
    typename M::template Packed<kPack> packed_b[kCount];
    typename Ema::template Packed<kPack> packed_e[kCount];
    FSGD_UNROLL
    for (int u = 0; u < kCount; ++u) {
      const int64_t i = first + u * kPack * int{kThreads};
      packed_p[u] = param_.template load_pack<kPack>(i, wide.param);
      packed_g[u] = grad_.template load_pack<kPack>(i, wide.grad);
      if (h_.has_momentum) packed_b[u] = momentum_.template load_pack<kPack>(i, wide.momentum);
      if (has_ema()) packed_e[u] = ema_.template load_pack<kPack>(i, wide.ema);
    }
    FSGD_UNROLL
    for (int u = 0; u < kCount; ++u) {
      const int64_t i = first + u * kPack * int{kThreads};
      Acc p[kPack], b[kPack];
      typename G::Acc g[kPack];
      P::unpack(packed_p[u], p);
      G::unpack(packed_g[u], g);
      if (h_.has_momentum) M::unpack(packed_b[u], b);
      FSGD_UNROLL
      for (int k = 0; k < kPack; ++k) update(h_, static_cast<Acc>(g[k]), p[k], b[k]);
      param_.store_pack(i, wide.param, p);
      if (h_.has_momentum) momentum_.store_pack(i, wide.momentum, b);
      if (has_ema()) {
        Acc e[kPack];
        Ema::unpack(packed_e[u], e);
        FSGD_UNROLL
        for (int k = 0; k < kPack; ++k) average(h_, p[k], e[k]);
        ema_.store_pack(i, wide.ema, e);
      }
    }
  }

  FSGD_INLINE void chunk_of_blocks(uint32_t chunk, int64_t length, uint32_t thread) const {
    using Together = Neighbours<M::kBlock / kPack>;
    if (!Together::takes_part(thread)) return;
    const int64_t begin = chunk * kChunk, end = clamp(begin + kChunk, length);
    const bool wide_param = param_.aligned(0), wide_grad = grad_.aligned(0), wide_momentum = momentum_.aligned(0),
               wide_ema = has_ema() && ema_.aligned(0);
    for (int64_t first = begin + int64_t{thread} * kPack; first < end; first += int64_t{kThreads} * kPack) {
      Acc b[Together::kParts][kPack];
      typename M::Reduction reduction[Together::kParts];
      FSGD_UNROLL
      for (int part = 0; part < Together::kParts; ++part) {
        const int64_t i = first + part * kPack;
        Acc p[kPack];
        typename G::Acc g[kPack];
        P::unpack(param_.template load_pack<kPack>(i, wide_param), p);
        G::unpack(grad_.template load_pack<kPack>(i, wide_grad), g);
        reduction[part] = {};
        FSGD_UNROLL
        for (int k = 0; k < kPack; ++k) b[part][k] = 0;
        if (h_.has_momentum) M::unpack(momentum_.template load_pack<kPack>(i, wide_momentum), b[part]);
        FSGD_UNROLL
        for (int k = 0; k < kPack; ++k) {
          update(h_, static_cast<Acc>(g[k]), p[k], b[part][k]);
          M::reduce(reduction[part], b[part][k]);
        }
        param_.store_pack(i, wide_param, p);
        if (has_ema()) {
          Acc e[kPack];
          Ema::unpack(ema_.template load_pack<kPack>(i, wide_ema), e);
          FSGD_UNROLL
          for (int k = 0; k < kPack; ++k) average(h_, p[k], e[k]);
          ema_.store_pack(i, wide_ema, e);
        }
      }
      if (!h_.has_momentum) continue;
      Together::template merge<M>(reduction);
      FSGD_UNROLL
      for (int part = 0; part < Together::kParts; ++part) {
        const int64_t i = first + part * kPack;
        momentum_.store_pack(i, wide_momentum, b[part], reduction[part]);
        if (i % M::kBlock == 0) momentum_.finish(i / M::kBlock, reduction[part]);
      }
    }
  }

  FSGD_INLINE static int64_t clamp(int64_t i, int64_t length) { return i < length ? i : length; }

  // The narrowest column decides: where all columns can be aligned at once, only its head does it.
  FSGD_INLINE int64_t elements_before_packs() const {
    if constexpr (kBatchOf<P> > 1) {
      return 0;
    } else if constexpr (P::kBytes * kPack == 16) {
      return param_.until_aligned();
    } else if constexpr (G::kBytes * kPack == 16) {
      return grad_.until_aligned();
    } else {
      return momentum_.until_aligned();
    }
  }

  FSGD_INLINE void element(int64_t i) const {
    Acc p = param_.load(i);
    Acc b = h_.has_momentum ? momentum_.load(i) : Acc(0);
    update(h_, static_cast<Acc>(grad_.load(i)), p, b);
    p = param_.store(i, p);
    if (h_.has_momentum) momentum_.store(i, b);
    if (has_ema()) {
      Acc e = ema_.load(i);
      average(h_, p, e);
      ema_.store(i, e);
    }
  }

  FSGD_INLINE bool has_ema() const { return kEma && h_.has_ema; }

  P param_;
  G grad_;
  M momentum_;
  Ema ema_;
  Hyperparameters<Acc> h_;
};

// One thread of one block. kLines: the combinations that there is code for; all rows have one of them.
template <Lines kLines, bool kEma>
FSGD_INLINE void walk_thread(const Table& table, uint32_t block, uint32_t thread) {
  if (skips(table.scalars)) {
    if (table.scalars.skipped_steps != nullptr && block == 0 && thread == 0) ++*table.scalars.skipped_steps;
    return;
  }
  const uint32_t i = table.find_row(block);
  const Row& row = table.row(i);
  const uint32_t chunk = block - table.chunk_begin(i);
  constexpr int kOnly = only_line(kLines);
  const int line = kOnly < 0 ? static_cast<int>(row.combination()) : kOnly;
#define FSGD_WALK_ROW(P, G, M)                                                             \
  if constexpr (has(kLines, Line_##P##_##G##_##M)) {                                       \
    if (line == Line_##P##_##G##_##M) {                                                    \
      const Hyperparameters<P::Acc> h(table.groups[row.group()], table.scalars, i);        \
      return ThreadWalk<P, G, M, kEma>(row.columns(), h).chunk(chunk, row.length, thread); \
    }                                                                                      \
  }
  FSGD_COMBINATIONS(FSGD_WALK_ROW)
#undef FSGD_WALK_ROW
}

// What the last block does in the end, where steps are counted: all others have read what it changes.
FSGD_INLINE void count_steps_thread(const Table& table, uint32_t thread) {
  if (!skips(table.scalars)) count_steps(table, thread, kThreads);
}

}  // namespace fused_sgd::cuda
