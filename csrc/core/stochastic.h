// bf16 and fp16 without master weights, rounded stochastically: up or down with the probabilities that make the
// rounding right on average, so that updates below half a unit in the last place are not lost.
//
// Which random bits an element gets is fixed, so that any chunks, any instruction set and CUDA give the same result:
//
//   Philox4x32-7,  key      word 0, 1 = the seed's lower and upper half
//                  counter  word 0 = call's lower 32 bits
//                           word 1 = call's next 16 bits | (step's bits 32 to 47) << 16
//                           word 2 = step's lower 32 bits
//                           word 3 = id's lower 32 bits
//   bf16   element i takes call i / 8 and of its words, as little-endian memory, the 16-bit number i % 8
//   fp16   element i takes call i / 4 and of its words the 32-bit number i % 4
//
// i is the logical element of the parameter, from 0.
#pragma once

#include <bit>

#include "formats.h"
#include "philox.h"

namespace fused_sgd {

// What a parameter's random bits depend on; it stands in memory, since only the device knows which steps it skipped.
struct StochasticRecord {
  uint64_t seed;
  uint64_t id;    // of the parameter: two with the same seed and id round alike
  uint64_t step;  // applied steps before this one
  uint64_t unused;
};
static_assert(sizeof(StochasticRecord) == 32);

// The random bits of one parameter's step. Draw: uint16_t or uint32_t, what an element takes.
template <class Draw>
class RandomBits {
  static_assert(std::endian::native == std::endian::little);

 public:
  static constexpr uint32_t kBits = 8 * sizeof(Draw);
  static constexpr int kPerCall = 128 / kBits;

  FSGD_INLINE explicit RandomBits(const StochasticRecord& record)
      : key_{{static_cast<uint32_t>(record.seed), static_cast<uint32_t>(record.seed >> 32)}},
        step_(record.step),
        id_(static_cast<uint32_t>(record.id)) {}

  FSGD_INLINE Draw draw(int64_t i) const {
    PhiloxWords words;
    philox(counter(i), key_, &words, 1);
    const auto bit = static_cast<uint32_t>(i % kPerCall) * kBits;
    // Selects, where an index would put the words into memory.
    const uint64_t low = words.word[0] | static_cast<uint64_t>(words.word[1]) << 32;
    const uint64_t high = words.word[2] | static_cast<uint64_t>(words.word[3]) << 32;
    return static_cast<Draw>((bit < 64 ? low : high) >> bit % 64);
  }

  // Of n elements from i on, both multiples of a call's.
  FSGD_INLINE void draw(int64_t i, int n, Draw* draws) const { philox(counter(i), key_, draws, n / kPerCall); }

  template <int n>
  struct Draws {
    alignas(16) Draw draw[n];
  };
  template <int n>
  FSGD_INLINE Draws<n> draws(int64_t i) const {
    static_assert(n % kPerCall == 0);
    Draws<n> draws;
    draw(i, n, draws.draw);
    return draws;
  }

 private:
  FSGD_INLINE PhiloxWords counter(int64_t i) const {
    const auto call = static_cast<uint64_t>(i) / kPerCall;
    const uint64_t high = (call >> 32 & 0xFFFFu) | (step_ >> 32 & 0xFFFFu) << 16;
    return {{static_cast<uint32_t>(call), static_cast<uint32_t>(high), static_cast<uint32_t>(step_), id_}};
  }

  PhiloxKey key_;
  uint64_t step_;
  uint32_t id_;
};

// Adds the random number to the bits that are cut off and lets the carry decide. An exact value has none and stays.
// Beyond the largest finite value, where no neighbour is left to choose, it rounds to nearest even.
FSGD_INLINE uint16_t round_stochastically_bfloat16(float x, uint16_t draw) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t nearest = float_to_bfloat16(x), random = (bits + draw) >> 16;
  return static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F7F0000u ? nearest : random);
}

// condition ? first : second. Of the plain form compilers make a branch around what it takes to compute one of them,
// and then no vectors.
FSGD_INLINE uint32_t without_branch(bool condition, uint32_t first, uint32_t second) {
  const uint32_t mask = 0u - static_cast<uint32_t>(condition);
  return (first & mask) | (second & ~mask);
}

