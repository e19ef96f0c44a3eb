// The walk over a range of chunks. CMake compiles this file once per instruction set, with FSGD_ISA as its name; the
// loops are plain, and the compiler turns them into vectors. Everything but the entry point has internal linkage, so
// that code of one instruction set is never linked in place of another's.
#include "walk.h"

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

// The first lines of the next row's tensors: the hardware follows a stream, but does not guess where the next begins.
// Tiny tensors are likely there already.
// (Always inlined: GCC takes a function that only prefetches for one without effects, and drops the call.)
template <int kColumns>
FSGD_INLINE void prefetch_row(const Row& row) {
  if (row.length < 128) return;
  for (int column = 0; column < kColumns; ++column) {
    const char* data = static_cast<const char*>(row.columns()[column]);
    for (int line = 0; line < 8; ++line) __builtin_prefetch(data + 64 * line);
  }
}

// A run of consecutive rows of one combination: the hyperparameters are cast once for as long as they stay the same.
// begin and end are the first row's first element and the last row's last one plus one.
template <class P, class G, class M>
void walk_rows(const Table& table, uint32_t first, uint32_t last, int64_t begin, int64_t end) {
  static_assert(P::kBlock == 1 && G::kBlock == 1, "only the momentum buffer may be stored in blocks");
  using Acc = typename P::Acc;
  using WalkElements = void (*)(void* const*, const Hyperparameters<Acc>&, int64_t, int64_t);
  Hyperparameters<Acc> h{Group{}, nullptr, false};
  WalkElements walk = nullptr;
  uint32_t kind = 0;
  for (uint32_t i = first; i <= last; ++i) {
    const Row& row = table.row(i);
    if (walk == nullptr || row.kind != kind) {
      kind = row.kind;
      h = Hyperparameters<Acc>(table.groups[row.group()], table.grad_scale, row.first_step());
      const bool usual = !h.has_grad_scale && !h.maximize && !h.nesterov && !h.first_step;
      if (!h.has_momentum) {
        walk = usual ? walk_elements<P, G, M, false, true> : walk_elements<P, G, M, false, false>;
      } else if constexpr (M::kBlock == 1) {
        walk = usual ? walk_elements<P, G, M, true, true> : walk_elements<P, G, M, true, false>;
      } else {
        walk = walk_blocks<P, G, M>;
      }
    }
    if (i < last) prefetch_row<P::kColumns + G::kColumns + M::kColumns>(table.row(i + 1));
    walk(row.columns(), h, i == first ? begin : 0, i == last ? end : row.length);
  }
}

using WalkRows = void (*)(const Table&, uint32_t first, uint32_t last, int64_t begin, int64_t end);

constexpr WalkRows kWalkRows[] = {
#define FSGD_WALK_ROWS(P, G, M) walk_rows<P, G, M>,
    FSGD_COMBINATIONS(FSGD_WALK_ROWS)
#undef FSGD_WALK_ROWS
};

}  // namespace

#define FSGD_CONCAT_(a, b) a##b
#define FSGD_CONCAT(a, b) FSGD_CONCAT_(a, b)

void FSGD_CONCAT(walk_, FSGD_ISA)(const Table& table, uint32_t chunk_begin, uint32_t chunk_end) {
  if (chunk_begin >= chunk_end) return;
  uint32_t first = table.find_row(chunk_begin);
  while (chunk_begin < chunk_end) {
    uint32_t last = first;
    const uint32_t combination = table.row(first).combination();
    while (table.row(last).chunk_end < chunk_end && table.row(last + 1).combination() == combination) ++last;
    const Row& row = table.row(last);
    const int64_t elements = table.chunk_elements(row);
    const int64_t begin = (chunk_begin - table.chunk_begin(first)) * elements;
    const bool whole = row.chunk_end <= chunk_end;
    const int64_t end = whole ? row.length : (chunk_end - table.chunk_begin(last)) * elements;
    kWalkRows[combination](table, first, last, begin, end);
    chunk_begin = row.chunk_end;
    first = last + 1;
  }
}

}  // namespace fused_sgd::cpu
