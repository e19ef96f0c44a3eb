// The list of supported storage combinations. Every kernel is compiled for exactly these lines, in this order, and the
// plan looks a parameter's formats up here; what is not listed takes the reference.
//
// To support one more, add a line. A row's `combination` is the line's number, counted from 0.
#pragma once

#include <string_view>

#include "formats.h"
#include "int8.h"
#include "master.h"
#include "stochastic.h"

//      X(parameter, gradient, momentum buffer)
// clang-format off
#define FSGD_COMBINATIONS(X)         \
  X(Float32,  Float32,  Float32)     \
  X(Float64,  Float64,  Float64)     \
  X(BFloat16, BFloat16, BFloat16)    \
  X(Float16,  Float16,  Float16)     \
  /* gradients kept in another dtype than their parameter (torch's `grad_dtype`) */ \
  X(Float32,  Float64,  Float32)     \
  X(Float32,  BFloat16, Float32)     \
  X(Float32,  Float16,  Float32)     \
  X(Float64,  Float32,  Float64)     \
  X(Float64,  BFloat16, Float64)     \
  X(Float64,  Float16,  Float64)     \
  X(BFloat16, Float64,  BFloat16)    \
  X(BFloat16, Float32,  BFloat16)    \
  X(BFloat16, Float16,  BFloat16)    \
  X(Float16,  Float64,  Float16)     \
  X(Float16,  Float32,  Float16)     \
  X(Float16,  BFloat16, Float16)     \
  /* momentum in another format than the parameter */ \
  X(Float32,  Float32,  BFloat16)    \
  X(Float32,  Float32,  Float16)     \
  X(Float32,  Float32,  Int8)        \
  X(BFloat16, BFloat16, Float32)     \
  X(BFloat16, Float32,  Float32)     \
  X(BFloat16, BFloat16, Int8)        \
  X(Float16,  Float16,  Float32)     \
  X(Float16,  Float32,  Float32)     \
  X(Float16,  Float16,  Int8)        \
  /* master weights */ \
  X(SplitBFloat16,  BFloat16, Float32)  \
  X(SplitBFloat16,  Float32,  Float32)  \
  X(SplitBFloat16,  BFloat16, BFloat16) \
  X(SplitBFloat16,  BFloat16, Int8)     \
  X(MasterBFloat16, BFloat16, Float32)  \
  X(MasterBFloat16, Float32,  Float32)  \
  X(MasterBFloat16, BFloat16, BFloat16) \
  X(MasterBFloat16, BFloat16, Int8)     \
  X(MasterFloat16,  Float16,  Float32)  \
  X(MasterFloat16,  Float32,  Float32)  \
  X(MasterFloat16,  Float16,  Float16)  \
  X(MasterFloat16,  Float16,  Int8)     \
  /* stochastic rounding */ \
  X(StochasticBFloat16, BFloat16, BFloat16) \
  X(StochasticBFloat16, BFloat16, Float32)  \
  X(StochasticBFloat16, BFloat16, Int8)     \
  X(StochasticFloat16,  Float16,  Float16)  \
  X(StochasticFloat16,  Float16,  Float32)  \
  X(StochasticFloat16,  Float16,  Int8)
// clang-format on

namespace fused_sgd {

// The lines' numbers by name: Line_Float32_Float32_Float32 is 0.
enum Line : int {
#define FSGD_LINE(P, G, M) Line_##P##_##G##_##M,
  FSGD_COMBINATIONS(FSGD_LINE)
#undef FSGD_LINE
};

template <class P>
inline constexpr bool kCountsSteps = requires(void* const* columns) { P::count_step(columns); };

struct Combination {
  const char* parameter;  // the formats' names
  const char* gradient;
  const char* momentum;
  int8_t parameter_columns;
  int8_t momentum_columns;
  bool computed_in_double;

  constexpr int gradient_column() const { return parameter_columns; }
  constexpr int momentum_column() const { return parameter_columns + 1; }
  constexpr int ema_column() const { return parameter_columns + 1 + momentum_columns; }
};

inline constexpr Combination kCombinations[] = {
#define FSGD_COMBINATION(P, G, M) {#P, #G, #M, P::kColumns, M::kColumns, sizeof(P::Acc) == 8},
    FSGD_COMBINATIONS(FSGD_COMBINATION)
#undef FSGD_COMBINATION
};

inline constexpr int kCombinationCount = sizeof(kCombinations) / sizeof(kCombinations[0]);

// A set of lines, as bits. (A type of its own, as a line's number is no set.)
enum class Lines : uint64_t { None };
static_assert(kCombinationCount <= 64);
FSGD_INLINE constexpr uint64_t bits_of(Lines lines) { return static_cast<uint64_t>(lines); }
FSGD_INLINE constexpr Lines operator|(Lines a, Lines b) { return static_cast<Lines>(bits_of(a) | bits_of(b)); }
FSGD_INLINE constexpr Lines operator&(Lines a, Lines b) { return static_cast<Lines>(bits_of(a) & bits_of(b)); }
FSGD_INLINE constexpr Lines line_bit(int line) { return static_cast<Lines>(uint64_t{1} << line); }
FSGD_INLINE constexpr bool has(Lines lines, int line) { return (lines & line_bit(line)) != Lines::None; }
FSGD_INLINE constexpr Lines lines_before(int line) { return static_cast<Lines>((uint64_t{1} << line) - 1); }
FSGD_INLINE constexpr int first_line(Lines lines) {  // -1 of none
  for (int line = 0; line < kCombinationCount; ++line) {
    if (has(lines, line)) return line;
  }
  return -1;
}
// The line of a set of one; else -1.
FSGD_INLINE constexpr int only_line(Lines lines) {
  const int first = first_line(lines);
  return first >= 0 && lines == line_bit(first) ? first : -1;
}
inline constexpr Lines kAllLines = lines_before(kCombinationCount);
// Those of one number an element, and the momentum in the parameter's format: the first ones.
inline constexpr Lines kPlainLines = lines_before(Line_Float32_Float32_BFloat16);
#define FSGD_COUNTS_STEPS(P, G, M) | (kCountsSteps<P> ? line_bit(Line_##P##_##G##_##M) : Lines::None)
inline constexpr Lines kCountingLines = Lines::None FSGD_COMBINATIONS(FSGD_COUNTS_STEPS);
#undef FSGD_COUNTS_STEPS

// The line's number, or -1 when the combination is not supported.
constexpr int find_combination(std::string_view parameter, std::string_view gradient, std::string_view momentum) {
  for (int i = 0; i < kCombinationCount; ++i) {
    const Combination& c = kCombinations[i];
    if (c.parameter == parameter && c.gradient == gradient && c.momentum == momentum) return i;
  }
  return -1;
}

template <class P>
FSGD_INLINE void count_step_of(void* const* columns) {
  if constexpr (kCountsSteps<P>) P::count_step(columns);
}

// After a step of one row that was not skipped.
FSGD_INLINE void count_step(int combination, void* const* columns) {
  switch (combination) {
#define FSGD_COUNT_STEP(P, G, M) \
  case Line_##P##_##G##_##M:     \
    return count_step_of<P>(columns);
    FSGD_COMBINATIONS(FSGD_COUNT_STEP)
#undef FSGD_COUNT_STEP
  }
}

}  // namespace fused_sgd