// The same in fp16, which cuts off 13 bits. Its subnormals have a fixed step of 2^-24: there the fraction of a step, to
// 31 bits, and 31 random bits are added. (A fraction has more bits only below 2^-32.)
FSGD_INLINE uint16_t round_stochastically_float16(float x, uint32_t draw) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t normal = (magnitude - (112u << 23) + (draw >> 19)) >> 13;
  constexpr uint32_t kNormal = 113u << 23;
  const float steps = bit_cast<float>(magnitude < kNormal ? magnitude : kNormal) * 16777216.0f;  // to 1024, exact
  const auto whole = static_cast<int32_t>(steps);
  const auto fraction = static_cast<int32_t>((steps - static_cast<float>(whole)) * 2147483648.0f);
  const uint32_t subnormal = static_cast<uint32_t>(whole) + ((static_cast<uint32_t>(fraction) + (draw >> 1)) >> 31);
  // Above 65504 to nearest, as float_to_float16() does.
  const uint32_t infinite = magnitude > 0x7F800000u ? 0x7E00u : 0x7C00u;
  const uint32_t large = magnitude < 0x477FF000u ? 0x7BFFu : infinite;  // 65520 is the tie with 2^16
  const uint32_t random = without_branch(magnitude < kNormal, subnormal, normal);
  return static_cast<uint16_t>(without_branch(magnitude > 0x477FE000u, large, random) | sign);
}

// Columns: the narrow parameter, its StochasticRecord.
template <class DrawType, float (*kDecode)(uint16_t), uint16_t (*kRound)(float, DrawType)>
struct Stochastic {
  using Acc = float;
  using Draw = DrawType;
  using Record = StochasticRecord;
  static constexpr int kColumns = 2;
  static constexpr int kBytes = 2;
  static constexpr int kBlock = 1;
  static constexpr int kBatch = 128;  // every divisor of it will do as well, down to a call's
  static constexpr bool kConvertsMany = kConvertsEight<kDecode>;

  Column<uint16_t> parameter;
  const StochasticRecord* record;

  FSGD_INLINE explicit Stochastic(void* const* columns)
      : parameter(columns[0]), record(static_cast<const StochasticRecord*>(columns[1])) {}
  FSGD_INLINE RandomBits<Draw> random() const { return RandomBits<Draw>(*record); }
  FSGD_INLINE static void count_step(void* const* columns) { ++static_cast<StochasticRecord*>(columns[1])->step; }
  FSGD_INLINE float load(int64_t i) const { return kDecode(parameter.data[i]); }
  FSGD_INLINE float store(int64_t i, float x) const { return store(i, x, random().draw(i)); }
  FSGD_INLINE float store(int64_t i, float x, Draw draw) const {
    const uint16_t stored = kRound(x, draw);
    parameter.data[i] = stored;
    return kDecode(stored);
  }

  FSGD_INLINE void draw(int64_t i, int n, Draw* draws) const { random().draw(i, n, draws); }

  template <int n>
  FSGD_INLINE void prefetch(int64_t i) const {
    parameter.template prefetch<n>(i);
  }
  FSGD_INLINE uint32_t until_aligned() const { return parameter.until_aligned(); }
  FSGD_INLINE bool aligned(int64_t i) const { return parameter.aligned(i); }
  template <int n>
  using Packed = Column<uint16_t>::Packed<n>;
  template <int n>
  FSGD_INLINE Packed<n> load_pack(int64_t i, bool wide) const {
    return parameter.load_pack<n>(i, wide);
  }
  template <int n>
  FSGD_INLINE static void unpack(const Packed<n>& pack, float (&x)[n]) {
    decode<kDecode>(pack.element, x);
  }
  template <int n>
  using Draws = typename RandomBits<Draw>::template Draws<n>;
  template <int n>
  FSGD_INLINE void store_pack(int64_t i, bool wide, float (&x)[n], const Draws<n>& draws) const {
    Packed<n> pack;
    FSGD_UNROLL
    for (int k = 0; k < n; ++k) {
      pack.element[k] = kRound(x[k], draws.draw[k]);
    }
    unpack(pack, x);
    parameter.store_pack(i, wide, pack);
  }
};

