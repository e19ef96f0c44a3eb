// fp32 in two columns of 16 bits: a bf16 parameter, which the model computes with, and the remainder, which only the
// optimizer sees. Together they are the exact fp32 value.
#pragma once

#include "column.h"

namespace fused_sgd {

struct Split {
  uint16_t high;  // bf16
  int16_t low;    // what is missing, in units of fp32's last bit
};

// Rounds to nearest, ties away from zero. Not to even: the numbers that round to an even bf16 are 65,537, one more than
// 16 bits tell apart. Signalling NaNs become quiet, lest cutting a NaN leave an infinity; nothing else changes.
FSGD_INLINE Split round_split(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t high = x != x ? bits >> 16 | 0x40u : (bits + 0x8000u) >> 16;
  return {static_cast<uint16_t>(high), static_cast<int16_t>(static_cast<uint16_t>(bits))};
}

// Someone else may have written a zero or an infinity into the parameter, beside a remainder that belongs to no such
// value: their sum is a NaN. The remainder then counts as 0. (No pair that round_split() makes is one of these.)
// high: in the upper half of a word; low: with its sign in the upper half.
FSGD_INLINE float join_words(uint32_t high, uint32_t low) {
  const uint32_t number = high + low;
  // Where high is a NaN, its payload is whole with the remainder's bits. Else it is a zero or an infinity.
  const float sum = bit_cast<float>(number), upper = bit_cast<float>(high);
  const uint32_t payload = upper != upper ? low & 0xFFFFu : 0u;
  return bit_cast<float>(sum != sum ? high | payload : number);
}

FSGD_INLINE float join_split(Split split) {
  return join_words(static_cast<uint32_t>(split.high) << 16, static_cast<uint32_t>(static_cast<int32_t>(split.low)));
}

// Columns: the bf16 parameter, its remainder (int16). What was stored is what a load gives: only a signalling NaN would
// change, and no arithmetic leaves one.
struct SplitBFloat16 {
  using Acc = float;
  static constexpr int kColumns = 2;
  static constexpr int kBytes = 4;
  static constexpr int kBlock = 1;

  Column<uint16_t> parameter;
  Column<int16_t> remainder;

  FSGD_INLINE explicit SplitBFloat16(void* const* columns) : parameter(columns[0]), remainder(columns[1]) {}
  FSGD_INLINE float load(int64_t i) const { return join_split({parameter.data[i], remainder.data[i]}); }
  FSGD_INLINE float store(int64_t i, float x) const {
    parameter.data[i] = static_cast<uint16_t>(rounded(x) >> 16);
    remainder.data[i] = static_cast<int16_t>(static_cast<uint16_t>(bit_cast<uint32_t>(x)));
    return x;
  }

  template <int n>
  FSGD_INLINE bool are_below(float limit, int64_t i) const {
    uint16_t largest = 0;
    for (int k = 0; k < n; ++k) {
      const auto upper = static_cast<uint16_t>(parameter.data[i + k] + (remainder.data[i + k] >> 15));  // of their sum
      const auto exponent = static_cast<uint16_t>(upper & 0x7F80u);
      largest = exponent > largest ? exponent : largest;
    }
    return largest < bit_cast<uint32_t>(limit) >> 16;
  }
  struct LoadsFinite {
    const SplitBFloat16& format;
    FSGD_INLINE float load(int64_t i) const {
      const uint32_t high = format.parameter.data[i];
      return bit_cast<float>((high << 16) + static_cast<uint32_t>(static_cast<int32_t>(format.remainder.data[i])));
    }
    FSGD_INLINE void load_pair(int64_t i, float (&x)[2]) const {
      const uint32_t high = format.parameter.word(i), low = format.remainder.word(i);
      x[0] = bit_cast<float>((high << 16) + extended(low << 16));
      x[1] = bit_cast<float>((high & 0xFFFF0000u) + extended(low));
    }
  };

  FSGD_INLINE void load_pair(int64_t i, float (&x)[2]) const {
    const uint32_t high = parameter.word(i), low = remainder.word(i);
    x[0] = join_words(high << 16, extended(low << 16));
    x[1] = join_words(high & 0xFFFF0000u, extended(low));
  }
  FSGD_INLINE void store_pair(int64_t i, const float (&x)[2]) const {
    parameter.word(i) = high_word(x[0], x[1]);
    remainder.word(i) = low_word(x[0], x[1]);
  }

  template <int n>
  FSGD_INLINE void prefetch(int64_t i) const {
    parameter.template prefetch<n>(i);
    remainder.template prefetch<n>(i);
  }
  FSGD_INLINE uint32_t until_aligned() const { return parameter.until_aligned(); }
  FSGD_INLINE bool aligned(int64_t i) const { return parameter.aligned(i) && remainder.aligned(i); }
  template <int n>
  struct Packed {
    Column<uint16_t>::Packed<n> high;
    Column<int16_t>::Packed<n> low;
  };
  template <int n>
  FSGD_INLINE Packed<n> load_pack(int64_t i, bool wide) const {
    return {parameter.load_pack<n>(i, wide), remainder.load_pack<n>(i, wide)};
  }
  template <int n>
  FSGD_INLINE static void unpack(const Packed<n>& pack, float (&x)[n]) {
    FSGD_UNROLL
    for (int k = 0; k < n; k += 2) {
      const uint32_t high = get_word(pack.high.element + k), low = get_word(pack.low.element + k);
      x[k] = join_words(high << 16, extended(low << 16));
      x[k + 1] = join_words(high & 0xFFFF0000u, extended(low));
    }
  }
  template <int n>
  FSGD_INLINE void store_pack(int64_t i, bool wide, const float (&x)[n]) const {
    Packed<n> pack;
    FSGD_UNROLL
    for (int k = 0; k < n; k += 2) {
      set_word(pack.high.element + k, high_word(x[k], x[k + 1]));
      set_word(pack.low.element + k, low_word(x[k], x[k + 1]));
    }
    parameter.store_pack(i, wide, pack.high);
    remainder.store_pack(i, wide, pack.low);
  }

 private:
  // The remainder with its sign, from the upper half of a word.
  FSGD_INLINE static uint32_t extended(uint32_t low) { return static_cast<uint32_t>(static_cast<int32_t>(low) >> 16); }
  // Of two neighbours, the high and the low parts.
  FSGD_INLINE static uint32_t high_word(float first, float second) {
    return upper_halves(rounded(first), rounded(second));
  }
  FSGD_INLINE static uint32_t low_word(float first, float second) {
    return (bit_cast<uint32_t>(first) & 0xFFFFu) | bit_cast<uint32_t>(second) << 16;
  }
  // round_split()'s high part, in the upper half of a word.
  FSGD_INLINE static uint32_t rounded(float x) {
    const uint32_t bits = bit_cast<uint32_t>(x);
    return x != x ? bits | 0x400000u : bits + 0x8000u;
  }
};

}  // namespace fused_sgd
