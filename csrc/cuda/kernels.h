// The kernels, and which of them a table gets. For nvcc alone: launch.cu includes it.
#pragma once

#include "measure.h"

namespace fused_sgd::cuda {
namespace {

// Combinations that have a kernel of their own, which takes few registers, for tables of nothing else; others take one
// with a switch. The last number is how many blocks a multiprocessor holds at least, which bounds the registers: as
// many as do without spills, where the table is in the arguments and there are no averages. (blocks_at_once() has the
// rest; a build with FUSED_SGD_WERROR=1 fails where it is one too many, on some architectures sooner than on others.)
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
inline constexpr int kStochastic = 3;
#else
inline constexpr int kStochastic = 4;
#endif
// clang-format off
#define FSGD_OWN_KERNELS(X)                              \
  X(Float32,            Float32,  Float32,  3)           \
  X(Float32,            Float32,  BFloat16, 3)           \
  X(Float32,            Float32,  Int8,     4)           \
  X(BFloat16,           BFloat16, BFloat16, 4)           \
  X(BFloat16,           BFloat16, Float32,  4)           \
  X(BFloat16,           BFloat16, Int8,     4)           \
  X(Float16,            Float16,  Float16,  4)           \
  X(SplitBFloat16,      BFloat16, Float32,  4)           \
  X(SplitBFloat16,      BFloat16, BFloat16, 4)           \
  X(SplitBFloat16,      BFloat16, Int8,     4)           \
  X(MasterBFloat16,     BFloat16, Float32,  4)           \
  X(StochasticBFloat16, BFloat16, BFloat16, kStochastic) \
  X(StochasticBFloat16, BFloat16, Float32,  3)           \
  X(StochasticBFloat16, BFloat16, Int8,     kStochastic)
// clang-format on

// Those among them that also have one for tables with averages, and one that measures (measure_kernel() names them).
constexpr bool is_common(int combination) {
  return combination == Line_Float32_Float32_Float32 || combination == Line_BFloat16_BFloat16_BFloat16;
}

constexpr int blocks_at_once(int combination, bool ema, bool table_in_memory) {
  switch (combination) {
#define FSGD_BLOCKS(P, G, M, blocks) \
  case Line_##P##_##G##_##M:         \
    return ema || (table_in_memory && !is_common(combination)) ? blocks - 1 : blocks;
    FSGD_OWN_KERNELS(FSGD_BLOCKS)
#undef FSGD_BLOCKS
    default:
      return ema ? 1 : 2;
  }
}

// Whether all other blocks are done, for every thread of a block that asks. What they wrote, and read, came before.
__device__ __forceinline__ bool is_last_block(uint32_t* ticket) {
  __shared__ bool is_last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    is_last = atomicAdd(ticket, 1u) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  return is_last;
}

template <int kCombination, bool kEma, std::size_t kCapacity>
__global__ __launch_bounds__(kThreads, blocks_at_once(kCombination, kEma, kCapacity == 0)) void sgd_step(
    const __grid_constant__ Arguments<kCapacity> arguments) {
  const Table table = arguments.table();
  walk_thread<kCombination, kEma>(table, arguments.head.reversed != 0 ? gridDim.x - 1 - blockIdx.x : blockIdx.x,
                                  threadIdx.x);
  if constexpr (kCombination == kAnyCombination || (kCombination >= 0 && kCombinations[kCombination].counts_steps)) {
    if (table.scalars.ticket != nullptr && is_last_block(table.scalars.ticket)) {
      count_steps_thread(table, threadIdx.x);
      if (threadIdx.x == 0) *table.scalars.ticket = 0;
    }
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

template <int kCombination, std::size_t kCapacity>
__global__ __launch_bounds__(kMeasureThreads, kCombination < 0 ? 4 : 5) void measure_gradients(
    const __grid_constant__ Arguments<kCapacity> arguments) {
  __shared__ BlockMemory memory;
  measure_block<kCombination>(arguments.table(), arguments.head.sums, blockIdx.x, memory, Phase());
}

// The combination whose kernel is a table's, or one of kAny….
int kernel_for(const TablePacker& packer, bool measures) {
  const int only = packer.only_combination();
  const int with_switch = packer.is_plain() ? kAnyPlain : kAnyCombination;
  if (measures || packer.has_ema()) return only >= 0 && is_common(only) ? only : with_switch;
  switch (only) {
#define FSGD_OWN(P, G, M, blocks) case Line_##P##_##G##_##M:
    FSGD_OWN_KERNELS(FSGD_OWN)
#undef FSGD_OWN
    return only;
    default:
      return with_switch;
  }
}

template <int kCombination, bool kEma, std::size_t kCapacity>
const void* step_kernel_of() {
  if constexpr (kEma && kCombination >= 0 && !is_common(kCombination))
    return nullptr;  // kernel_for() does not ask for it
  else if constexpr (kCombination == kAnyCombination && kCapacity == kSmallCapacity)
    return nullptr;  // nor here: small tables take the large arguments
  else
    return reinterpret_cast<const void*>(&sgd_step<kCombination, kEma, kCapacity>);
}

template <bool kEma, std::size_t kCapacity>
const void* step_kernel(int combination) {
  switch (combination) {
#define FSGD_OWN(P, G, M, blocks) \
  case Line_##P##_##G##_##M:      \
    return step_kernel_of<Line_##P##_##G##_##M, kEma, kCapacity>();
    FSGD_OWN_KERNELS(FSGD_OWN)
#undef FSGD_OWN
    case kAnyPlain:
      return step_kernel_of<kAnyPlain, kEma, kCapacity>();
    default:
      return step_kernel_of<kAnyCombination, kEma, kCapacity>();
  }
}

template <std::size_t kCapacity>
const void* measure_kernel(int combination) {
  switch (combination) {
    case Line_Float32_Float32_Float32:
      return reinterpret_cast<const void*>(&measure_gradients<Line_Float32_Float32_Float32, kCapacity>);
    case Line_BFloat16_BFloat16_BFloat16:
      return reinterpret_cast<const void*>(&measure_gradients<Line_BFloat16_BFloat16_BFloat16, kCapacity>);
    case kAnyPlain:
      return reinterpret_cast<const void*>(&measure_gradients<kAnyPlain, kCapacity>);
    default:
      if constexpr (kCapacity == kSmallCapacity) {
        return nullptr;  // small tables take the large arguments
      } else {
        return reinterpret_cast<const void*>(&measure_gradients<kAnyCombination, kCapacity>);
      }
  }
}

}  // namespace
}  // namespace fused_sgd::cuda
