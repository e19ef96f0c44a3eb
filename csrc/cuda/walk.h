// What one thread of the grid does. A block walks one chunk of the table; its threads take packs of elements in turn,
// 16 bytes of the narrowest column or 8 elements.
//
// All but what threads of a block share is the same for a GPU and the host: tests/native/test_grid.cpp runs every
// thread of every block there, under sanitizers, and compares with the CPU walk to the bit.
#pragma once

#include "block.h"

namespace fused_sgd::cuda {

inline constexpr uint32_t kThreads = 256;   // of a block
inline constexpr int kElements = 4;         // of a thread at once, where columns are not aligned
inline constexpr int kBytesInFlight = 192;  // a thread loads no second pack before its first store beyond so many

constexpr int smallest(int a, int b) { return a < b ? a : b; }

// The part of one tensor that one thread walks. kEma: whether some row of the table has an average. kCounts: whether
// some row's format counts steps. What depends on the count is read by then when a block adds itself to the ticket.
template <class P, class G, class M, bool kEma, bool kCounts>
class ThreadWalk {
  static_assert(P::kBlock == 1 && G::kBlock == 1, "only the momentum buffer may be stored in blocks");
  using Acc = typename P::Acc;
  using Ema = Plain<Acc, Acc, identity<Acc>, identity<Acc>>;
  using Terms = Hyperparameters<Acc>;
  // Elements a pack: 16 bytes of the narrowest column, and as many elements of the others; but no more than eight,
  // whose numbers fill the registers.
  static constexpr int kPack = smallest(8, 16 / smallest(P::kBytes, smallest(G::kBytes, M::kBytes)));
  static constexpr int kPackBytes = kPack * (P::kBytes + G::kBytes + M::kBytes + (kEma ? int{sizeof(Acc)} : 0));
  static constexpr int64_t kStride = int64_t{kPack} * kThreads;  // from a thread's pack to its next one
  static constexpr int kTurns = kChunk / kStride;                // packs of a thread, in a whole chunk

  // The threads that share a block of the momentum buffer.
  using Together = Neighbours<M::kBlock == 1 ? 1 : M::kBlock / kPack>;
  using Reduction = typename ReductionOf<M>::Type;
  using Record = typename RecordOf<P>::Type;
  static constexpr int kParts = Together::kParts;

 public:
  FSGD_INLINE ThreadWalk(const Table& table, uint32_t row)
      : table_(table),
        row_(row),
        group_(table.groups[table.row(row).group()]),
        length_(table.row(row).length),
        has_momentum_(group_.momentum != 0),
        has_ema_(kEma && group_.has_ema != 0),
        param_(columns()),
        grad_(columns() + P::kColumns),
        momentum_(columns() + P::kColumns + G::kColumns),
        ema_(has_ema_ ? columns() + P::kColumns + G::kColumns + M::kColumns : columns()) {}

