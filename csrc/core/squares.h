// Sums of squares, for norms. The same bits on every instruction set and GPU, for any chunks and threads: a tensor is
// cut into tiles of 4096 elements, counted from its first; within a tile every element has its lane and every lane its
// order; lanes fold in a fixed tree; and so do the tiles of a tensor, and the tensors of a step. All of it in double,
// in which the square of a float is exact.
//
// Element e of a tile is in lane e % 256. A lane adds its 16 elements in eight pairs, one after the other.
#pragma once

#include "arithmetic.h"

namespace fused_sgd {

inline constexpr int kLog2Tile = 12;
inline constexpr int kTile = 1 << kLog2Tile;  // elements
inline constexpr int kLanes = 256;
inline constexpr int kPairs = kTile / (2 * kLanes);

FSGD_INLINE double square(double first) { return multiply(first, first); }
FSGD_INLINE double add_square(double square_of_first, double second) { return fma(second, second, square_of_first); }

// 1 for inf and NaN, else 0: by the exponent's bits.
FSGD_INLINE uint32_t is_nonfinite(float x) { return (bit_cast<uint32_t>(x) & 0x7F800000u) == 0x7F800000u ? 1 : 0; }
FSGD_INLINE uint64_t is_nonfinite(double x) {
  return (bit_cast<uint64_t>(x) & 0x7FF0000000000000u) == 0x7FF0000000000000u ? 1 : 0;
}

// Folds lanes [0, count) into lane 0; count is a power of two. Lanes above hold 0 in the full tree, which adds nothing.
FSGD_INLINE double fold(double* lanes, int count) {
  for (int half = count / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}

// The sum of values[0], values[stride], … : lane l adds those numbered l, l + 256, … in order; then the tree.
FSGD_INLINE double fold_strided(const double* values, int64_t count, int64_t stride) {
  if (count == 1) return values[0];
  double lanes[kLanes];
  int used = 1;
  while (used < kLanes && used < count) used *= 2;
  for (int lane = 0; lane < used; ++lane) {
    double sum = 0;
    for (int64_t i = lane; i < count; i += kLanes) sum += values[i * stride];
    lanes[lane] = sum;
  }
  return fold(lanes, used);
}

}  // namespace fused_sgd
