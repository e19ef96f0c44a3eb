// The first pass of a step that must see every gradient before it writes: sums of squares by the scheme of squares.h,
// and whether a gradient is not finite. Each warp takes a chunk of the table, which needs no barrier. The block that
// ends a row adds up the row's chunks, and the block that ends the last row adds up all rows.
//
// A block's threads work in phases with a barrier after each. `Each` runs a phase: on a GPU for the calling thread and
// with __syncthreads() behind it; in tests/native/test_grid.cpp for one thread after the other.
#pragma once

#include <utility>

#include "arguments.h"
#include "walk.h"

namespace fused_sgd::cuda {

inline constexpr uint32_t kWarp = 32;
inline constexpr uint32_t kMeasureThreads = 128;  // of a block
inline constexpr uint32_t kMeasureChunks = kMeasureThreads / kWarp;
inline constexpr int kThreadLanes = kLanes / int{kWarp};  // neighbours: 16 bytes of bf16, 32 of fp32
using Warp = Neighbours<kWarp>;

// What the threads of a block share.
struct BlockMemory {
  double lanes[kLanes];
  double sum;
  uint32_t first_row;              // of the block's first chunk
  uint32_t ended[kMeasureChunks];  // rows that this block ended
  uint32_t ended_count;
  bool ended_all;
};

#if defined(__CUDA_ARCH__)
FSGD_INLINE uint32_t add_to(uint32_t* counter, uint32_t part) { return atomicAdd(counter, part); }
FSGD_INLINE void raise_flag(uint32_t* flag) { atomicOr(flag, 1u); }
FSGD_INLINE void fence() { __threadfence(); }
template <class T>
FSGD_INLINE T read_written(const T* value) {  // by another block
  return __ldcg(value);
}
#else
FSGD_INLINE uint32_t add_to(uint32_t* counter, uint32_t part) { return std::exchange(*counter, *counter + part); }
FSGD_INLINE void raise_flag(uint32_t* flag) { *flag |= 1u; }
FSGD_INLINE void fence() {}
template <class T>
FSGD_INLINE T read_written(const T* value) {
  return *value;
}
#endif

// The tree over 256 lanes, of which every thread of a warp has eight neighbours.
FSGD_INLINE double fold_warp(double (&lanes)[Warp::kParts][kThreadLanes]) {
#if defined(__CUDA_ARCH__)
  // Of two threads that add theirs, one goes on with the lower half and one with the upper.
  const auto add_other = [](double keep, double give, int distance) {
    return keep + __shfl_xor_sync(~0u, give, distance);
  };
  FSGD_UNROLL
  for (int half = kThreadLanes / 2; half > 0; half /= 2) {
    const int distance = half * 4;
    const bool upper = (threadIdx.x & distance) != 0;
    FSGD_UNROLL
    for (int k = 0; k < half; ++k) {
      const double low = lanes[0][k], high = lanes[0][k + half];
      lanes[0][k] = add_other(upper ? high : low, upper ? low : high, distance);
    }
  }
  double sum = lanes[0][0];
  FSGD_UNROLL
  for (int distance : {2, 1}) sum = add_other(sum, sum, distance);
  // Threads' halves differ by their numbers' bits 4, 3 and 2: the rest of the tree.
  FSGD_UNROLL
  for (int distance : {16, 8, 4}) sum = add_other(sum, sum, distance);
  return sum;
#else
  return fold(&lanes[0][0], kLanes);
#endif
}

template <class F, class Packed, class Acc>
FSGD_INLINE void unpack_lanes(const Packed& packed, Acc (&x)[kThreadLanes]) {
  typename F::Acc values[kThreadLanes];
  F::unpack(packed, values);
  FSGD_UNROLL
  for (int k = 0; k < kThreadLanes; ++k) x[k] = static_cast<Acc>(values[k]);
}

// Eight elements from element i on, of which `left` are the tensor's; the others are 0.
template <class Acc, class F>
FSGD_INLINE void load_lanes(const F& format, int64_t i, int64_t left, bool wide, Acc (&x)[kThreadLanes]) {
  if (left >= kThreadLanes) {
    unpack_lanes<F>(format.template load_pack<kThreadLanes>(i, wide), x);
  } else {
    FSGD_UNROLL
    for (int k = 0; k < kThreadLanes; ++k) x[k] = k < left ? static_cast<Acc>(format.load(i + k)) : Acc(0);
  }
}

// One thread's lanes of a tile, from element `first` on, of which `left` elements are the tensor's. look(x) is shown
// all of them, and may change them.
template <class Acc, class F, class Look>
FSGD_INLINE void sum_lanes(const F& format, int64_t first, int64_t left, bool wide, Look look,
                           double (&sums)[kThreadLanes]) {
  FSGD_UNROLL
  for (int k = 0; k < kThreadLanes; ++k) sums[k] = 0;
  const auto add_pair = [&](Acc(&x)[kThreadLanes], Acc(&y)[kThreadLanes]) {
    look(x);
    look(y);
    FSGD_UNROLL
    for (int k = 0; k < kThreadLanes; ++k)
      sums[k] += add_square(square(static_cast<double>(x[k])), static_cast<double>(y[k]));
  };
  // All loads of two pairs come before the first sum. What they bring stays packed, to save registers; doubles are too
  // large for that.
  if constexpr (sizeof(typename F::Acc) == 4) {
    constexpr int kAhead = 4;  // rows of 256 lanes
    if (wide && left >= kTile - kLanes + kThreadLanes) {
      for (int row = 0; row < 2 * kPairs; row += kAhead) {
        typename F::template Packed<kThreadLanes> packed[kAhead];
        FSGD_UNROLL
        for (int k = 0; k < kAhead; ++k) {
          packed[k] = format.template load_pack<kThreadLanes>(first + (row + k) * kLanes, true);
        }
        FSGD_UNROLL
        for (int k = 0; k < kAhead; k += 2) {
          Acc x[kThreadLanes], y[kThreadLanes];
          unpack_lanes<F>(packed[k], x);
          unpack_lanes<F>(packed[k + 1], y);
          add_pair(x, y);
        }
      }
      return;
    }
  }
  for (int64_t i = 0; i < kTile && i < left; i += 2 * kLanes) {
    Acc x[kThreadLanes], y[kThreadLanes];
    load_lanes(format, first + i, left - i, wide, x);
    load_lanes(format, first + i + kLanes, left - i - kLanes, wide, y);
    add_pair(x, y);
  }
}

// The sum of squares of one tile, for the first thread of a warp.
template <class Acc, class F, class Look>
FSGD_INLINE double sum_tile(const F& format, int64_t begin, int64_t length, uint32_t thread, Look look) {
  const bool wide = format.aligned(0);
  double lanes[Warp::kParts][kThreadLanes];
  FSGD_UNROLL
  for (int part = 0; part < Warp::kParts; ++part) {
    const int64_t first = begin + (thread % kWarp + part) * kThreadLanes;
    sum_lanes<Acc>(format, first, length - first, wide, look, lanes[part]);
  }
  return fold_warp(lanes);
}

// The same for a gradient, which is looked at and divided by the step's scale.
template <class G, class Acc>
FSGD_INLINE double sum_grad_chunk_of(const Table& table, const Sums& sums, const G& grad, int64_t begin, int64_t length,
                                     uint32_t thread) {
  const bool scaled = table.scalars.grad_scale != nullptr;
  const Acc scale = scaled ? static_cast<Acc>(*table.scalars.grad_scale) : Acc(1);
  return sum_tile<Acc>(grad, begin, length, thread, [&](Acc(&x)[kThreadLanes]) {
    bool nonfinite = false;
    FSGD_UNROLL
    for (int k = 0; k < kThreadLanes; ++k) nonfinite = nonfinite || is_nonfinite(x[k]) != 0;
    if (nonfinite) raise_flag(sums.nonfinite);
    if (!scaled) return;
    FSGD_UNROLL
    for (int k = 0; k < kThreadLanes; ++k) x[k] = divide(x[k], scale);
  });
}

// What has the same gradient and is computed in the same type has one piece of code here, whatever else differs; and so
// has what has the same parameter: that of the lowest line among them which a kernel has code for.
#define FSGD_BIT(condition, P, G, M) | ((condition) ? line_bit(Line_##P##_##G##_##M) : Lines::None)
template <class Gradient, class Acc>
FSGD_INLINE constexpr Lines lines_with_gradient() {
#define FSGD_LINE_BIT(P, G, M) FSGD_BIT((std::is_same_v<G, Gradient> && std::is_same_v<P::Acc, Acc>), P, G, M)
  return Lines::None FSGD_COMBINATIONS(FSGD_LINE_BIT);
#undef FSGD_LINE_BIT
}
template <class Parameter>
FSGD_INLINE constexpr Lines lines_with_parameter() {
#define FSGD_LINE_BIT(P, G, M) FSGD_BIT((std::is_same_v<P, Parameter>), P, G, M)
  return Lines::None FSGD_COMBINATIONS(FSGD_LINE_BIT);
#undef FSGD_LINE_BIT
}
FSGD_INLINE constexpr Lines lines_with_columns(int columns) {  // of the parameter
#define FSGD_LINE_BIT(P, G, M) FSGD_BIT(P::kColumns == columns, P, G, M)
  return Lines::None FSGD_COMBINATIONS(FSGD_LINE_BIT);
#undef FSGD_LINE_BIT
}
#undef FSGD_BIT
static_assert((lines_with_columns(1) | lines_with_columns(2)) == kAllLines);

// The sum of squares of one tile's gradients, for the first thread of a warp; and of its parameters.
template <Lines kLines>
FSGD_INLINE double sum_grad_chunk(const Table& table, const Sums& sums, const Row& row, int line, int64_t begin,
                                  uint32_t thread) {
  void* const* column = row.columns() + (has(lines_with_columns(2), line) ? 2 : 1);
#define FSGD_SUM(P, G, M)                                                                                            \
  {                                                                                                                  \
    constexpr Lines kAlike = lines_with_gradient<G, P::Acc>() & kLines;                                              \
    if constexpr (first_line(kAlike) == Line_##P##_##G##_##M) {                                                      \
      if (has(kAlike, line)) return sum_grad_chunk_of<G, P::Acc>(table, sums, G(column), begin, row.length, thread); \
    }                                                                                                                \
  }
  FSGD_COMBINATIONS(FSGD_SUM)
#undef FSGD_SUM
  return 0;
}
template <Lines kLines>
FSGD_INLINE double sum_param_chunk(const Row& row, int line, int64_t begin, uint32_t thread) {
#define FSGD_SUM(P, G, M)                                                                                     \
  {                                                                                                           \
    constexpr Lines kAlike = lines_with_parameter<P>() & kLines;                                              \
    if constexpr (first_line(kAlike) == Line_##P##_##G##_##M) {                                               \
      if (has(kAlike, line)) {                                                                                \
        return sum_tile<P::Acc>(P(row.columns()), begin, row.length, thread, [](P::Acc(&)[kThreadLanes]) {}); \
      }                                                                                                       \
    }                                                                                                         \
  }
  FSGD_COMBINATIONS(FSGD_SUM)
#undef FSGD_SUM
  return 0;
}

// One chunk, by a warp. Returns its row.
template <Lines kLines, bool kFar>
FSGD_INLINE uint32_t measure_chunk(const Table& table, const Sums& sums, uint32_t chunk, uint32_t thread) {
  const uint32_t i = find_row<kFar>(table, chunk);
  const Row& row = table.row(i);
  constexpr int kOnly = only_line(kLines);
  const int line = kOnly < 0 ? static_cast<int>(row.combination()) : kOnly;
  const int64_t begin = (chunk - table.chunk_begin(i)) * kChunk;
  const double grad_sum = sum_grad_chunk<kLines>(table, sums, row, line, begin, thread);
  if (thread % kWarp == 0) sums.grad_squares[chunk] = grad_sum;
  if (sums.param_squares != nullptr) {
    const double param_sum = sum_param_chunk<kLines>(row, line, begin, thread);
    if (thread % kWarp == 0) sums.param_squares[chunk] = param_sum;
  }
  return i;
}

// Adds to a counter that is 0 before and after. Whether that makes it complete.
FSGD_INLINE bool completes(uint32_t* counter, uint32_t part, uint32_t all) {
  if (part == all) return true;
  if (add_to(counter, part) + part != all) return false;
  *counter = 0;
  return true;
}

// The sum over values[0], values[stride], … as fold_strided() has it, in memory.sum.
template <class Each>
FSGD_INLINE void sum_strided(BlockMemory& memory, const double* values, int64_t count, int64_t stride, Each each) {
  constexpr int kAhead = 8;
  each([&](uint32_t thread) {
    for (uint32_t lane = thread; lane < kLanes; lane += kMeasureThreads) {
      double sum = 0;
      for (int64_t i = lane; i < count; i += kAhead * kLanes) {
        double some[kAhead];
        FSGD_UNROLL
        for (int k = 0; k < kAhead; ++k) {
          some[k] = i + k * kLanes < count ? read_written(values + (i + k * kLanes) * stride) : 0.0;
        }
        FSGD_UNROLL
        for (int k = 0; k < kAhead; ++k) sum += some[k];
      }
      memory.lanes[lane] = sum;
    }
  });
  each([&](uint32_t thread) {
    if (thread >= kWarp || !Warp::takes_part(thread)) return;
    double lanes[Warp::kParts][kThreadLanes];
    FSGD_UNROLL
    for (int part = 0; part < Warp::kParts; ++part) {
      FSGD_UNROLL
      for (int k = 0; k < kThreadLanes; ++k) lanes[part][k] = memory.lanes[(thread + part) * kThreadLanes + k];
    }
    const double sum = fold_warp(lanes);
    if (thread == 0) memory.sum = sum;
  });
}

// The same for a few values, by one thread.
inline constexpr uint32_t kFew = 4;
FSGD_INLINE double sum_few(const double* values, uint32_t count) {
  double lanes[kFew];
  FSGD_UNROLL
  for (uint32_t lane = 0; lane < kFew; ++lane) lanes[lane] = lane < count ? read_written(values + lane) : 0.0;
  return (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]);
}

