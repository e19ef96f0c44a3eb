// The contract for momentum stored in blocks: load -> rule -> reduce over the block -> store. A small format of that
// kind stands in for real ones: 8-bit codes with one scale for each 32 elements.
#include <cmath>
#include <random>
#include <vector>

#include "check.h"
#include "cpu/elements.h"

using namespace fused_sgd;

namespace {

struct Scaled8 {
  using Acc = float;
  static constexpr int kColumns = 2;
  static constexpr int kBlock = 32;
  struct Reduction {
    float largest = 0;
  };

  int8_t* codes;
  float* scales;

  explicit Scaled8(void* const* columns)
      : codes(static_cast<int8_t*>(columns[0])), scales(static_cast<float*>(columns[1])) {}
  float load(int64_t i) const { return codes[i] * scales[i / kBlock]; }
  static void reduce(Reduction& r, float x) { r.largest = std::fmax(r.largest, std::fabs(x)); }
  static float scale(const Reduction& r) { return r.largest / 127; }
  void store(int64_t i, float x, const Reduction& r) const {
    codes[i] = r.largest == 0 ? 0 : static_cast<int8_t>(std::lround(x / scale(r)));
  }
  void finish(int64_t block, const Reduction& r) const { scales[block] = scale(r); }
};

}  // namespace

int main() {
  std::mt19937 random(0);
  std::normal_distribution<float> normal;
  Group group;
  group.lr = 0.1;
  group.momentum = 0.9;
  for (int64_t length : {1, 31, 32, 33, 1000}) {
    const int64_t blocks = (length + 31) / 32;
    std::vector<float> p(length), g(length), scales(blocks);
    std::vector<int8_t> codes(length);
    for (int64_t i = 0; i < length; ++i)
      p[i] = normal(random), g[i] = normal(random), codes[i] = static_cast<int8_t>(i * 37);
    for (float& s : scales) s = std::fabs(normal(random));
    if (length == 1000)
      std::fill(g.begin() + 64, g.begin() + 96, 0.0f), std::fill(codes.begin() + 64, codes.begin() + 96, 0);

    std::vector<float> new_p(length), new_b(length);
    for (int64_t i = 0; i < length; ++i) {
      new_b[i] = std::fma(g[i], 1.0f, codes[i] * scales[i / 32] * 0.9f);
      new_p[i] = std::fma(new_b[i], -0.1f, p[i]);
    }
    void* columns[] = {p.data(), g.data(), codes.data(), scales.data(), nullptr};
    const Hyperparameters<float> h(group, Scalars{}, 0);
    const int64_t middle = length / 2 / 32 * 32;  // in two ranges, as two threads would
    cpu::walk_blocks<Float32, Float32, Scaled8>(columns, h, 0, middle);
    cpu::walk_blocks<Float32, Float32, Scaled8>(columns, h, middle, length);
    for (int64_t i = 0; i < length; ++i) {
      CHECK(p[i] == new_p[i]);
      float largest = 0;
      for (int64_t j = i / 32 * 32; j < std::min(length, i / 32 * 32 + 32); ++j)
        largest = std::fmax(largest, std::fabs(new_b[j]));
      CHECK(scales[i / 32] == largest / 127);
      CHECK(std::fabs(codes[i] * scales[i / 32] - new_b[i]) <= scales[i / 32] * 0.5f + 1e-6f);
    }
  }
  std::printf("blocks: %d failures\n", failures);
  return failures;
}