  // Chunk number `chunk` of this tensor. Heads are peeled per tensor: its first chunk is longer by the elements before
  // the first 16-byte boundary, and all others begin on one. But batches and blocks count from element 0, whatever its
  // address.
  FSGD_INLINE void chunk(uint32_t chunk, uint32_t thread) {
    const int64_t head = elements_before_packs();
    const int64_t begin = clamp(chunk == 0 ? 0 : head + chunk * kChunk);
    const int64_t first_pack = clamp(head + chunk * kChunk);
    const int64_t end = clamp(first_pack + kChunk);
    const int64_t first = first_pack + int64_t{thread} * kPack;
    const bool takes_part = Together::takes_part(thread);
    const bool aligned = param_.aligned(head) && grad_.aligned(head) && (!has_momentum_ || momentum_.aligned(head)) &&
                         (!has_ema_ || ema_.aligned(head));
    constexpr int kAtOnce = packs_at_once();
    const bool whole = takes_part && aligned && end - first_pack == kChunk;
    Packs<kAtOnce> packs{};
#if defined(__CUDA_ARCH__)
    // The hyperparameters take a hundred instructions. One thread computes them for all, whose loads are under way.
    __shared__ SharedMemory<Terms> shared_terms;
    __shared__ SharedMemory<Record> shared_record;
    if (thread == 0) {
      shared_terms.set(Terms(group_, table_.scalars, row_));
      if constexpr (kDraws<P>) shared_record.set(*param_.record);
    }
    if (whole) load<kAtOnce, true>(first, packs);
    __syncthreads();
    const Terms terms = shared_terms.get();
    if constexpr (kDraws<P>) param_.record = &shared_record.get();
    if constexpr (kCounts) {
      if (thread == 0 && table_.scalars.ticket != nullptr) atomicAdd(table_.scalars.ticket, 1u);
    }
#else
    if (whole) load<kAtOnce, true>(first, packs);
    const Terms terms(group_, table_.scalars, row_);
#endif
    if constexpr (M::kBlock == 1) {
      if (!aligned) return unaligned(terms, begin, end, thread);
    }
    const int64_t tail = end - (end - first_pack) % kPack;
    if (whole && terms.has_grad_inverse) {
      update<kAtOnce, true, true>(terms, first, packs);
      for (int turn = kAtOnce; turn < kTurns; turn += kAtOnce) {
        load<kAtOnce, true>(first + turn * kStride, packs);
        update<kAtOnce, true, true>(terms, first + turn * kStride, packs);
      }
    } else if (takes_part) {
      for (int64_t i = first; i < tail; i += kStride) {
        Packs<1> pack{};
        if (M::kBlock == 1 || aligned) {
          load<1, true>(i, pack);
          update<1, true, false>(terms, i, pack);
        } else {
          load<1, false>(i, pack);
          update<1, false, false>(terms, i, pack);
        }
      }
    }
    if constexpr (M::kBlock == 1) {  // what lies before the first pack and behind the last one, a pack's at most
      if (begin + thread < first_pack) elements<1>(terms, begin + thread, first_pack);
      if (tail + thread < end) elements<1>(terms, tail + thread, end);
    }
  }

 private:
  // Elements as they are stored, to save registers until their turn comes: a thread's, in so many turns; on the host
  // those of all neighbours.
  template <int kCount>
  struct Packs {
    typename P::template Packed<kPack> param[kCount * kParts];
    typename G::template Packed<kPack> grad[kCount * kParts];
    typename M::template Packed<kPack> momentum[kCount * kParts];
    typename Ema::template Packed<kPack> ema[kCount * kParts];
  };

  // As many as have kBytesInFlight.
  FSGD_INLINE static constexpr int packs_at_once() {
    int packs = 1;
    while (2 * packs <= kTurns && 2 * packs * kPackBytes <= kBytesInFlight) packs *= 2;
    return packs;
  }
  // Where a pack begins, the first one with element `first`.
  FSGD_INLINE static int64_t begin_of(int pack, int64_t first) {
    return first + pack / kParts * kStride + pack % kParts * kPack;
  }

  template <int kCount, bool kWide>
  FSGD_INLINE void load(int64_t first, Packs<kCount>& packs) const {
    FSGD_UNROLL
    for (int u = 0; u < kCount * kParts; ++u) {
      packs.param[u] = param_.template load_pack<kPack>(begin_of(u, first), kWide);
      packs.grad[u] = grad_.template load_pack<kPack>(begin_of(u, first), kWide);
      packs.momentum[u] = {};
    }
    if (has_momentum_) {
      FSGD_UNROLL
      for (int u = 0; u < kCount * kParts; ++u) {
        packs.momentum[u] = momentum_.template load_pack<kPack>(begin_of(u, first), kWide);
      }
    }
    if (has_ema_) {
      FSGD_UNROLL
      for (int u = 0; u < kCount * kParts; ++u) {
        packs.ema[u] = ema_.template load_pack<kPack>(begin_of(u, first), kWide);
      }
    }
  }