// The rows that this block ended: short ones are a thread's each, long ones the block's.
template <class Each>
FSGD_INLINE void add_up_ended(const Table& table, const Sums& sums, BlockMemory& memory, Each each) {
  const auto squares_of = [&](uint32_t i, uint32_t column) {  // 0: of the parameter, 1: of the gradient
    return (column == 0 ? sums.param_squares : sums.grad_squares) + table.chunk_begin(i);
  };
  const uint32_t first_column = sums.param_squares != nullptr ? 0 : 1;
  each([&](uint32_t thread) {
    const uint32_t column = thread % 2;
    if (thread / 2 >= memory.ended_count || column < first_column) return;
    const uint32_t i = memory.ended[thread / 2], chunks = table.chunks_of(i);
    if (chunks <= kFew) sums.row_squares[2 * i + column] = sum_few(squares_of(i, column), chunks);
  });
  for (uint32_t k = 0; k < memory.ended_count; ++k) {
    const uint32_t i = memory.ended[k], chunks = table.chunks_of(i);
    if (chunks <= kFew) continue;
    for (uint32_t column = first_column; column < 2; ++column) {
      sum_strided(memory, squares_of(i, column), chunks, 1, each);
      each([&](uint32_t thread) {
        if (thread == 0) sums.row_squares[2 * i + column] = memory.sum;
      });
    }
  }
}

