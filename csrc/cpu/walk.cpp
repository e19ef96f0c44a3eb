// The walk over a range of chunks. CMake compiles this file once per instruction set, with FSGD_ISA as its name; the
// loops are plain, and the compiler turns them into vectors. Everything but the entry point has internal linkage, so
// that code of one instruction set is never linked in place of another's.
#include "walk.h"

#include "elements.h"

namespace fused_sgd::cpu {
namespace {

// The first lines of a coming row's tensors: the hardware follows a stream, but does not guess where the next begins.
// Tiny tensors are likely there already, and of short ones the processor looks far enough ahead by itself.
// (Always inlined: GCC takes a function that only prefetches for one without effects, and drops the call.)
template <int kColumns>
FSGD_INLINE void prefetch_row(const Row& row) {
  if (row.length < 128) return;
  const int lines = row.length < 1024 ? 2 : 8;
  for (int column = 0; column < kColumns; ++column) {
    const char* data = static_cast<const char*>(row.columns()[column]);
    for (int line = 0; line < lines; ++line) __builtin_prefetch(data + 64 * line);
  }
}

template <class P, class G, class M>
using WalkElements = void (*)(void* const*, const Hyperparameters<typename P::Acc>&, int64_t, int64_t);

template <class P, class G, class M, bool kMomentum, bool kEma, bool kUsual>
void walk_elements(void* const* columns, const Hyperparameters<typename P::Acc>& hyperparameters, int64_t begin,
                   int64_t end) {
  static_assert(P::kBlock == 1 && G::kBlock == 1, "only the momentum buffer may be stored in blocks");
  Loop<P, G, M, Kind<kMomentum, kEma, kUsual>>(columns, hyperparameters).run(begin, end);
}

template <class P, class G, class M>
WalkElements<P, G, M> choose_walk(const Hyperparameters<typename P::Acc>& h) {
  if (!h.has_momentum) {
    if (is_usual(h)) return walk_elements<P, G, M, false, false, true>;
    return h.has_ema ? walk_elements<P, G, M, false, true, false> : walk_elements<P, G, M, false, false, false>;
  }
  if (is_usual(h)) return walk_elements<P, G, M, true, false, true>;
  return h.has_ema ? walk_elements<P, G, M, true, true, false> : walk_elements<P, G, M, true, false, false>;
}

// Walks from element `begin` of row `first` to the end of the range, or to the first row of another combination, and
// returns the row to go on with. The hyperparameters are cast once for as long as they stay the same.
template <class P, class G, class M>
uint32_t walk_rows(const Table& table, uint32_t first, int64_t begin, uint32_t chunk_end) {
  Hyperparameters<typename P::Acc> h{Group{}, Scalars{}, 0};
  WalkElements<P, G, M> walk = nullptr;
  const uint32_t combination = table.row(first).combination();
  uint32_t kind = 0;
  bool own_ratio = false;
  for (uint32_t i = first;; ++i, begin = 0) {
    const Row& row = table.row(i);
    if (walk == nullptr || row.kind != kind || own_ratio) {
      if (row.combination() != combination) return i;
      kind = row.kind;
      const Group& group = table.groups[row.group()];
      own_ratio = (group.lars & kLars) != 0;
      h = Hyperparameters<typename P::Acc>(group, table.scalars, i);
      walk = choose_walk<P, G, M>(h);
    }
    if (row.chunk_end >= chunk_end) {  // the last row of the range, perhaps not to its end
      const int64_t end = (chunk_end - table.chunk_begin(i)) * table.chunk_elements();
      walk(row.columns(), h, begin, end < row.length ? end : row.length);
      return i + 1;
    }
    // Two rows ahead: a small row is done before the next one could arrive.
    const uint32_t ahead = i + 2 < table.row_count ? i + 2 : i + 1;
    prefetch_row<P::kColumns + G::kColumns + M::kColumns>(table.row(ahead));
    walk(row.columns(), h, begin, row.length);
  }
}

// Where the tile after the one that begins at element `begin` lies, for tile_squares().
template <class F>
auto next_tile(void* const* columns, int64_t begin) {
  return [data = static_cast<const char*>(columns[0]) + (begin + kTile) * F::kBytes](int i) {
    __builtin_prefetch(data + i * F::kBytes);
  };
}

// The sums of squares of one tile of a row.
template <class P, class G, class M>
bool measure_tile(const Table& table, const Row& row, int64_t tile, double* grad_squares, double* param_squares) {
  using Acc = typename P::Acc;
  const P param(row.columns());
  const G grad(row.columns() + P::kColumns);
  const int64_t begin = tile << kLog2Tile;
  const int count = static_cast<int>(row.length - begin < kTile ? row.length - begin : kTile);
  const auto raw = [&](int i) { return static_cast<Acc>(grad.load(begin + i)); };
  const auto next_grad = next_tile<G>(row.columns() + P::kColumns, begin);
  if (table.scalars.grad_scale != nullptr) {
    const Acc scale = static_cast<Acc>(*table.scalars.grad_scale);
    *grad_squares = tile_squares<Acc>(count, [&](int i) { return divide(raw(i), scale); }, next_grad);
  } else {
    *grad_squares = tile_squares<Acc>(count, raw, next_grad);
  }
  if (param_squares != nullptr) {
    const auto value = [&](int i) { return static_cast<Acc>(param.load(begin + i)); };
    *param_squares = tile_squares<Acc>(count, value, next_tile<P>(row.columns(), begin));
  }
  // An element that is not finite makes the sum so, whatever it is divided by. So may finite ones that overflow.
  if (is_nonfinite(*grad_squares) == 0) return false;
  decltype(is_nonfinite(Acc())) nonfinite = 0;
  for (int i = 0; i < count; ++i) nonfinite |= is_nonfinite(raw(i));
  return nonfinite != 0;
}

using WalkRows = uint32_t (*)(const Table&, uint32_t first, int64_t begin, uint32_t chunk_end);

constexpr WalkRows kWalkRows[] = {
#define FSGD_WALK_ROWS(P, G, M) walk_rows<P, G, M>,
    FSGD_COMBINATIONS(FSGD_WALK_ROWS)
#undef FSGD_WALK_ROWS
};

using MeasureTile = bool (*)(const Table&, const Row&, int64_t tile, double* grad_squares, double* param_squares);

constexpr MeasureTile kMeasureTile[] = {
#define FSGD_MEASURE_TILE(P, G, M) measure_tile<P, G, M>,
    FSGD_COMBINATIONS(FSGD_MEASURE_TILE)
#undef FSGD_MEASURE_TILE
};

}  // namespace

#define FSGD_CONCAT_(a, b) a##b
#define FSGD_CONCAT(a, b) FSGD_CONCAT_(a, b)

void FSGD_CONCAT(walk_, FSGD_ISA)(const Table& table, uint32_t chunk_begin, uint32_t chunk_end) {
  if (chunk_begin >= chunk_end) return;
  uint32_t row = table.find_row(chunk_begin);
  int64_t begin = (chunk_begin - table.chunk_begin(row)) * table.chunk_elements();
  for (;;) {
    row = kWalkRows[table.row(row).combination()](table, row, begin, chunk_end);
    if (table.row(row - 1).chunk_end >= chunk_end) return;
    begin = 0;
  }
}

bool FSGD_CONCAT(measure_, FSGD_ISA)(const Table& table, uint32_t chunk_begin, uint32_t chunk_end, double* grad_squares,
                                     double* param_squares) {
  bool nonfinite = false;
  const uint32_t tiles_a_chunk = 1u << (table.log2_chunk - kLog2Tile);
  uint32_t i = chunk_begin < chunk_end ? table.find_row(chunk_begin) : 0;
  for (uint32_t chunk = chunk_begin; chunk < chunk_end; ++chunk) {
    while (table.row(i).chunk_end <= chunk) ++i;
    const Row& row = table.row(i);
    const int64_t first = int64_t{chunk - table.chunk_begin(i)} * tiles_a_chunk;
    for (int64_t tile = first; tile < first + tiles_a_chunk && tile << kLog2Tile < row.length; ++tile) {
      const std::size_t slot = table.first_tile(i) + static_cast<std::size_t>(tile);
      nonfinite |= kMeasureTile[row.combination()](table, row, tile, grad_squares + slot,
                                                   param_squares == nullptr ? nullptr : param_squares + slot);
    }
  }
  return nonfinite;
}

}  // namespace fused_sgd::cpu
