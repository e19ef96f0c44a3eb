// Stochastic rounding: Philox's known answers, the layout of the bits, no bias, and what must never move. CMake
// compiles this once per instruction set: each has its own way to call Philox many times.
#include "core/stochastic.h"

#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "check.h"
#include "cpu/elements.h"

using namespace fused_sgd;

namespace {

using Step = cpu::Kind<true, false, cpu::Terms::Plain>;

bool same(PhiloxWords a, PhiloxWords b) {
  return a.word[0] == b.word[0] && a.word[1] == b.word[1] && a.word[2] == b.word[2] && a.word[3] == b.word[3];
}

// The layout as stochastic.h writes it down, without its code.
uint32_t documented_draw(const StochasticRecord& r, int64_t i, int bits) {
  const auto call = static_cast<uint64_t>(i / (128 / bits));
  const PhiloxWords counter{{static_cast<uint32_t>(call),
                             static_cast<uint32_t>((call >> 32 & 0xFFFF) | (r.step >> 32 & 0xFFFF) << 16),
                             static_cast<uint32_t>(r.step), static_cast<uint32_t>(r.id)}};
  const PhiloxWords words = philox(counter, {{static_cast<uint32_t>(r.seed), static_cast<uint32_t>(r.seed >> 32)}});
  const auto bit = static_cast<uint32_t>(i % (128 / bits) * bits);
  const uint32_t word = words.word[bit / 32];
  return bits == 32 ? word : word >> bit % 32 & 0xFFFF;
}

constexpr float kBelowInfinity = 3.4028235e38f;

// What a format's element is rounded with, and to.
struct BFloat16Case {
  using Format = StochasticBFloat16;
  using Nearest = BFloat16;
  static constexpr int kBits = 16;
  static constexpr float kLargest = 3.3895314e38f;
  static constexpr uint16_t kInfinity = 0x7F80;
  static uint16_t round(float x, uint32_t draw) {
    return round_stochastically_bfloat16(x, static_cast<uint16_t>(draw));
  }
  static uint16_t nearest(float x) { return float_to_bfloat16(x); }
  static float value(uint16_t bits) { return bfloat16_to_float(bits); }
  static std::vector<float> samples() { return {1.001f, -3.1415927f, 1e-3f, 1e-39f, -2e-40f, 1.9999f, 3.385e38f}; }
};
struct Float16Case {
  using Format = StochasticFloat16;
  using Nearest = Float16;
  static constexpr int kBits = 32;
  static constexpr float kLargest = 65504;
  static constexpr uint16_t kInfinity = 0x7C00;
  static uint16_t round(float x, uint32_t draw) { return round_stochastically_float16(x, draw); }
  static uint16_t nearest(float x) { return float_to_float16(x); }
  static float value(uint16_t bits) { return float16_to_float(bits); }
  static std::vector<float> samples() {
    // from 6.1e-5 down subnormal: between the last two, among few bits, and below the least of them
    return {1.0001f, -0.1f, 65500.5f, 6.1025e-05f, 1e-5f, -1.2345e-6f, 8e-8f, 3e-8f, 1e-9f};
  }
};

template <class Case>
int exactness() {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const auto half = static_cast<uint16_t>(bits);
    const float x = Case::value(half);
    for (uint32_t draw : {0u, 1u, 0x7FFFFFFFu, 0x80000000u, 0xFFFFFFFFu, 0xFFFF0000u}) {
      if (std::isnan(x)) {
        CHECK(std::isnan(Case::value(Case::round(x, draw))));
      } else {
        CHECK(Case::round(x, draw) == half);
      }
    }
  }
  // Beyond the largest value as to nearest; below it never away to infinity.
  for (float x = Case::kLargest; x < kBelowInfinity && x < 4 * Case::kLargest;
       x = std::nextafter(x * (1 + 1e-6f), HUGE_VALF)) {
    CHECK(Case::round(x, 0xFFFFFFFF) == Case::nearest(x));
    CHECK(Case::round(-x, 0xFFFFFFFF) == Case::nearest(-x));
  }
  CHECK(Case::round(std::nextafter(Case::kLargest, 0.0f), 0xFFFFFFFF) == Case::kInfinity - 1);
  CHECK(Case::round(std::nextafter(Case::kLargest, HUGE_VALF), 0xFFFFFFFF) == Case::kInfinity - 1);
  CHECK(Case::round(kBelowInfinity, 0) == Case::kInfinity);
  return failures;
}

