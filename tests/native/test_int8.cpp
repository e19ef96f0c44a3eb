// Momentum in 8 bits: the error's bound, what must be exact, what must not look finite, and the walk. CMake compiles
// this once per instruction set.
#include "core/int8.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "check.h"
#include "cpu/elements.h"

using namespace fused_sgd;

namespace {

std::mt19937 generator(0);
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// A tensor in this format; nothing was added to it yet, and its codes are nonsense.
template <int kBlock>
struct Coded {
  std::vector<int8_t> codes;
  std::vector<float> scales;
  void* columns[2];

  explicit Coded(int64_t length)
      : codes(length, 77),
        scales((length + kBlock - 1) / kBlock, unset_value(float())),
        columns{codes.data(), scales.data()} {}
  Int8Momentum<kBlock> format() const { return Int8Momentum<kBlock>(columns); }

  void store(const std::vector<float>& x) {
    const auto length = static_cast<int64_t>(x.size());
    for (int64_t block = 0; block * kBlock < length; ++block) {
      const int64_t end = std::min<int64_t>(length, (block + 1) * kBlock);
      typename Int8Momentum<kBlock>::Reduction reduction;
      for (int64_t i = block * kBlock; i < end; ++i) format().reduce(reduction, x[i]);
      for (int64_t i = block * kBlock; i < end; ++i) format().store(i, x[i], reduction);
      format().finish(block, reduction);
    }
  }
};

// Values of every size, down to subnormals.
std::vector<float> sample(int64_t length, int exponent) {
  std::normal_distribution<float> normal;
  std::vector<float> x(length);
  for (float& value : x) value = std::ldexp(normal(generator), exponent);
  return x;
}

template <int kBlock>
int error_is_bounded() {
  for (int exponent : {-160, -149, -140, -126, -120, -119, -100, -20, 0, 20, 100, 125}) {
    for (int64_t length : {int64_t{1}, int64_t{kBlock - 1}, int64_t{10 * kBlock}}) {
      const std::vector<float> x = sample(length, exponent);
      Coded<kBlock> coded(length);
      coded.store(x);
      for (int64_t block = 0; block < static_cast<int64_t>(coded.scales.size()); ++block) {
        const int64_t end = std::min<int64_t>(length, (block + 1) * kBlock);
        double largest = 0;
        for (int64_t i = block * kBlock; i < end; ++i) largest = std::max(largest, std::fabs(double{x[i]}));
        const double scale = coded.scales[block];
        CHECK(scale == static_cast<double>(std::max(static_cast<float>(largest) / 127.0f, 0x1p-126f)));
        for (int64_t i = block * kBlock; i < end; ++i) {
          CHECK(coded.codes[i] >= -127);
          CHECK(std::fabs(double{coded.format().load(i)} - x[i]) <= scale * (0.5 + 0x1p-15));
        }
      }
    }
  }
  return failures;
}

template <int kBlock>
int special_blocks() {
  // Zeros of either sign are exact; what was coded once is coded again as it was.
  const int64_t length = 4 * kBlock;
  std::vector<float> x = sample(length, 0);
  std::fill(x.begin() + kBlock, x.begin() + 2 * kBlock, -0.0f);
  Coded<kBlock> coded(length), again(length);
  coded.store(x);
  std::vector<float> decoded(length);
  for (int64_t i = 0; i < length; ++i) decoded[i] = coded.format().load(i);
  for (int64_t i = kBlock; i < 2 * kBlock; ++i) CHECK(decoded[i] == 0);
  again.store(decoded);
  CHECK(again.codes == coded.codes);

  // One infinity or NaN, wherever in its block, makes that block NaN and no other. The mark itself, come from outside,
  // is a NaN like all others.
  for (const float bad : {kInfinity, -kInfinity, std::nanf(""), -std::nanf(""), bit_cast<float>(0x7F800001u),
                          bit_cast<float>(0xFFFFFFFFu), unset_value(float())}) {
    for (int64_t at : {2 * kBlock, 2 * kBlock + kBlock / 2 + 1, 3 * kBlock - 1}) {
      std::vector<float> broken = x;
      broken[at] = bad;
      Coded<kBlock> nan(length);
      nan.store(broken);
      CHECK(bit_cast<uint32_t>(nan.scales[2]) == 0x7FC00000u);
      for (int64_t i = 0; i < length; ++i) {
        if (i / kBlock == 2) {
          CHECK(nan.codes[i] == 0);
          CHECK(bit_cast<uint32_t>(nan.format().load(i)) == 0x7FC00000u);
        } else {
          CHECK(nan.format().load(i) == coded.format().load(i));
        }
      }
    }
  }
  // The largest fp32 is no infinity.
  Coded<kBlock> large(kBlock);
  large.store(std::vector<float>(kBlock, std::numeric_limits<float>::max()));
  CHECK(large.codes[3] == 127);
  CHECK(large.format().load(3) > 3.40282e38f && large.format().load(3) <= std::numeric_limits<float>::max());

  // A block that is not set yet decodes to its mark, whatever the codes.
  Coded<kBlock> unset(kBlock);
  for (int64_t i = 0; i < kBlock; ++i) {
    unset.codes[i] = static_cast<int8_t>(i);
    CHECK(is_unset(unset.format().load(i)));
  }
  return failures;
}

template <int kBlock>
int packs_equal_elements() {
  const int64_t length = 2 * kBlock;
  const std::vector<float> x = sample(length, 3);
  Coded<kBlock> expected(length);
  expected.store(x);
  alignas(16) int8_t memory[2 * kBlock + 16];
  for (int64_t offset : {0, 1}) {
    float scales[2] = {};
    void* columns[] = {memory + offset, scales};
    const Int8Momentum<kBlock> format(columns);
    const bool wide = format.aligned(0);
    CHECK(wide == (offset == 0));
    for (int64_t block = 0; block < 2; ++block) {
      // Threads hold 16 elements each, and reduce in any order.
      typename Int8Momentum<kBlock>::Reduction reduction, partial;
      for (int64_t i = kBlock - 1; i >= 0; --i) {
        format.reduce(partial, x[block * kBlock + i]);
        if (i % 16 == 0) format.merge(reduction, partial), partial = {};
      }
      for (int64_t i = block * kBlock; i < (block + 1) * kBlock; i += 16) {
        float pack[16];
        for (int k = 0; k < 16; ++k) pack[k] = x[i + k];
        format.store_pack(i, wide, pack, reduction);
      }
    }
    for (int64_t i = 0; i < length; i += 16) {
      float pack[16];
      format.unpack(format.template load_pack<16>(i, wide), pack);
      for (int k = 0; k < 16; ++k) {
        CHECK(format.codes.data[i + k] == expected.codes[i + k]);
        CHECK(pack[k] == expected.format().load(i + k));
      }
    }
  }
  return failures;
}

template <int kBlock>
int blocks_equal_elements() {
  for (const float special : {0.5f, 0.0f, -0.0f, 1e-40f, 3e38f, INFINITY, -INFINITY, NAN, unset_value(float())}) {
    std::vector<float> values = sample(kBlock, 0);
    values[kBlock / 3] = special;
    if (special == 0 || is_unset(special)) std::fill(values.begin(), values.end(), special);
    float x[kBlock], loaded[kBlock];
    std::copy(values.begin(), values.end(), x);
    Coded<kBlock> whole(kBlock), single(kBlock);
    whole.format().store_block(0, x);
    typename Int8Momentum<kBlock>::Reduction reduction;
    for (const float value : x) Int8Momentum<kBlock>::reduce(reduction, value);
    for (int k = 0; k < kBlock; ++k) single.format().store(k, x[k], reduction);
    single.format().finish(0, reduction);
    CHECK(whole.codes == single.codes);
    CHECK(bit_cast<uint32_t>(whole.scales[0]) == bit_cast<uint32_t>(single.scales[0]));
    whole.format().load_block(0, loaded);
    for (int k = 0; k < kBlock; ++k) {
      CHECK(bit_cast<uint32_t>(loaded[k]) == bit_cast<uint32_t>(single.format().load(k)));
    }

    Coded<kBlock> apart(kBlock);
    float even[kBlock / 2], odd[kBlock / 2];
    for (int k = 0; k < kBlock; ++k) (k % 2 == 0 ? even : odd)[k / 2] = x[k];
    apart.format().store_block(0, even, odd);
    CHECK(apart.codes == single.codes);
    CHECK(bit_cast<uint32_t>(apart.scales[0]) == bit_cast<uint32_t>(single.scales[0]));
    apart.format().load_block(0, even, odd);
    for (int k = 0; k < kBlock; ++k) {
      CHECK(bit_cast<uint32_t>((k % 2 == 0 ? even : odd)[k / 2]) == bit_cast<uint32_t>(loaded[k]));
    }
  }
  return failures;
}

template <int kBlock>
int walk() {
  Group group;
  group.lr = 0.1;
  group.momentum = 0.9;
  std::normal_distribution<float> normal;
  for (const int64_t length : {int64_t{kBlock}, int64_t{20 * kBlock}}) {
    std::vector<float> p = sample(length, 0), g(length), exact_p = p, exact_b(length, unset_value(float()));
    Coded<kBlock> b(length);
    void* columns[] = {p.data(), g.data(), b.columns[0], b.columns[1], nullptr};
    void* exact_columns[] = {exact_p.data(), g.data(), exact_b.data()};
    const Hyperparameters<float> h(group, Scalars{}, 0);
    double bound = 0;  // of momentum's error
    for (int step = 0; step < 30; ++step) {
      for (float& value : g) value = normal(generator);
      const int64_t middle = length / 2 / kBlock * kBlock;
      using Step = cpu::Kind<true, false, cpu::Terms::Plain>;
      cpu::Loop<Float32, Float32, Int8Momentum<kBlock>, Step>(columns, h).run(0, middle);
      cpu::Loop<Float32, Float32, Int8Momentum<kBlock>, Step>(columns, h).run(middle, length);
      cpu::Loop<Float32, Float32, Float32, Step>(exact_columns, h).run(0, length);
      const float scale = *std::max_element(b.scales.begin(), b.scales.end());
      bound = 0.9 * bound + 0.51 * scale;
      for (int64_t i = 0; i < length; ++i) CHECK(std::fabs(b.format().load(i) - exact_b[i]) <= bound);
    }
    for (int64_t i = 0; i < length; ++i) CHECK(std::fabs(p[i] - exact_p[i]) <= 30 * 0.1 * bound);
  }
  return failures;
}

template <int kBlock>
void all() {
  error_is_bounded<kBlock>();
  special_blocks<kBlock>();
  packs_equal_elements<kBlock>();
  blocks_equal_elements<kBlock>();
  walk<kBlock>();
}

// Not inlined into main(), which asks first whether it can run.
[[gnu::noinline]] int run() {
  all<32>();
  all<64>();
  all<128>();
  all<256>();
  std::printf("int8: %d failures\n", failures);
  return failures;
}

}  // namespace

int main() {
#if defined(__AVX512F__)
  if (!__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
    return std::puts("cannot run here"), 0;
#elif defined(__AVX2__)
  if (!__builtin_cpu_supports("avx2")) return std::puts("cannot run here"), 0;
#endif
  return run();
}
