// The walk over a range of chunks. CMake compiles this file once per instruction set, with FSGD_ISA as its name; the
// loops are plain, and the compiler turns them into vectors. Everything but the entry point has internal linkage, so
// that code of one instruction set is never linked in place of another's.
#include "walk.h"

#include "elements.h"
#include "tiles.h"

namespace fused_sgd::cpu {
namespace {

// The first lines of a coming row's tensors: the hardware follows a stream, but does not guess where the next begins.
// Tiny tensors are likely there already.
// (Always inlined: GCC takes a function that only prefetches for one without effects, and drops the call.)
FSGD_INLINE void prefetch_row(const Row& row, int columns) {
  if (row.length < 128) return;
  for (int column = 0; column < columns; ++column) {
    const char* data = static_cast<const char*>(row.columns()[column]);
    for (int line = 0; line < 8; ++line) __builtin_prefetch(data + 64 * line);
  }
}

template <class P, class G, class M>
using WalkElements = void (*)(void* const*, const Hyperparameters<typename P::Acc>&, int64_t, int64_t);

template <class P, class G, class M, bool kMomentum, bool kEma, Terms kTerms>
void walk_elements(void* const* columns, const Hyperparameters<typename P::Acc>& hyperparameters, int64_t begin,
                   int64_t end) {
  static_assert(P::kBlock == 1 && G::kBlock == 1, "only the momentum buffer may be stored in blocks");
  Loop<P, G, M, Kind<kMomentum, kEma, kTerms>>(columns, hyperparameters).run(begin, end);
}

template <class P, class G, class M>
WalkElements<P, G, M> choose_walk(const Hyperparameters<typename P::Acc>& h) {
  if constexpr (kHasFasterLoops) {
    const bool scaled = h.has_grad_scale, plain = !scaled && !h.nesterov;
    if (plain && !h.has_momentum && !h.has_ema) return walk_elements<P, G, M, false, false, Terms::Plain>;
    if (plain && h.has_momentum && h.has_ema) return walk_elements<P, G, M, true, true, Terms::Plain>;
    if (!scaled && h.has_momentum && !h.has_ema) {
      if (h.nesterov) return walk_elements<P, G, M, true, false, Terms::Nesterov>;
      if (h.grad_factor != 1 || h.decay_factor != 1 || h.trust_ratio != 1) {
        return walk_elements<P, G, M, true, false, Terms::Plain>;
      }
      return h.has_weight_decay ? walk_elements<P, G, M, true, false, Terms::UsualWithDecay>
                                : walk_elements<P, G, M, true, false, Terms::UsualWithoutDecay>;
    }
  }
  if (h.has_momentum) {
    return h.has_ema ? walk_elements<P, G, M, true, true, Terms::Any> : walk_elements<P, G, M, true, false, Terms::Any>;
  }
  return h.has_ema ? walk_elements<P, G, M, false, true, Terms::Any> : walk_elements<P, G, M, false, false, Terms::Any>;
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
  // Rows have no momentum column where no row has momentum.
  const int columns = std::min(P::kColumns + G::kColumns + M::kColumns, table.columns());
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
      const int64_t end = (chunk_end - table.chunk_begin(i)) * kChunk;
      walk(row.columns(), h, begin, end < row.length ? end : row.length);
      return i + 1;
    }
    // Two rows ahead: a small row is done before the next one could arrive.
    const uint32_t ahead = i + 2 < table.row_count ? i + 2 : i + 1;
    prefetch_row(table.row(ahead), columns);
    walk(row.columns(), h, begin, row.length);
  }
}

constexpr int kTilesAtOnce = 3;  // streams that are read side by side
constexpr int64_t kStream = 64;  // tiles, that a stream has at most

// The sums of squares of some of a row's tiles: of kTilesAtOnce, which are whole and `apart` from each other, or of
// one.
template <class Load>
void square_some(Load load, int64_t length, int64_t first, int count, int64_t apart, double* squares) {
  const int64_t begin = first << kLog2Tile;
  const auto from_begin = [&](int64_t i) __attribute__((always_inline)) { return load(begin + i); };
  if (count == kTilesAtOnce) return square_tiles<kTilesAtOnce>(from_begin, apart, squares);
  if (length - begin >= kTile) return square_tiles<1>(from_begin, 0, squares);
  *squares = square_part(static_cast<int>(length - begin), from_begin);
}

