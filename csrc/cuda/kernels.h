// Which kernels there are, and which of them a table gets. For nvcc alone: launch.cu and kernels.cu include it.
#pragma once

#include "measure.h"

namespace fused_sgd::cuda {

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

struct Kernel {
  Lines lines;
  std::size_t capacity;  // how a table travels (arguments.h), by its size
  bool measures;         // the first pass, and not the step
  bool has_ema;          // of the step: whether some row has an average
};

// The kernel that a table gets.
inline Kernel kernel_for(const TablePacker& packer, bool measures) {
  const Lines lines = packer.lines();
  const bool ema = !measures && packer.has_ema();
  const std::size_t bytes = argument_bytes(packer);
  const std::size_t capacity = bytes <= kSmallCapacity ? kSmallCapacity : bytes <= kLargeCapacity ? kLargeCapacity : 0;
  // Where a kernel is not worth compiling for both, small tables take the large arguments.
  const std::size_t large = bytes <= kLargeCapacity ? kLargeCapacity : 0;
  if (is_common(lines)) return {lines, capacity, measures, ema};
  if (!measures && !ema) {
    switch (bits_of(lines)) {
#define FSGD_OWN(P, G, M, blocks) case bits_of(line_bit(Line_##P##_##G##_##M)):
      FSGD_OWN_KERNELS(FSGD_OWN)
#undef FSGD_OWN
      return {lines, capacity, measures, ema};
#define FSGD_OWN(A, B, blocks) case bits_of(FSGD_PAIR(A, B)):
      FSGD_PAIR_KERNELS(FSGD_OWN)
#undef FSGD_OWN
      if (large != 0) return {lines, large, measures, ema};
    }
  }
  if ((lines & kPlainLines) == lines) return {kPlainLines, capacity, measures, ema};
  return {kAllLines, large, measures, ema};
}

// The parts of kernels.cu, which are compiled side by side: CMakeLists.txt lists them, too.
#define FSGD_PARTS(X) \
  X(Own) X(Plain) X(PlainWithAverages) X(AllNear) X(AllFar) X(AllNearWithAverages) X(AllFarWithAverages) X(Norms)

enum class Part {
  None,  // not compiled: kernel_for() does not ask for it
#define FSGD_PART_NAME(part) part,
  FSGD_PARTS(FSGD_PART_NAME)
#undef FSGD_PART_NAME
};

constexpr Part part_of(const Kernel& kernel) {
  const bool far = kernel.capacity == 0;
  if (kernel.lines == kAllLines && kernel.capacity == kSmallCapacity) return Part::None;
  if (kernel.measures) {
    return kernel.lines == kAllLines || kernel.lines == kPlainLines || is_common(kernel.lines) ? Part::Norms
                                                                                               : Part::None;
  }
  if (kernel.lines == kAllLines) {
    if (kernel.has_ema) return far ? Part::AllFarWithAverages : Part::AllNearWithAverages;
    return far ? Part::AllFar : Part::AllNear;
  }
  if (kernel.lines == kPlainLines) return kernel.has_ema ? Part::PlainWithAverages : Part::Plain;
  if (is_common(kernel.lines)) return Part::Own;
  const bool alone = only_line(kernel.lines) >= 0;
  return !kernel.has_ema && (alone || kernel.capacity == kLargeCapacity) ? Part::Own : Part::None;
}

// A kernel of each part. Each part is a module, which the runtime loads when the first of its kernels is asked for.
inline constexpr Kernel kOfEachPart[] = {
    {kFloat32, kSmallCapacity, false, false},
    {kPlainLines, kSmallCapacity, false, false},
    {kPlainLines, kSmallCapacity, false, true},
    {kAllLines, kLargeCapacity, false, false},
    {kAllLines, 0, false, false},
    {kAllLines, kLargeCapacity, false, true},
    {kAllLines, 0, false, true},
    {kFloat32, kSmallCapacity, true, false},
};
#define FSGD_IS_THERE(part) static_assert(part_of(kOfEachPart[static_cast<int>(Part::part) - 1]) == Part::part);
FSGD_PARTS(FSGD_IS_THERE)
#undef FSGD_IS_THERE

// A part's kernels: what cudaLaunchKernel() takes. (Defined by kernels.cu, once per part.)
#define FSGD_DECLARE_FIND(part) const void* find_in_##part(const Kernel& kernel);
FSGD_PARTS(FSGD_DECLARE_FIND)
#undef FSGD_DECLARE_FIND

}  // namespace fused_sgd::cuda