// With two neighbours in one word, as BFloat16 has.
struct StochasticBFloat16 : Stochastic<uint16_t, bfloat16_to_float, round_stochastically_bfloat16> {
  using Stochastic::Stochastic;
  FSGD_INLINE void load_pair(int64_t i, float (&x)[2]) const {
    const uint32_t word = parameter.word(i);
    x[0] = bit_cast<float>(word << 16);
    x[1] = bit_cast<float>(word & 0xFFFF0000u);
  }
  // draws: of the first element in the lower half.
  FSGD_INLINE void store_pair(int64_t i, float (&x)[2], uint32_t draws) const {
    store_pair(i, rounded(x[0], draws & 0xFFFFu), rounded(x[1], draws >> 16), x);
  }

  // What is beyond the largest finite value is rare: it and its draw become what the rest rounds right.
  template <int n>
  FSGD_INLINE void store_pack(int64_t i, bool wide, float (&x)[n], Draws<n> draws) const {
    bool below = true;
    FSGD_UNROLL
    for (int k = 0; k < n; ++k) below &= is_below(x[k]);
    if (!below) {
      FSGD_UNROLL
      for (int k = 0; k < n; ++k) {
        if (!is_below(x[k])) draws.draw[k] = 0x8000u;
        if (x[k] != x[k]) x[k] = bit_cast<float>(0x7FC00000u);
      }
    }
    Packed<n> pack;
    FSGD_UNROLL
    for (int k = 0; k < n; k += 2) {
      const uint32_t two = get_word(draws.draw + k);
      const uint32_t first = bit_cast<uint32_t>(x[k]) + (two & 0xFFFFu);
      const uint32_t second = bit_cast<uint32_t>(x[k + 1]) + (two >> 16);
      set_word(pack.element + k, upper_halves(first, second));
    }
    unpack(pack, x);
    parameter.store_pack(i, wide, pack);
  }

  FSGD_INLINE const uint16_t* numbers(int64_t i) const { return parameter.data + i; }
  struct StoresFinite {
    const StochasticBFloat16& format;
    FSGD_INLINE float store(int64_t i, float x, Draw draw) const {
      const auto stored = static_cast<uint16_t>((bit_cast<uint32_t>(x) + draw) >> 16);
      format.parameter.data[i] = stored;
      return bfloat16_to_float(stored);
    }
    FSGD_INLINE void store_pair(int64_t i, float (&x)[2], uint32_t draws) const {
      format.store_pair(i, bit_cast<uint32_t>(x[0]) + (draws & 0xFFFFu), bit_cast<uint32_t>(x[1]) + (draws >> 16), x);
    }
  };

 private:
  FSGD_INLINE static bool is_below(float x) {  // and no NaN
    return __builtin_fabsf(x) <= bit_cast<float>(0x7F7F0000u);
  }
  // round_stochastically_bfloat16() in the upper half. Beyond the largest finite value one half is added, which rounds
  // to nearest: a tie goes to infinity, whose bits are even.
  FSGD_INLINE static uint32_t rounded(float x, uint32_t draw) {
    const uint32_t bits = bit_cast<uint32_t>(x);
    const float magnitude = bit_cast<float>(bits & 0x7FFFFFFFu);  // float: compilers have a comparison less for it
    const uint32_t added = magnitude > bit_cast<float>(0x7F7F0000u) ? 0x8000u : draw;
    return x != x ? 0x7FC00000u : bits + added;
  }
  // The upper halves; x becomes what a load would now give.
  FSGD_INLINE void store_pair(int64_t i, uint32_t first, uint32_t second, float (&x)[2]) const {
    first >>= 16;
    second &= 0xFFFF0000u;
    parameter.word(i) = first | second;
    x[0] = bit_cast<float>(first << 16);
    x[1] = bit_cast<float>(second);
  }
};
using StochasticFloat16 = Stochastic<uint32_t, float16_to_float, round_stochastically_float16>;

}  // namespace fused_sgd
