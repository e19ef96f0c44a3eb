// The walk over a range of chunks. CMake compiles this file once per instruction set, with FSGD_ISA as its name; the
// loops are plain, and the compiler turns them into vectors. Everything but the entry point has internal linkage, so
// that code of one instruction set is never linked in place of another's.
#include "walk.h"

#include "elements.h"

namespace fused_sgd::cpu {
namespace {

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

// Walks from element `begin` of row `first` to the end of the range, or to the first row of another combination, and
// returns the row to go on with. The hyperparameters are cast once for as long as they stay the same.
template <class P, class G, class M>
uint32_t walk_rows(const Table& table, uint32_t first, int64_t begin, uint32_t chunk_end) {
  static_assert(P::kBlock == 1 && G::kBlock == 1, "only the momentum buffer may be stored in blocks");
  using Acc = typename P::Acc;
  using WalkElements = void (*)(void* const*, const Hyperparameters<Acc>&, int64_t, int64_t);
  Hyperparameters<Acc> h{Group{}, nullptr, false};
  WalkElements walk = nullptr;
  const uint32_t combination = table.row(first).combination();
  uint32_t kind = 0;
  for (uint32_t i = first;; ++i, begin = 0) {
    const Row& row = table.row(i);
    if (walk == nullptr || row.kind != kind) {
      if (row.combination() != combination) return i;
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
    if (row.chunk_end >= chunk_end) {  // the last row of the range, perhaps not to its end
      const int64_t end = (chunk_end - table.chunk_begin(i)) * table.chunk_elements(P::kBytes);
      walk(row.columns(), h, begin, end < row.length ? end : row.length);
      return i + 1;
    }
    prefetch_row<P::kColumns + G::kColumns + M::kColumns>(table.row(i + 1));
    walk(row.columns(), h, begin, row.length);
  }
}

using WalkRows = uint32_t (*)(const Table&, uint32_t first, int64_t begin, uint32_t chunk_end);

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
  uint32_t row = table.find_row(chunk_begin);
  const Combination& combination = kCombinations[table.row(row).combination()];
  int64_t begin = (chunk_begin - table.chunk_begin(row)) * table.chunk_elements(1 << combination.parameter_log2_bytes);
  for (;;) {
    row = kWalkRows[table.row(row).combination()](table, row, begin, chunk_end);
    if (table.row(row - 1).chunk_end >= chunk_end) return;
    begin = 0;
  }
}

}  // namespace fused_sgd::cpu
