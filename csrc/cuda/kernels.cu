// The kernels. CMake compiles this file once per part of them, with FSGD_PART as its name, since all at once they take
// many minutes of one core.
#include "kernels.h"

namespace fused_sgd::cuda {
namespace {

// How many blocks a multiprocessor holds at least. (The part with the norms has no use for this.)
[[maybe_unused]] constexpr int blocks_at_once(Lines lines, bool ema, bool table_in_memory) {
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
[[maybe_unused]] __device__ __forceinline__ void count_steps_in_last_block(const Table& table) {
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

template <Lines kLines, bool kEma, std::size_t kCapacity>
const void* step_kernel_of() {
  if constexpr (part_of({kLines, kCapacity, false, kEma}) == Part::FSGD_PART) {
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
  if constexpr (part_of({kLines, kCapacity, true, false}) == Part::FSGD_PART) {
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

template <std::size_t kCapacity>
const void* find(const Kernel& kernel) {
  if (kernel.measures) return measure_kernel<kCapacity>(kernel.lines);
  return kernel.has_ema ? step_kernel<true, kCapacity>(kernel.lines) : step_kernel<false, kCapacity>(kernel.lines);
}

}  // namespace

#define FSGD_JOIN_EXPANDED(a, b) a##b
#define FSGD_JOIN(a, b) FSGD_JOIN_EXPANDED(a, b)
const void* FSGD_JOIN(find_in_, FSGD_PART)(const Kernel& kernel) {
  switch (kernel.capacity) {
    case kSmallCapacity:
      return find<kSmallCapacity>(kernel);
    case kLargeCapacity:
      return find<kLargeCapacity>(kernel);
    default:
      return find<0>(kernel);
  }
}

}  // namespace fused_sgd::cuda
