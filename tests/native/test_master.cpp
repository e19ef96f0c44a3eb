// fp32 master weights beside a narrow parameter: the master is what fp32 training gives, the parameter is its rounding.
#include "core/master.h"

#include <limits>
#include <random>
#include <vector>

#include "check.h"
#include "cpu/elements.h"

using namespace fused_sgd;

namespace {

using Step = cpu::Kind<true, false, cpu::Terms::Plain>;

template <class Format>
int walk_equals_fp32(uint16_t (*narrow)(float)) {
  std::mt19937 random(0);
  std::normal_distribution<float> normal;
  for (int64_t length : {1, 7, 8, 1001}) {
    std::vector<float> p(length), g(length), b(length);
    std::vector<uint16_t> parameter(length, 0x7E00);  // NaN: what stood there must not matter
    for (int64_t i = 0; i < length; ++i) p[i] = normal(random), b[i] = normal(random);
    std::vector<float> master = p, master_b = b;
    void* wide_columns[] = {p.data(), g.data(), b.data()};
    void* columns[] = {parameter.data(), master.data(), g.data(), master_b.data()};
    Group group;
    group.lr = 1e-4;
    group.momentum = 0.9;
    const Hyperparameters<float> h(group, Scalars{}, 0);
    for (int step = 0; step < 3; ++step) {
      for (float& x : g) x = normal(random);
      cpu::Loop<Float32, Float32, Float32, Step>(wide_columns, h).by_element(0, length);
      cpu::Loop<Format, Float32, Float32, Step>(columns, h).by_element(0, length / 2);
      cpu::Loop<Format, Float32, Float32, Step>(columns, h).by_element(length / 2, length);
    }
    for (int64_t i = 0; i < length; ++i) {
      CHECK(master[i] == p[i]);
      CHECK(master_b[i] == b[i]);
      CHECK(parameter[i] == narrow(p[i]));
    }
  }
  return failures;
}

template <class Format>
int packs_equal_elements() {
  // Both columns are aligned together, or only one is.
  for (int64_t shift : {0, 4}) {
    alignas(16) uint16_t parameter[32] = {}, expected_parameter[32] = {};
    alignas(16) float memory[36] = {}, expected[32] = {};
    float* master = memory + shift / 2;
    void* columns[] = {parameter, master};
    void* expected_columns[] = {expected_parameter, expected};
    const Format packs(columns), elements(expected_columns);
    CHECK(packs.until_aligned() == 0);
    for (int64_t i = 0; i + 8 <= 32; i += 4) {
      CHECK(packs.aligned(i) == (shift == 0 && i % 8 == 0));
      float x[8], y[8];
      for (int k = 0; k < 8; ++k) {
        x[k] = k == 7 ? std::numeric_limits<float>::infinity() : 0.1f * static_cast<float>(i + k);
        CHECK(elements.store(i + k, x[k]) == x[k]);
      }
      packs.store_pack(i, packs.aligned(i), x);
      Format::unpack(packs.template load_pack<8>(i, packs.aligned(i)), y);
      for (int k = 0; k < 8; ++k) CHECK(y[k] == x[k] && x[k] == elements.load(i + k));
    }
    for (int i = 0; i < 32; ++i) {
      CHECK(parameter[i] == expected_parameter[i]);
      CHECK(master[i] == expected[i]);
    }
  }
  return failures;
}

}  // namespace

int main() {
  walk_equals_fp32<MasterBFloat16>([](float x) { return round_split(x).high; });
  walk_equals_fp32<MasterFloat16>([](float x) { return float_to_float16(x); });
  packs_equal_elements<MasterBFloat16>();
  packs_equal_elements<MasterFloat16>();
  CHECK(split_high(1.00390625f) == 0x3F81 && float_to_bfloat16(1.00390625f) == 0x3F80);  // a tie, away from zero
  std::printf("master: %d failures\n", failures);
  return failures;
}