template <class Case>
int no_bias() {
  const int64_t n = 1 << 20;
  std::vector<uint16_t> rounded(n);
  for (const float x : Case::samples()) {
    StochasticRecord record{0x123456789ABCDEFull, 7, 0, 0};
    void* columns[] = {rounded.data(), &record};
    const typename Case::Format format(columns);
    for (int64_t i = 0; i < n; i += 128) {
      float batch[128];
      for (float& b : batch) b = x;
      format.store_pack(i, false, batch, format.random().template draws<128>(i));
    }

    const float size = std::fabs(x);
    uint16_t low = Case::nearest(size);
    if (Case::value(low) > size) --low;
    const double below = Case::value(low), above = Case::value(low + 1);
    double sum = 0;
    for (const uint16_t bits : rounded) {
      CHECK((bits & 0x7FFF) == low || (bits & 0x7FFF) == low + 1);
      CHECK(bits >> 15 == std::signbit(x));
      sum += std::fabs(static_cast<double>(Case::value(bits))) - size;
    }
    const double fraction = (size - below) / (above - below);
    const double standard_error = (above - below) * std::sqrt(fraction * (1 - fraction) / static_cast<double>(n));
    CHECK(std::fabs(sum / static_cast<double>(n)) <= 4 * standard_error);
  }
  return failures;
}

template <class Case>
int layout() {
  std::mt19937 random(0);
  std::normal_distribution<float> normal;
  const int64_t n = 4096 + 77;
  std::vector<float> x(n);
  for (float& value : x) value = normal(random) * (random() % 2 ? 1.0f : 1e-6f);
  for (int64_t i = 5; i < n; i += 37) {  // what rounds to nearest, and has packs to itself or not
    const float large[] = {Case::kLargest, -kBelowInfinity, HUGE_VALF, -Case::kLargest, NAN};
    x[i] = large[i % 5];
  }
  // High halves of seed and step count, and elements on both sides of 2^34, where a call's number has 32 bits.
  for (const StochasticRecord record : {StochasticRecord{0, 0, 0, 0}, StochasticRecord{1, 0, 0, 0},
                                        StochasticRecord{uint64_t{5} << 32 | 9, 3, uint64_t{2} << 32 | 11, 0}}) {
    StochasticRecord stored = record;
    std::vector<uint16_t> expected(n), elements(n), packs(n), batches(n);
    for (int64_t i = 0; i < n; ++i) expected[i] = Case::round(x[i], documented_draw(record, i, Case::kBits));
    const auto format = [&stored](std::vector<uint16_t>& data) {
      void* columns[] = {data.data(), &stored};
      return typename Case::Format(columns);
    };
    const auto same_value = [](float a, float b) { return a == b || (a != a && b != b); };
    for (int64_t i = 0; i < n; ++i) CHECK(same_value(format(elements).store(i, x[i]), Case::value(expected[i])));
    CHECK(elements == expected);
    for (const int64_t head : {0, 8}) {
      std::fill(packs.begin(), packs.end(), uint16_t{0});
      int64_t i = 0;
      for (; i < head; ++i) format(packs).store(i, x[i]);
      for (; i + 8 <= n; i += 8) {
        float pack[8];
        for (int k = 0; k < 8; ++k) pack[k] = x[i + k];
        format(packs).store_pack(i, false, pack, format(packs).random().template draws<8>(i));
        for (int k = 0; k < 8; ++k) CHECK(same_value(pack[k], Case::value(expected[i + k])));
      }
      for (; i < n; ++i) format(packs).store(i, x[i]);
      CHECK(packs == expected);
    }
    int64_t i = 0;
    for (; i + 128 <= n; i += 128) {
      float batch[128];
      for (int k = 0; k < 128; ++k) batch[k] = x[i + k];
      format(batches).store_pack(i, false, batch, format(batches).random().template draws<128>(i));
      for (int k = 0; k < 128; ++k) CHECK(same_value(batch[k], Case::value(expected[i + k])));
    }
    for (; i < n; ++i) format(batches).store(i, x[i]);
    CHECK(batches == expected);

    for (const int64_t far : {int64_t{0}, (int64_t{1} << 34) - 128, int64_t{1} << 35, int64_t{1} << 40}) {
      void* columns[] = {batches.data(), &stored};
      const auto draws = typename Case::Format(columns).random().template draws<128>(far);
      for (int k = 0; k < 128; ++k) CHECK(draws.draw[k] == documented_draw(record, far + k, Case::kBits));
    }
  }
  return failures;
}

