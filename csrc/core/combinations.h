// The list of supported storage combinations. Every kernel is compiled for exactly these lines, in this order, and the
// plan looks a parameter's formats up here; what is not listed takes the reference.
//
// To support one more, add a line. A row's `combination` is the line's number, counted from 0.
#pragma once

#include "formats.h"

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
  X(Float16,  BFloat16, Float16)
// clang-format on

namespace fused_sgd {

enum class Format : uint8_t { Float64, Float32, BFloat16, Float16 };

// The lines' numbers by name: Line_Float32_Float32_Float32 is 0.
enum Line : int {
#define FSGD_LINE(P, G, M) Line_##P##_##G##_##M,
  FSGD_COMBINATIONS(FSGD_LINE)
#undef FSGD_LINE
};

struct Combination {
  Format parameter;
  Format gradient;
  Format momentum;
  int8_t parameter_columns;
  int8_t momentum_columns;
  bool computed_in_double;

  constexpr int gradient_column() const { return parameter_columns; }
  constexpr int momentum_column() const { return parameter_columns + 1; }
  constexpr int ema_column() const { return parameter_columns + 1 + momentum_columns; }
};

inline constexpr Combination kCombinations[] = {
#define FSGD_COMBINATION(P, G, M) {Format::P, Format::G, Format::M, P::kColumns, M::kColumns, sizeof(P::Acc) == 8},
    FSGD_COMBINATIONS(FSGD_COMBINATION)
#undef FSGD_COMBINATION
};

inline constexpr int kCombinationCount = sizeof(kCombinations) / sizeof(kCombinations[0]);

// The line's number, or -1 when the combination is not supported.
constexpr int find_combination(Format parameter, Format gradient, Format momentum) {
  for (int i = 0; i < kCombinationCount; ++i) {
    const Combination& c = kCombinations[i];
    if (c.parameter == parameter && c.gradient == gradient && c.momentum == momentum) return i;
  }
  return -1;
}

}  // namespace fused_sgd