// Tiles [tile, tile_end) of a row, whose sums go to [tile]. Returns whether a gradient is not finite.
template <class P, class G>
bool measure_row(const Table& table, const Row& row, int64_t tile, int64_t tile_end, double* grad_squares,
                 double* param_squares) {
  using Acc = typename P::Acc;
  const P param(row.columns());
  const G grad(row.columns() + P::kColumns);
  const bool scaled = table.scalars.grad_scale != nullptr;
  const Acc scale = scaled ? static_cast<Acc>(*table.scalars.grad_scale) : Acc(1);
  const auto value = [&](int64_t i) { return static_cast<Acc>(param.load(i)); };
  const auto raw = [&](int64_t i) { return static_cast<Acc>(grad.load(i)); };
  const auto unscaled = [&](int64_t i) { return divide(raw(i), scale); };
  decltype(is_nonfinite(Acc())) nonfinite = 0;
  const auto some = [&](int64_t first, int count, int64_t apart) {
    if (scaled) {
      square_some(unscaled, row.length, first, count, apart, grad_squares + first);
    } else {
      square_some(raw, row.length, first, count, apart, grad_squares + first);
    }
    if (param_squares != nullptr) square_some(value, row.length, first, count, apart, param_squares + first);
    // An element that is not finite makes its sum so, whatever it is divided by. So may finite ones that overflow.
    for (int k = 0; k < count; ++k) {
      const int64_t tile = first + k * apart;
      if (is_nonfinite(grad_squares[tile]) == 0) continue;
      const int64_t begin = tile << kLog2Tile, end = std::min(begin + kTile, row.length);
      for (int64_t i = begin; i < end; ++i) nonfinite |= is_nonfinite(raw(i));
    }
  };
  while (tile < tile_end) {
    const int64_t whole = std::min(tile_end, row.length >> kLog2Tile) - tile;
    const int64_t apart = std::min(kStream, whole / kTilesAtOnce);
    for (int64_t k = 0; k < apart; ++k) some(tile + k, kTilesAtOnce, apart);
    tile += apart * kTilesAtOnce;
    if (apart == 0) some(tile++, 1, 0);
  }
  return nonfinite != 0;
}

using WalkRows = uint32_t (*)(const Table&, uint32_t first, int64_t begin, uint32_t chunk_end);

constexpr WalkRows kWalkRows[] = {
#define FSGD_WALK_ROWS(P, G, M) walk_rows<P, G, M>,
    FSGD_COMBINATIONS(FSGD_WALK_ROWS)
#undef FSGD_WALK_ROWS
};

using MeasureRow = bool (*)(const Table&, const Row&, int64_t tile, int64_t tile_end, double* grad_squares,
                            double* param_squares);

constexpr MeasureRow kMeasureRow[] = {
#define FSGD_MEASURE_ROW(P, G, M) measure_row<P, G>,
    FSGD_COMBINATIONS(FSGD_MEASURE_ROW)
#undef FSGD_MEASURE_ROW
};

}  // namespace

#define FSGD_CONCAT_(a, b) a##b
#define FSGD_CONCAT(a, b) FSGD_CONCAT_(a, b)

void FSGD_CONCAT(walk_, FSGD_ISA)(const Table& table, uint32_t chunk_begin, uint32_t chunk_end) {
  if (chunk_begin >= chunk_end) return;
  uint32_t row = table.find_row(chunk_begin);
  int64_t begin = (chunk_begin - table.chunk_begin(row)) * kChunk;
  for (;;) {
    row = kWalkRows[table.row(row).combination()](table, row, begin, chunk_end);
    if (table.row(row - 1).chunk_end >= chunk_end) return;
    begin = 0;
  }
}

bool FSGD_CONCAT(measure_, FSGD_ISA)(const Table& table, uint32_t chunk_begin, uint32_t chunk_end, double* grad_squares,
                                     double* param_squares) {
  bool nonfinite = false;
  for (uint32_t i = chunk_begin < chunk_end ? table.find_row(chunk_begin) : 0; chunk_begin < chunk_end; ++i) {
    const Row& row = table.row(i);
    const uint32_t row_begin = table.chunk_begin(i), end = std::min(chunk_end, row.chunk_end);
    nonfinite |=
        kMeasureRow[row.combination()](table, row, chunk_begin - row_begin, end - row_begin, grad_squares + row_begin,
                                       param_squares == nullptr ? nullptr : param_squares + row_begin);
    chunk_begin = end;
  }
  return nonfinite;
}

}  // namespace fused_sgd::cpu