// One block. kLines and kFar as for walk_thread(). A chunk's sums are written by one thread; behind a fence its row's
// counter is raised, and the block that completes it reads them. So it is with rows, their sums, and the counter of
// rows.
template <Lines kLines, bool kFar, class Each>
FSGD_INLINE void measure_block(const Table& table, const Sums& sums, uint32_t block, BlockMemory& memory, Each each) {
  const uint32_t begin = block * kMeasureChunks, count = table.chunk_count();
  const uint32_t end = count - begin < kMeasureChunks ? count : begin + kMeasureChunks;
  each([&](uint32_t thread) {
    const uint32_t chunk = begin + thread / kWarp;
    if (!Warp::takes_part(thread) || chunk >= end) return;
    const uint32_t row = measure_chunk<kLines, kFar>(table, sums, chunk, thread);
    if (thread == 0) memory.first_row = row;
  });
  each([&](uint32_t thread) {
    if (thread != 0) return;
    fence();
    memory.ended_count = 0;
    uint32_t i = memory.first_row;
    for (uint32_t chunk = begin; chunk < end; ++i) {
      const uint32_t row_end = table.row(i).chunk_end, next = row_end < end ? row_end : end;
      if (completes(sums.row_counters + i, next - chunk, table.chunks_of(i))) memory.ended[memory.ended_count++] = i;
      chunk = next;
    }
    fence();
  });
  if (memory.ended_count == 0) return;
  add_up_ended(table, sums, memory, each);
  each([&](uint32_t thread) {
    if (thread != 0) return;
    fence();
    memory.ended_all = completes(sums.counter, memory.ended_count, table.row_count);
    fence();
  });
  if (!memory.ended_all) return;
  sum_strided(memory, sums.row_squares + 1, table.row_count, 2, each);
  each([&](uint32_t thread) {
    if (thread != 0) return;
    sums.totals[0] = memory.sum;
    sums.totals[1] = read_written(sums.nonfinite) != 0 ? 1 : 0;
    *sums.nonfinite = 0;
  });
}

}  // namespace fused_sgd::cuda