// Steps of the CPU walk: the same however it is split; and progress where rounding to nearest stalls.
template <class Case>
int walks() {
  const int64_t n = 1000;
  Group group;
  group.lr = 1e-5;
  group.momentum = 0.9;
  const Hyperparameters<float> h(group, Scalars{}, 0);
  std::vector<float> gradient(n, 0.1f);
  std::vector<uint16_t> whole(n, Case::nearest(1)), split = whole, nearest = whole;
  std::vector<float> b(n), split_b = b, nearest_b = b;
  for (uint64_t step = 0; step < 200; ++step) {
    StochasticRecord record{1, 2, step, 0};
    void* columns[] = {whole.data(), &record, gradient.data(), b.data()};
    void* split_columns[] = {split.data(), &record, gradient.data(), split_b.data()};
    void* nearest_columns[] = {nearest.data(), gradient.data(), nearest_b.data()};
    cpu::Loop<typename Case::Format, Float32, Float32, Step>(columns, h).run(0, n);
    cpu::Loop<typename Case::Format, Float32, Float32, Step>(split_columns, h).by_element(0, 333);
    cpu::Loop<typename Case::Format, Float32, Float32, Step>(split_columns, h).by_element(333, n);
    cpu::Loop<typename Case::Nearest, Float32, Float32, Step>(nearest_columns, h).by_element(0, n);
  }
  CHECK(whole == split);
  // An average follows what was stored, not what was computed: its first step copies that.
  group.has_ema = 1;
  const Hyperparameters<float> averaging(group, Scalars{}, 0);
  StochasticRecord record{1, 2, 200, 0};
  std::vector<float> ema(n, unset_value(float()));
  void* columns[] = {split.data(), &record, gradient.data(), split_b.data(), ema.data()};
  cpu::Loop<typename Case::Format, Float32, Float32, cpu::Kind<true, true, cpu::Terms::Any>>(columns, averaging)
      .run(0, n);
  for (int64_t i = 0; i < n; ++i) CHECK(ema[i] == Case::value(split[i]));
  double mean = 0;
  for (const uint16_t bits : whole) mean += Case::value(bits) / static_cast<double>(n);
  for (const uint16_t bits : nearest) CHECK(Case::value(bits) == 1);  // stalled
  // In fp32: 200 steps of 1e-5 times a momentum that approaches 0.1 / (1 - 0.9).
  CHECK(std::fabs(mean - (1 - 1e-5 * (200 - 9))) < 4e-4);
  return failures;
}

