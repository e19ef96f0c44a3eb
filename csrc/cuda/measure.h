// The first pass of a step that must see every gradient before it writes: sums of squares by the scheme of squares.h,
// and whether a gradient is not finite. A block takes one chunk of the table, tile by tile; the last block to finish
// adds up.
//
// The threads of a block work in phases with a barrier after each. `Each` runs a phase: on a GPU for the calling
// thread, with __syncthreads() behind it; in tests/native/test_grid.cpp for one thread after the other.
#pragma once

#include "arguments.h"
#include "walk.h"

namespace fused_sgd::cuda {

inline constexpr uint32_t kWarp = 32;
inline constexpr int kThreadLanes = kLanes / kWarp;  // neighbours: 16 bytes of bf16, 32 of fp32
static_assert(kThreads == kLanes && kThreads / kWarp == kPairs, "a warp takes one pair of rows, a thread one lane");

// What the threads of a block share.
struct BlockMemory {
  double pairs[kPairs][kLanes];
  double lanes[kLanes];
  uint32_t large_rows[kThreads];
  uint32_t large_count;
};

#if defined(__CUDA_ARCH__)
FSGD_INLINE uint32_t take_number(uint32_t* counter) { return atomicAdd(counter, 1u); }
FSGD_INLINE void raise_flag(uint32_t* flag) { atomicOr(flag, 1u); }
template <class T>
FSGD_INLINE T read_written(const T* value) {  // by another block
  return __ldcg(value);
}
#else
FSGD_INLINE uint32_t take_number(uint32_t* counter) { return (*counter)++; }
FSGD_INLINE void raise_flag(uint32_t* flag) { *flag |= 1u; }
template <class T>
FSGD_INLINE T read_written(const T* value) {
  return *value;
}
#endif

// The tree over 256 lanes, the result in memory.lanes[0]; two phases.
template <class Each>
FSGD_INLINE void fold_lanes(BlockMemory& memory, Each each) {
  each([&](uint32_t thread) {
    if (thread >= kWarp) return;
    for (uint32_t half = kLanes / 2; half >= kWarp; half /= 2) {
      for (uint32_t lane = thread; lane < half; lane += kWarp) memory.lanes[lane] += memory.lanes[lane + half];
    }
  });
  each([&](uint32_t thread) {
    if (thread == 0) fold(memory.lanes, kWarp);
  });
}

// The sum of squares of one tile, in memory.lanes[0]. load(i, x): eight elements from element i of the row on.
template <class Acc, class Load, class Each>
FSGD_INLINE void sum_tile(BlockMemory& memory, int64_t begin, int64_t length, Load load, Each each) {
  each([&](uint32_t thread) {
    const uint32_t pair = thread / kWarp, lane = thread % kWarp * kThreadLanes;
    const int64_t first = begin + pair * 2 * kLanes + lane;
    Acc x[kThreadLanes], y[kThreadLanes];
    load(first, length - first, x);
    load(first + kLanes, length - first - kLanes, y);
    FSGD_UNROLL
    for (int k = 0; k < kThreadLanes; ++k) {
      memory.pairs[pair][lane + k] = add_square(square(static_cast<double>(x[k])), static_cast<double>(y[k]));
    }
  });
  each([&](uint32_t thread) {
    double sum = 0;
    FSGD_UNROLL
    for (int pair = 0; pair < kPairs; ++pair) sum += memory.pairs[pair][thread];
    memory.lanes[thread] = sum;
  });
  fold_lanes(memory, each);
}

// Eight elements from element i on, of which `left` are the tensor's; the others are 0.
template <class Acc, class F>
FSGD_INLINE void load_lanes(const F& format, int64_t i, int64_t left, bool wide, Acc (&x)[kThreadLanes]) {
  if (left >= kThreadLanes) {
    typename F::Acc values[kThreadLanes];
    const auto packed = format.template load_pack<kThreadLanes>(i, wide);
    F::unpack(packed, values);
    FSGD_UNROLL
    for (int k = 0; k < kThreadLanes; ++k) x[k] = static_cast<Acc>(values[k]);
  } else {
    FSGD_UNROLL
    for (int k = 0; k < kThreadLanes; ++k) x[k] = k < left ? static_cast<Acc>(format.load(i + k)) : Acc(0);
  }
}

// The tiles of one chunk of one row.
template <class P, class G, class Each>
FSGD_INLINE void measure_chunk(const Table& table, const Sums& sums, uint32_t row_number, int64_t chunk,
                               BlockMemory& memory, Each each) {
  using Acc = typename P::Acc;
  const Row& row = table.row(row_number);
  const P param(row.columns());
  const G grad(row.columns() + P::kColumns);
  const bool scaled = table.scalars.grad_scale != nullptr;
  const Acc scale = scaled ? static_cast<Acc>(*table.scalars.grad_scale) : Acc(1);
  const bool wide_grad = grad.aligned(0), wide_param = param.aligned(0);
  const int64_t first = chunk << (table.log2_chunk - kLog2Tile);
  for (int64_t tile = first; tile < first + (int64_t{1} << (table.log2_chunk - kLog2Tile)); ++tile) {
    const int64_t begin = tile << kLog2Tile;
    if (begin >= row.length) return;
    const std::size_t slot = table.first_tile(row_number) + static_cast<std::size_t>(tile);
    const auto load_grad = [&](int64_t i, int64_t left, Acc(&x)[kThreadLanes]) {
      load_lanes(grad, i, left, wide_grad, x);
      bool nonfinite = false;
      FSGD_UNROLL
      for (int k = 0; k < kThreadLanes; ++k) nonfinite = nonfinite || is_nonfinite(x[k]) != 0;
      if (nonfinite) raise_flag(sums.nonfinite);
      if (!scaled) return;
      FSGD_UNROLL
      for (int k = 0; k < kThreadLanes; ++k) x[k] = divide(x[k], scale);
    };
    sum_tile<Acc>(memory, begin, row.length, load_grad, each);
    each([&](uint32_t thread) {
      if (thread == 0) sums.grad_tiles[slot] = memory.lanes[0];
    });
    if (sums.param_tiles == nullptr) continue;
    const auto load_param = [&](int64_t i, int64_t left, Acc(&x)[kThreadLanes]) {
      load_lanes(param, i, left, wide_param, x);
    };
    sum_tile<Acc>(memory, begin, row.length, load_param, each);
    each([&](uint32_t thread) {
      if (thread == 0) sums.param_tiles[slot] = memory.lanes[0];
    });
  }
}

// One block. kCombination as for walk_thread().
template <int kCombination, class Each>
FSGD_INLINE void measure_block(const Table& table, const Sums& sums, uint32_t block, BlockMemory& memory, Each each) {
  const uint32_t i = table.find_row(block);
  const int64_t chunk = block - table.chunk_begin(i);
  const int line = kCombination < 0 ? static_cast<int>(table.row(i).combination()) : kCombination;
#define FSGD_MEASURE_ROW(P, G, M)                                                                      \
  if constexpr (has_line(kCombination, Line_##P##_##G##_##M)) {                                        \
    if (line == Line_##P##_##G##_##M) return measure_chunk<P, G>(table, sums, i, chunk, memory, each); \
  }
  FSGD_COMBINATIONS(FSGD_MEASURE_ROW)
#undef FSGD_MEASURE_ROW
}

// The sum over values[0], values[stride], … by the whole block, in memory.lanes[0].
template <class Each>
FSGD_INLINE void sum_strided(BlockMemory& memory, const double* values, int64_t count, int64_t stride, Each each) {
  each([&](uint32_t thread) {
    double sum = 0;
    for (int64_t k = thread; k < count; k += kLanes) sum += read_written(values + k * stride);
    memory.lanes[thread] = sum;
  });
  fold_lanes(memory, each);
}

// The same by one thread, for a few.
FSGD_INLINE double sum_few(const double* values, int64_t count) {
  constexpr int kFew = 8;
  double lanes[kFew];
  FSGD_UNROLL
  for (int lane = 0; lane < kFew; ++lane) lanes[lane] = lane < count ? read_written(values + lane) : 0.0;
  FSGD_UNROLL
  for (int half = kFew / 2; half > 0; half /= 2) {
    FSGD_UNROLL
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}

// The last block: from tiles to rows, from rows to the total. Small rows are a thread's each, large ones the block's.
template <class Each>
FSGD_INLINE void add_up(const Table& table, const Sums& sums, BlockMemory& memory, Each each) {
  const auto sum_row = [&](uint32_t i, auto sum) {
    const int64_t tiles = tiles_of(table.row(i));
    if (sums.param_tiles != nullptr) sum(sums.param_tiles + table.first_tile(i), tiles, sums.row_squares + 2 * i);
    sum(sums.grad_tiles + table.first_tile(i), tiles, sums.row_squares + 2 * i + 1);
  };
  for (uint32_t begin = 0; begin < table.row_count; begin += kThreads) {
    each([&](uint32_t thread) {
      if (thread == 0) memory.large_count = 0;
    });
    each([&](uint32_t thread) {
      const uint32_t i = begin + thread;
      if (i >= table.row_count) return;
      if (tiles_of(table.row(i)) > 8) {
        memory.large_rows[take_number(&memory.large_count)] = i;
        return;
      }
      sum_row(i, [](const double* values, int64_t tiles, double* result) { *result = sum_few(values, tiles); });
    });
    for (uint32_t k = 0; k < memory.large_count; ++k) {
      sum_row(memory.large_rows[k], [&](const double* values, int64_t tiles, double* result) {
        sum_strided(memory, values, tiles, 1, each);
        each([&](uint32_t thread) {
          if (thread == 0) *result = memory.lanes[0];
        });
      });
    }
    each([](uint32_t) {});  // large_count is read by all before it is reset
  }
  sum_strided(memory, sums.row_squares + 1, table.row_count, 2, each);
  each([&](uint32_t thread) {
    if (thread != 0) return;
    sums.totals[0] = memory.lanes[0];
    sums.totals[1] = read_written(sums.nonfinite) != 0 ? 1 : 0;
    *sums.nonfinite = 0;
    *sums.ticket = 0;
  });
}

}  // namespace fused_sgd::cuda