  // kWhole: of a whole chunk, in which all threads take part, of gradients that need no division.
  template <int kCount, bool kWide, bool kWhole>
  FSGD_INLINE void update(const Terms& terms, int64_t first, const Packs<kCount>& packs) const {
    // Random bits before what was loaded is asked for: meanwhile it comes.
    const auto random = random_of(param_);
    decltype(draws_of(random, 0)) draws[kCount * kParts];
    FSGD_UNROLL
    for (int u = 0; u < kCount * kParts; ++u) draws[u] = draws_of(random, begin_of(u, first));
    FSGD_UNROLL
    for (int turn = 0; turn < kCount; ++turn) {
      Acc b[kParts][kPack];
      Reduction reduction[kParts];
      FSGD_UNROLL
      for (int part = 0; part < kParts; ++part) {
        const int u = turn * kParts + part;
        const int64_t i = begin_of(u, first);
        Acc p[kPack];
        typename G::Acc g[kPack];
        P::unpack(packs.param[u], p);
        G::unpack(packs.grad[u], g);
        M::unpack(packs.momentum[u], b[part]);
        if (kWhole || terms.has_grad_inverse) {
          FSGD_UNROLL
          for (int k = 0; k < kPack; ++k) update_straight<false>(terms, static_cast<Acc>(g[k]), p[k], b[part][k]);
        } else {
          FSGD_UNROLL
          for (int k = 0; k < kPack; ++k) update_straight<true>(terms, static_cast<Acc>(g[k]), p[k], b[part][k]);
        }
        if constexpr (M::kBlock > 1) {
          reduction[part] = {};
          FSGD_UNROLL
          for (int k = 0; k < kPack; ++k) M::reduce(reduction[part], b[part][k]);
        }
        store_param(i, kWide, p, draws[u]);
        if (has_ema_) {
          Acc e[kPack];
          Ema::unpack(packs.ema[u], e);
          FSGD_UNROLL
          for (int k = 0; k < kPack; ++k) average(terms, p[k], e[k]);
          ema_.store_pack(i, kWide, e);
        }
      }
      if (has_momentum_) store_momentum<kWide, kWhole>(begin_of(turn * kParts, first), b, reduction);
    }
  }

  FSGD_INLINE static None draws_of(None, int64_t) { return {}; }
  template <class Random>
  FSGD_INLINE static auto draws_of(const Random& random, int64_t i) {
    return random.template draws<kPack>(i);
  }
  FSGD_INLINE void store_param(int64_t i, bool wide, Acc (&p)[kPack], None) const { param_.store_pack(i, wide, p); }
  template <class Draws>
  FSGD_INLINE void store_param(int64_t i, bool wide, Acc (&p)[kPack], const Draws& draws) const {
    param_.store_pack(i, wide, p, draws);
  }

  template <bool kWide, bool kWhole>
  FSGD_INLINE void store_momentum(int64_t first, Acc (&b)[kParts][kPack], Reduction (&reduction)[kParts]) const {
    if constexpr (M::kBlock == 1) {
      momentum_.store_pack(first, kWide, b[0]);
    } else {
      Together::template merge<M, kWhole>(reduction);
      FSGD_UNROLL
      for (int part = 0; part < kParts; ++part) {
        momentum_.store_pack(first + part * kPack, kWide, b[part], reduction[part]);
      }
    }
  }

  FSGD_INLINE void unaligned(const Terms& terms, int64_t begin, int64_t end, uint32_t thread) const {
    for (int64_t i = begin + thread; i < end; i += int64_t{kElements} * kThreads) elements<kElements>(terms, i, end);
  }

