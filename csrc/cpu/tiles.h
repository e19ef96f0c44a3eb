// The loops over a tile's elements, for norms. Included by walk.cpp, as elements.h is.
#pragma once

#include <algorithm>

#include "../core/squares.h"

namespace fused_sgd::cpu {
namespace {

// The sums of squares of n whole tiles, `apart` tiles from each other, by the scheme of squares.h; they go to [0],
// [apart] and so on. load(i): element i, from the first tile's first on.
//
// Memory is read in its own order, of the tiles in turn: several long streams are faster than one. (A compiler that
// turns the loops over strips and tiles around would undo it: CMakeLists.txt.)
template <int n, class Load>
FSGD_INLINE void square_tiles(Load load, int64_t apart, double* squares) {
  constexpr int kStrip = 16;
  alignas(64) double lanes[n][kLanes] = {}, first[n][kLanes];
  const auto each_lane = [&](int row, auto add) {
    for (int strip = 0; strip < kLanes; strip += kStrip) {
      for (int tile = 0; tile < n; ++tile) {
        const int64_t begin = tile * apart * kTile + row;
        for (int lane = strip; lane < strip + kStrip; ++lane) {
          add(first[tile][lane], lanes[tile][lane], static_cast<double>(load(begin + lane)));
        }
      }
    }
  };
  for (int row = 0; row < kTile; row += 2 * kLanes) {
    each_lane(row, [](double& first, double&, double x) { first = square(x); });
    each_lane(row + kLanes, [](double& first, double& sum, double x) { sum += add_square(first, x); });
  }
  for (int tile = 0; tile < n; ++tile) squares[tile * apart] = fold(lanes[tile], kLanes);
}

// The same of one tile with `count` elements: what is missing would add nothing.
template <class Load>
FSGD_INLINE double square_part(int count, Load load) {
  alignas(64) double lanes[kLanes];
  int used = 1;
  while (used < kLanes && used < count) used *= 2;
  for (int lane = 0; lane < used; ++lane) lanes[lane] = 0;
  for (int row = 0; row < count; row += 2 * kLanes) {
    const int first = std::min(count - row, int{kLanes}), second = std::min(count - row - first, int{kLanes});
    for (int lane = 0; lane < second; ++lane) {
      const auto x = static_cast<double>(load(row + lane)), y = static_cast<double>(load(row + kLanes + lane));
      lanes[lane] += add_square(square(x), y);
    }
    for (int lane = second; lane < first; ++lane) lanes[lane] += square(static_cast<double>(load(row + lane)));
  }
  return fold(lanes, used);
}

}  // namespace
}  // namespace fused_sgd::cpu
