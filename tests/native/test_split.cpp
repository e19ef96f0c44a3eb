// bf16 + 16-bit remainder: every one of the 2^32 values of fp32 comes back, and training in it is training in fp32.
#include "core/split.h"

#include <cmath>
#include <random>
#include <thread>
#include <vector>

#include "check.h"
#include "cpu/elements.h"

using namespace fused_sgd;

namespace {

using Step = cpu::Kind<true, false, cpu::Terms::Plain>;

// What became of the 2^24 patterns from `begin` on. Counts instead of checks, and no branch: the loop is to vectorise.
struct Count {
  uint32_t changed = 0;    // comes back in other bits
  uint32_t quietened = 0;  // a signalling NaN, which comes back with its quiet bit set
  uint32_t far = 0;        // its bf16 is not a nearest one, or is not a NaN where the value is
};

Count count(uint32_t begin) {
  Count all;
  for (uint32_t k = 0; k < 1u << 24; ++k) {
    const uint32_t bits = begin + k;
    const Split split = round_split(bit_cast<float>(bits));
    const uint32_t back = bit_cast<uint32_t>(join_split(split));
    const uint32_t magnitude = bits & 0x7FFFFFFFu;
    const uint32_t nan = magnitude > 0x7F800000u, signalling = nan & (magnitude < 0x7FC00000u);
    all.changed += back != bits;
    all.quietened += signalling & (back == (bits | 0x00400000u));
    // Neighbours of one sign differ by one in their bits, so a distance is a difference of bits: from -0x7FFF, below a
    // value, to 0x8000, above it, where a tie is that goes away from zero.
    const uint32_t high = static_cast<uint32_t>(split.high) << 16;
    const uint32_t high_nan = (high & 0x7FFFFFFFu) > 0x7F800000u;
    const uint32_t far = high - bits + 0x7FFFu > 0xFFFFu;
    all.far += (nan ^ high_nan) | (far & (nan ^ 1u));
  }
  return all;
}

}  // namespace

int main() {
  // All 2^32, on two threads.
  Count halves[2];
  const auto run = [&halves](uint32_t half) {
    uint32_t changed = 0, quietened = 0, far = 0;
    for (uint32_t part = 0; part < 128; ++part) {
      const Count some = count((128 * half + part) << 24);
      changed += some.changed, quietened += some.quietened, far += some.far;
    }
    halves[half] = {changed, quietened, far};
  };
  std::thread other(run, 1);
  run(0);
  other.join();
  for (const Count& all : halves) {        // positive, negative
    CHECK(all.changed == (1u << 22) - 1);  // as many as there are signalling NaNs of one sign
    CHECK(all.quietened == all.changed);   // and it is they
    CHECK(all.far == 0);
  }

  CHECK(round_split(1.00390625f).high == 0x3F81);  // a tie goes away from zero: to even it would be 0x3F80
  CHECK(round_split(-1.00390625f).high == 0xBF81);
  CHECK(round_split(3.4028235e38f).high == 0x7F80);  // the largest fp32: an infinity to the model, exact in both
  CHECK(join_split(round_split(3.4028235e38f)) == 3.4028235e38f);

  // The CPU walk gives what it gives in fp32, and packs give what elements give.
  std::mt19937 random(0);
  std::normal_distribution<float> normal;
  const int64_t length = 1001;
  std::vector<float> p(length), g(length), b(length);
  for (int64_t i = 0; i < length; ++i) p[i] = normal(random), b[i] = normal(random);
  std::vector<uint16_t> high(length);
  std::vector<int16_t> low(length);
  void* wide_columns[] = {p.data(), g.data(), b.data()};
  std::vector<float> split_b = b;
  void* columns[] = {high.data(), low.data(), g.data(), split_b.data()};
  const SplitBFloat16 split(columns);
  for (int64_t i = 0; i < length; ++i) CHECK(split.store(i, p[i]) == p[i]);
  Group group;
  group.lr = 1e-4;  // too little for bf16 alone
  group.momentum = 0.9;
  group.weight_decay = 0.01;
  const Hyperparameters<float> h(group, Scalars{}, 0);
  for (int step = 0; step < 10; ++step) {
    for (float& x : g) x = normal(random);
    cpu::Loop<Float32, Float32, Float32, Step>(wide_columns, h).by_element(0, length);
    cpu::Loop<SplitBFloat16, Float32, Float32, Step>(columns, h).by_element(0, 500);
    cpu::Loop<SplitBFloat16, Float32, Float32, Step>(columns, h).by_element(500, length);
  }
  for (int64_t i = 0; i < length; ++i) {
    CHECK(split.load(i) == p[i]);
    CHECK(split_b[i] == b[i]);
  }

  alignas(16) uint16_t aligned_high[24];
  alignas(16) int16_t aligned_low[24];
  void* packs[] = {aligned_high, aligned_low};
  const SplitBFloat16 packed(packs);
  for (int64_t i = 0; i + 8 <= 24; i += 3) {
    float x[8], y[8];
    for (int k = 0; k < 8; ++k) x[k] = p[i + k];
    CHECK(packed.aligned(i) == (i % 8 == 0));
    packed.store_pack(i, packed.aligned(i), x);
    SplitBFloat16::unpack(packed.load_pack<8>(i, packed.aligned(i)), y);
    for (int k = 0; k < 8; ++k) {
      CHECK(x[k] == p[i + k]);
      CHECK(y[k] == x[k]);
      CHECK(packed.load(i + k) == x[k]);
    }
  }
  std::printf("split: %d failures\n", failures);
  return failures;
}