  // Elements `first`, and kCount - 1 more of which each is a block of threads behind, as far as they are before `end`.
  template <int kCount>
  FSGD_INLINE void elements(const Terms& terms, int64_t first, int64_t end) const {
    Acc p[kCount], b[kCount], e[kCount];
    typename G::Acc g[kCount];
    FSGD_UNROLL
    for (int u = 0; u < kCount; ++u) {
      const int64_t i = first + u * int{kThreads};
      if (u > 0 && i >= end) break;
      p[u] = param_.load(i);
      g[u] = grad_.load(i);
      b[u] = has_momentum_ ? momentum_.load(i) : Acc(0);
      if (has_ema_) e[u] = ema_.load(i);
    }
    FSGD_UNROLL
    for (int u = 0; u < kCount; ++u) {
      const int64_t i = first + u * int{kThreads};
      if (u > 0 && i >= end) break;
      fused_sgd::update(terms, static_cast<Acc>(g[u]), p[u], b[u]);
      p[u] = param_.store(i, p[u]);
      if (has_momentum_) momentum_.store(i, b[u]);
      if (has_ema_) {
        average(terms, p[u], e[u]);
        ema_.store(i, e[u]);
      }
    }
  }

  FSGD_INLINE void* const* columns() const { return table_.row(row_).columns(); }
  FSGD_INLINE int64_t clamp(int64_t i) const { return i < length_ ? i : length_; }

  // The narrowest column decides: where all columns can be aligned at once, only its head does it.
  FSGD_INLINE int64_t elements_before_packs() const {
    if constexpr (kBatchOf<P> > 1 || M::kBlock > 1) {
      return 0;
    } else if constexpr (P::kBytes * kPack == 16) {
      return param_.until_aligned();
    } else if constexpr (G::kBytes * kPack == 16) {
      return grad_.until_aligned();
    } else {
      return momentum_.until_aligned();
    }
  }

  const Table& table_;
  uint32_t row_;
  const Group& group_;
  int64_t length_;
  bool has_momentum_, has_ema_;
  P param_;
  G grad_;
  M momentum_;
  Ema ema_;
};

// The row that holds `chunk`, for all threads of a warp. kFar: the table is in the device's memory, where a look takes
// long, so that each thread looks at a row of its own, and two looks find one of a thousand.
template <bool kFar>
FSGD_INLINE uint32_t find_row(const Table& table, uint32_t chunk) {
#if defined(__CUDA_ARCH__)
  if constexpr (kFar) {
    uint32_t low = 0, high = table.row_count;  // it is one of these
    while (high - low > 1) {
      const uint32_t step = (high - low + 31) / 32;
      const uint32_t end = low + (threadIdx.x % 32 + 1) * step, last = (end < high ? end : high) - 1;
      const uint32_t first = __ffs(static_cast<int>(__ballot_sync(~0u, table.row(last).chunk_end > chunk))) - 1;
      low += first * step;
      high = low + step < high ? low + step : high;
    }
    return low;
  }
#endif
  return table.find_row(chunk);
}

// One thread of one block. kLines: the combinations that there is code for; all rows have one of them.
template <Lines kLines, bool kEma, bool kFar>
FSGD_INLINE void walk_thread(const Table& table, uint32_t block, uint32_t thread) {
  if (skips(table.scalars)) {
    if (table.scalars.skipped_steps != nullptr && block == 0 && thread == 0) ++*table.scalars.skipped_steps;
    return;
  }
  const uint32_t i = find_row<kFar>(table, block);
  const uint32_t chunk = block - table.chunk_begin(i);
  constexpr bool kCounts = (kLines & kCountingLines) != Lines::None;
  constexpr int kOnly = only_line(kLines);
  const int line = kOnly < 0 ? static_cast<int>(table.row(i).combination()) : kOnly;
#define FSGD_WALK_ROW(P, G, M)                                                                                  \
  if constexpr (has(kLines, Line_##P##_##G##_##M)) {                                                            \
    if (line == Line_##P##_##G##_##M) return ThreadWalk<P, G, M, kEma, kCounts>(table, i).chunk(chunk, thread); \
  }
  FSGD_COMBINATIONS(FSGD_WALK_ROW)
#undef FSGD_WALK_ROW
}

// What the last block does in the end, where steps are counted: all others have read what it changes.
FSGD_INLINE void count_steps_thread(const Table& table, uint32_t thread) {
  if (!skips(table.scalars)) count_steps(table, thread, kThreads);
}

}  // namespace fused_sgd::cuda
