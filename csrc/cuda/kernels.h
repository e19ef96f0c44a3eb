// The kernels, and which of them a table gets. For nvcc alone: launch.cu includes it.
#pragma once

#include "measure.h"

namespace fused_sgd::cuda {
namespace {

// Combinations that have a kernel of their own, for tables of nothing else. The last number is how many blocks a
// multiprocessor holds at least, which bounds the registers: as many as do without spills, where the table is in the
// arguments and there are no averages. (blocks_at_once() has the rest; a build with FUSED_SGD_WERROR=1 fails where it
// is one too many, on some architectures sooner than on others: kStochastic is of stochastic rounding, kTight of what
// just fits, kMixed of 16-bit parameters beside fp32 columns, kHalf of fp16, kNorms of the first pass.)
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ == 900
inline constexpr int kStochastic = 4, kTight = 4, kMixed = 4, kHalf = 4, kNorms = 5;
#elif __CUDA_ARCH__ == 800
inline constexpr int kStochastic = 4, kTight = 4, kMixed = 4, kHalf = 4, kNorms = 4;
#elif __CUDA_ARCH__ < 1000
inline constexpr int kStochastic = 4, kTight = 3, kMixed = 3, kHalf = 4, kNorms = 5;
#elif __CUDA_ARCH__ < 1200
inline constexpr int kStochastic = 3, kTight = 3, kMixed = 3, kHalf = 2, kNorms = 5;
#else
inline constexpr int kStochastic = 3, kTight = 3, kMixed = 2, kHalf = 2, kNorms = 5;
#endif
// clang-format off
#define FSGD_OWN_KERNELS(X)                              \
  X(Float32,            Float32,  Float32,  kTight)      \
  X(Float32,            Float32,  BFloat16, 3)           \
  X(Float32,            Float32,  Int8,     4)           \
  X(BFloat16,           BFloat16, BFloat16, 4)           \
  X(BFloat16,           BFloat16, Float32,  kMixed)      \
  X(BFloat16,           BFloat16, Int8,     kTight)      \
  X(Float16,            Float16,  Float16,  kHalf)       \
  X(SplitBFloat16,      BFloat16, Float32,  4)           \
  X(SplitBFloat16,      BFloat16, BFloat16, 4)           \
  X(SplitBFloat16,      BFloat16, Int8,     kTight)      \
  X(MasterBFloat16,     BFloat16, Float32,  kMixed)      \
  X(StochasticBFloat16, BFloat16, BFloat16, kStochastic) \
  X(StochasticBFloat16, BFloat16, Float32,  kStochastic) \
  X(StochasticBFloat16, BFloat16, Int8,     kStochastic)
// clang-format on

// Two combinations that are found together and share a kernel: beside int8 momentum, tensors that are too small for its
// blocks; beside bfloat16, norms that were left in float32. The blocks are those of a table in the arguments: only such
// tables have these kernels.
// clang-format off
#define FSGD_PAIR_KERNELS(X)                                                            \
  X(Float32_Float32_Int8,             Float32_Float32_Float32,              kTight)     \
  X(BFloat16_BFloat16_Int8,           BFloat16_BFloat16_BFloat16,           kTight)     \
  X(SplitBFloat16_BFloat16_Int8,      SplitBFloat16_BFloat16_Float32,       kTight)     \
  X(StochasticBFloat16_BFloat16_Int8, StochasticBFloat16_BFloat16_BFloat16, kTight)     \
  X(BFloat16_BFloat16_BFloat16,       Float32_Float32_Float32,              kTight)     \
  X(SplitBFloat16_BFloat16_Float32,   Float32_Float32_Float32,              3)
// clang-format on
#define FSGD_PAIR(A, B) (line_bit(Line_##A) | line_bit(Line_##B))

// Other tables take a kernel with a switch over what is plain, or over all. (One over all of the above would spill.)

// Combinations that also have a kernel of their own for tables with averages, and one that measures.
inline constexpr Lines kFloat32 = line_bit(Line_Float32_Float32_Float32),
                       kBFloat16 = line_bit(Line_BFloat16_BFloat16_BFloat16);
constexpr bool is_common(Lines lines) { return lines == kFloat32 || lines == kBFloat16; }

constexpr int blocks_at_once(Lines lines, bool ema, bool table_in_memory) {
  switch (bits_of(lines)) {
#define FSGD_BLOCKS(P, G, M, blocks)            \
  case bits_of(line_bit(Line_##P##_##G##_##M)): \
    return ema || (table_in_memory && !is_common(lines)) ? blocks - 1 : blocks;
    FSGD_OWN_KERNELS(FSGD_BLOCKS)
#undef FSGD_BLOCKS
#define FSGD_BLOCKS(A, B, blocks) \
  case bits_of(FSGD_PAIR(A, B)):  \
    return blocks;
    FSGD_PAIR_KERNELS(FSGD_BLOCKS)
#undef FSGD_BLOCKS
    default:
      return ema ? 1 : 2;
  }
}

// Where steps are counted, the last block does it in the end. Every block adds itself to the ticket as soon as it has
// read the counts (walk.h): the last block finds them all, but for those that began with it, and no other waits for
// anything. Blocks begin in their order, and others end beside one that waits. There is no fence: a count was read when
// it stood in shared memory, before the block's barrier.
//
// Two steps that overlap, on streams without an order, have one ticket. They may count too early; but what each of them
// adds it takes away, so that neither waits for ever.
__device__ __forceinline__ void count_steps_in_last_block(const Table& table) {
  uint32_t* ticket = table.scalars.ticket;
  if (ticket == nullptr || blockIdx.x != gridDim.x - 1 || skips(table.scalars)) return;
  if (threadIdx.x == 0) {
    while (*static_cast<volatile uint32_t*>(ticket) < gridDim.x) __nanosleep(50);
    atomicSub(ticket, gridDim.x);
  }
  __syncthreads();
  count_steps_thread(table, threadIdx.x);
}

// (A kernel's lines are a number, since nvcc does not write the enumeration's name as it should.)
template <uint64_t kBits, bool kEma, std::size_t kCapacity>
__global__ __launch_bounds__(kThreads, blocks_at_once(Lines{kBits}, kEma, kCapacity == 0)) void sgd_step(
    const __grid_constant__ Arguments<kCapacity> arguments) {
  constexpr Lines kLines{kBits};
  const Table table = arguments.table();
  const uint32_t block = arguments.head.reversed != 0 ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
  walk_thread<kLines, kEma, kCapacity == 0>(table, block, threadIdx.x);
  if constexpr ((kLines & kCountingLines) != Lines::None) {
    count_steps_in_last_block(table);
  }
}

// Runs a phase of measure.h: this thread's part, then a barrier.
struct Phase {
  template <class F>
  __device__ __forceinline__ void operator()(F f) const {
    f(threadIdx.x);
    __syncthreads();
  }
};

template <uint64_t kBits, std::size_t kCapacity>
__global__ __launch_bounds__(kMeasureThreads, is_common(Lines{kBits}) ? kNorms : 4) void measure_gradients(
    const __grid_constant__ Arguments<kCapacity> arguments) {
  __shared__ BlockMemory memory;
  measure_block<Lines{kBits}, kCapacity == 0>(arguments.table(), arguments.head.sums, blockIdx.x, memory, Phase());
}

// How a table travels (arguments.h), by its size.
struct Kernel {
  Lines lines;
  std::size_t capacity;
};

// The kernel that a table gets.
Kernel kernel_for(const TablePacker& packer, bool measures) {
  const Lines lines = packer.lines();
  const std::size_t bytes = argument_bytes(packer);
  const std::size_t capacity = bytes <= kSmallCapacity ? kSmallCapacity : bytes <= kLargeCapacity ? kLargeCapacity : 0;
  // Where a kernel is not worth compiling for both, small tables take the large arguments.
  const std::size_t large = bytes <= kLargeCapacity ? kLargeCapacity : 0;
  if (is_common(lines)) return {lines, capacity};
  if (!measures && !packer.has_ema()) {
    switch (bits_of(lines)) {
#define FSGD_OWN(P, G, M, blocks) case bits_of(line_bit(Line_##P##_##G##_##M)):
      FSGD_OWN_KERNELS(FSGD_OWN)
#undef FSGD_OWN
      return {lines, capacity};
#define FSGD_OWN(A, B, blocks) case bits_of(FSGD_PAIR(A, B)):
      FSGD_PAIR_KERNELS(FSGD_OWN)
#undef FSGD_OWN
      if (large != 0) return {lines, large};
    }
  }
  if ((lines & kPlainLines) == lines) return {kPlainLines, capacity};
  return {kAllLines, large};
}

// Which kernels there are: kernel_for() asks for no other.
constexpr bool is_compiled(Lines lines, std::size_t capacity, bool measures, bool ema) {
  if (is_common(lines) || lines == kPlainLines) return true;
  if (lines == kAllLines) return capacity != kSmallCapacity;
  return !measures && !ema && (only_line(lines) >= 0 || capacity == kLargeCapacity);
}

template <Lines kLines, bool kEma, std::size_t kCapacity>
const void* step_kernel_of() {
  if constexpr (is_compiled(kLines, kCapacity, false, kEma)) {
    return reinterpret_cast<const void*>(&sgd_step<bits_of(kLines), kEma, kCapacity>);
  } else {
    return nullptr;
  }
}

template <bool kEma, std::size_t kCapacity>
const void* step_kernel(Lines lines) {
  switch (bits_of(lines)) {
#define FSGD_OWN(P, G, M, blocks)               \
  case bits_of(line_bit(Line_##P##_##G##_##M)): \
    return step_kernel_of<line_bit(Line_##P##_##G##_##M), kEma, kCapacity>();
    FSGD_OWN_KERNELS(FSGD_OWN)
#undef FSGD_OWN
#define FSGD_OWN(A, B, blocks)   \
  case bits_of(FSGD_PAIR(A, B)): \
    return step_kernel_of<FSGD_PAIR(A, B), kEma, kCapacity>();
    FSGD_PAIR_KERNELS(FSGD_OWN)
#undef FSGD_OWN
    case bits_of(kPlainLines):
      return step_kernel_of<kPlainLines, kEma, kCapacity>();
    default:
      return step_kernel_of<kAllLines, kEma, kCapacity>();
  }
}

template <Lines kLines, std::size_t kCapacity>
const void* measure_kernel_of() {
  if constexpr (is_compiled(kLines, kCapacity, true, false)) {
    return reinterpret_cast<const void*>(&measure_gradients<bits_of(kLines), kCapacity>);
  } else {
    return nullptr;
  }
}

template <std::size_t kCapacity>
const void* measure_kernel(Lines lines) {
  switch (bits_of(lines)) {
    case bits_of(kFloat32):
      return measure_kernel_of<kFloat32, kCapacity>();
    case bits_of(kBFloat16):
      return measure_kernel_of<kBFloat16, kCapacity>();
    case bits_of(kPlainLines):
      return measure_kernel_of<kPlainLines, kCapacity>();
    default:
      return measure_kernel_of<kAllLines, kCapacity>();
  }
}

}  // namespace
}  // namespace fused_sgd::cuda