// Between the largest finite bfloat16 and infinity a value is rounded to nearest, however others are, and NaN is NaN,
// whatever made them, in loops that look at many elements before they round them; with a bfloat16 momentum those take
// two at a time.
template <class P, class M>
int large_numbers() {
  using H = Hyperparameters<float>;
  constexpr int64_t n = 3 * 128 + 77;
  constexpr float kLarge = 3.395e38f;
  const auto element = [](float x) {
    if constexpr (std::is_same_v<M, Float32>) {
      return x;
    } else {
      return float_to_bfloat16(x);
    }
  };
  bool has_large = false, has_nan = false;
  const auto check = [&](const H& h, float p, float g, float b, int64_t where, int64_t count) {
    const uint16_t ones = float_to_bfloat16(1), narrow_p = float_to_bfloat16(p);
    std::vector<uint16_t> whole(n, ones), single, gradient(n, ones);
    std::vector<decltype(element(1))> momentum(n, element(1)), single_momentum;
    for (int64_t i = where; i < where + count; ++i) {
      whole[i] = narrow_p;
      gradient[i] = float_to_bfloat16(g);
      momentum[i] = element(b);
    }
    single = whole;
    single_momentum = momentum;
    StochasticRecord record{1, 2, 3, 0};
    const auto columns = [&](std::vector<uint16_t>& params, auto& its_momentum) {
      std::vector<void*> all{params.data(), gradient.data(), its_momentum.data()};
      if (P::kColumns == 2) all.insert(all.begin() + 1, &record);
      return all;
    };
    using Loop = cpu::Loop<P, BFloat16, M, cpu::Kind<true, false, cpu::Terms::Nesterov>>;
    Loop(columns(whole, momentum).data(), h).run(0, n);
    Loop(columns(single, single_momentum).data(), h).by_element(0, n);
    CHECK(whole == single);
    CHECK(std::memcmp(momentum.data(), single_momentum.data(), n * sizeof(momentum[0])) == 0);
    for (const uint16_t bits : whole) {
      has_large |= (bits & 0x7FFF) == 0x7F7F;
      has_nan |= bits == 0x7FC0;
    }
    return failures;
  };
  Group group;
  group.lr = group.momentum = 1;
  group.nesterov = 1;
  const H usual(group, Scalars{}, 0);
  check(usual, 1, 1, 1, 0, n);
  for (const float large : {kLarge, -kLarge, 3e38f, 0x1p41f, INFINITY, NAN, unset_value(float())}) {
    for (const int64_t where : {0, 127, 128, 255, 256, 383, 384, 447, 460}) {
      const int64_t count = where == 0 ? n : 1;
      check(usual, large, 0, 0, where, count);
      check(usual, 0, large, 0, where, count);
      check(usual, 0, 0, large, where, count);
    }
  }
  for (float H::* field : {&H::neg_lr, &H::momentum, &H::one_minus_dampening, &H::weight_decay, &H::grad_factor,
                           &H::decay_factor, &H::trust_ratio}) {
    for (const float large : {kLarge, -kLarge, 1e38f, INFINITY, NAN}) {
      H h = usual;
      h.weight_decay = 0;
      h.has_weight_decay = true;
      h.*field = large;
      for (const float p : {0.0f, 1.0f}) {
        for (const float g : {0.0f, 1.0f}) {
          for (const float b : {0.0f, 1.0f, unset_value(float())}) check(h, p, g, b, 0, n);
        }
      }
    }
  }
  // On both sides of what is moderate.
  const float limit = 0x1p15f, above = std::nextafter(limit, kLarge);
  for (const float field : {limit, -limit, above, -above}) {
    H h = usual;
    h.neg_lr = h.momentum = h.one_minus_dampening = h.weight_decay = h.grad_factor = h.decay_factor = h.trust_ratio =
        field;
    h.has_weight_decay = true;
    for (const float x : {0x1.fep39f, -0x1.fep39f, 0x1p40f, -0x1p40f}) check(h, x, x, x, 0, n);
  }
  CHECK(has_large && has_nan);
  return failures;
}

// Not inlined into main(), which asks first whether it can run.
[[gnu::noinline]] int run() {
  // The known answers that Random123, the authors' library, comes with.
  CHECK(same(philox({{0, 0, 0, 0}}, {{0, 0}}), {{0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48}}));
  CHECK(same(philox({{~0u, ~0u, ~0u, ~0u}}, {{~0u, ~0u}}), {{0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662}}));
  CHECK(same(philox({{0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344}}, {{0xA4093822, 0x299F31D0}}),
             {{0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A}}));
  exactness<BFloat16Case>();
  exactness<Float16Case>();
  no_bias<BFloat16Case>();
  no_bias<Float16Case>();
  layout<BFloat16Case>();
  layout<Float16Case>();
  walks<BFloat16Case>();
  walks<Float16Case>();
  large_numbers<StochasticBFloat16, Float32>();
  large_numbers<StochasticBFloat16, BFloat16>();
  large_numbers<BFloat16, BFloat16>();
  std::printf("stochastic: %d failures\n", failures);
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
