// Momentum in 8 bits: codes from -127 to 127 and one fp32 scale for each kBlock elements, the block's largest magnitude
// being 127. Half a scale is the error bound:
//
//   |decoded - x| <= scale * (1/2 + 2^-15)       scale = max(largest magnitude / 127, 2^-126), at most kLargestScale
//
// so a block of zeros is exact. (No scale is subnormal: its inverse stays finite, and nothing is lost where subnormals
// are flushed to zero. And 127 of the largest are finite.) A block that holds an infinity or NaN becomes NaN as a
// whole, lest the error seem to be gone. A block to which nothing was added yet has the rule's unset_value()
// for its scale, and all of its elements decode to that, whatever their codes.
#pragma once

#include "column.h"

namespace fused_sgd {

inline constexpr float kSmallestScale = 0x1p-126f, kLargestScale = 0x1.020406p+121f;

// Columns: the codes (int8), the scales (fp32, one a block). kBlockSize: a power of two, 16 or more.
template <int kBlockSize>
struct Int8Momentum {
  using Acc = float;
  static constexpr int kColumns = 2;
  static constexpr int kBytes = 1;  // and 4 / kBlock
  static constexpr int kBlock = kBlockSize;

  Column<int8_t> codes;
  float* scales;

  FSGD_INLINE explicit Int8Momentum(void* const* columns)
      : codes(columns[0]), scales(static_cast<float*>(columns[1])) {}

  // What a block's elements have in common when they are loaded. Loops take it once a block.
  FSGD_INLINE float open(int64_t block) const { return scales[block]; }
  FSGD_INLINE float load(int64_t i, float scale) const { return decode(codes.data[i], scale); }
  FSGD_INLINE float load(int64_t i) const { return load(i, open(i / kBlock)); }

  // By their scales, of which a code is at most 128 times, in someone else's numbers. So may a scale be negative there.
  template <int n>
  FSGD_INLINE bool are_below(float limit, int64_t i) const {
    bool below = true;
    for (int k = 0; k < n; k += kBlock) {
      const float scale = open((i + k) / kBlock);
      below = below && -limit / 128 < scale && scale < limit / 128;
    }
    return below;
  }

  // The largest magnitude as bits, which are ordered as magnitudes are, with infinities and NaNs above all others: the
  // order of reduction makes no difference.
  struct Reduction {
    int32_t largest = 0;
  };
  FSGD_INLINE static void reduce(Reduction& reduction, float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    float largest;  // or a NaN whose bits are above all others'
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(largest) : "f"(bit_cast<float>(reduction.largest)), "f"(fabsf(x)));
    reduction.largest = bit_cast<int32_t>(largest);
#else
    merge(reduction, {bit_cast<int32_t>(x) & 0x7FFFFFFF});
#endif
  }
  FSGD_INLINE static void merge(Reduction& reduction, Reduction other) {
    reduction.largest = other.largest > reduction.largest ? other.largest : reduction.largest;
  }

  FSGD_INLINE void store(int64_t i, float x, Reduction reduction) const {
    codes.data[i] = encode(x, inverse(reduction));
  }
  FSGD_INLINE float finish(int64_t block, Reduction reduction) const { return scales[block] = scale(reduction); }

  FSGD_INLINE void load_block(int64_t block, float (&x)[kBlock]) const {
    const float scale = scales[block];
    const int8_t* code = codes.data + block * kBlock;
    if (scale != scale) {
      for (int k = 0; k < kBlock; ++k) x[k] = scale;
    } else {
      for (int k = 0; k < kBlock; ++k) x[k] = multiply(static_cast<float>(code[k]), scale);
    }
  }
  FSGD_INLINE void store_block(int64_t block, const float (&x)[kBlock]) const {
    Reduction reduction;
    for (int k = 0; k < kBlock; ++k) reduce(reduction, x[k]);
    const float scale = finish(block, reduction), inverse = divide(1.0f, scale);
    int8_t* code = codes.data + block * kBlock;
    if (scale != scale) {
      for (int k = 0; k < kBlock; ++k) code[k] = 0;
    } else {
      for (int k = 0; k < kBlock; ++k) code[k] = static_cast<int8_t>(static_cast<uint8_t>(shifted(x[k], inverse)));
    }
  }

  // The same with the elements of even numbers apart from those of odd ones, for loops over two neighbours in one word.
  FSGD_INLINE void load_block(int64_t block, float (&even)[kBlock / 2], float (&odd)[kBlock / 2]) const {
    const float scale = scales[block];
    const int8_t* code = codes.data + block * kBlock;
    if (scale != scale) {
      for (int k = 0; k < kBlock / 2; ++k) even[k] = odd[k] = scale;
    } else {
      for (int k = 0; k < kBlock / 2; ++k) {
        int16_t two;
        __builtin_memcpy(&two, code + 2 * k, sizeof(two));
        const auto first = static_cast<int16_t>(static_cast<int16_t>(two << 8) >> 8);
        const auto second = static_cast<int16_t>(two >> 8);
        even[k] = multiply(static_cast<float>(first), scale);
        odd[k] = multiply(static_cast<float>(second), scale);
      }
    }
  }
  FSGD_INLINE void store_block(int64_t block, const float (&even)[kBlock / 2], const float (&odd)[kBlock / 2]) const {
    Reduction reduction;
    for (int k = 0; k < kBlock / 2; ++k) {
      reduce(reduction, even[k]);
      reduce(reduction, odd[k]);
    }
    const float scale = finish(block, reduction), inverse = divide(1.0f, scale);
    int8_t* code = codes.data + block * kBlock;
    if (scale != scale) {
      for (int k = 0; k < kBlock; ++k) code[k] = 0;
    } else {
      for (int k = 0; k < kBlock / 2; ++k) {
        const auto two =
            static_cast<uint16_t>((shifted(even[k], inverse) & 0xFFu) | (shifted(odd[k], inverse) & 0xFFu) << 8);
        __builtin_memcpy(code + 2 * k, &two, sizeof(two));
      }
    }
  }

  template <int n>
  FSGD_INLINE void prefetch(int64_t i) const {
    codes.template prefetch<n>(i);
  }
  FSGD_INLINE uint32_t until_aligned() const { return codes.until_aligned(); }
  FSGD_INLINE bool aligned(int64_t i) const { return codes.aligned(i); }
  // n elements of one block.
  template <int n>
  struct Packed {
    Column<int8_t>::Packed<n> code;
    float scale;
  };
  template <int n>
  FSGD_INLINE Packed<n> load_pack(int64_t i, bool wide) const {
    return {codes.load_pack<n>(i, wide), open(block_of(i))};
  }
  template <int n>
  FSGD_INLINE static void unpack(const Packed<n>& pack, float (&x)[n]) {
    FSGD_UNROLL
    for (int k = 0; k < n; k += 4) {
      const uint32_t four = get_word(pack.code.element + k);
      FSGD_UNROLL
      for (int j = 0; j < 4; ++j)
        x[k + j] = multiply(static_cast<float>(static_cast<int8_t>(four >> 8 * j)), pack.scale);
    }
    if (pack.scale != pack.scale) {
      FSGD_UNROLL
      for (int k = 0; k < n; ++k) x[k] = pack.scale;
    }
  }
  template <int n>
  FSGD_INLINE void store_pack(int64_t i, bool wide, const float (&x)[n], Reduction reduction) const {
    const float scale = Int8Momentum::scale(reduction), inverse = reciprocal(scale);
    if (i % kBlock == 0) scales[block_of(i)] = scale;
    typename Column<int8_t>::Packed<n> pack;
    FSGD_UNROLL
    for (int k = 0; k < n; k += 4) {
      const uint32_t four = low_bytes(shifted(x[k], inverse), shifted(x[k + 1], inverse), shifted(x[k + 2], inverse),
                                      shifted(x[k + 3], inverse));
      set_word(pack.element + k, scale != scale ? 0u : four);
    }
    codes.store_pack(i, wide, pack);
  }

 private:
  FSGD_INLINE static int64_t block_of(int64_t i) { return static_cast<int64_t>(static_cast<uint64_t>(i) / kBlock); }

  // A select and no product: what a product makes of a NaN's bits differs between processors.
  FSGD_INLINE static float decode(int8_t code, float scale) {
    return scale != scale ? scale : multiply(static_cast<float>(code), scale);
  }

  FSGD_INLINE static float scale(Reduction reduction) {
    if (reduction.largest >= 0x7F800000) return bit_cast<float>(0x7FC00000u);
    const float scale = divide_by_127(bit_cast<float>(reduction.largest));
    return scale < kSmallestScale ? kSmallestScale : scale > kLargestScale ? kLargestScale : scale;
  }
  // Zero for a block that is NaN.
  FSGD_INLINE static float inverse(Reduction reduction) {
    return reduction.largest >= 0x7F800000 ? 0.0f : divide(1.0f, scale(reduction));
  }

  // A GPU's division is long, and asks first whether it must be longer. Here it need not: a quotient by a rounded
  // inverse, and the remainder's share, which is exact, is rounded once, and right. (Tried with all numbers.) The
  // inverse is the GPU's approximation and a step of Newton's, as nvcc's own is for numbers that are neither subnormal
  // nor near the largest. (Tried with all scales on an H200; tests/cuda/test_bits.py tries the mantissas that are
  // hardest.)
  FSGD_INLINE static float divide_by_127(float x) {
#if defined(__CUDA_ARCH__)
    constexpr float kInverse = 1.0f / 127.0f;
    const float quotient = multiply(x, kInverse);
    return fma(fma(-127.0f, quotient, x), kInverse, quotient);
#else
    return divide(x, 127.0f);
#endif
  }
  FSGD_INLINE static float reciprocal(float scale) {
#if defined(__CUDA_ARCH__)
    float inverse;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(scale));
    return fma(inverse, fma(-scale, inverse, 1.0f), inverse);
#else
    return divide(1.0f, scale);
#endif
  }

  FSGD_INLINE static uint32_t low_bytes(uint32_t first, uint32_t second, uint32_t third, uint32_t fourth) {
#if defined(__CUDA_ARCH__)
    return __byte_perm(__byte_perm(first, second, 0x0040), __byte_perm(third, fourth, 0x0040), 0x5410);
#else
    return (first & 0xFFu) | (second & 0xFFu) << 8 | (third & 0xFFu) << 16 | fourth << 24;
#endif
  }

  // Rounds to nearest even, where fp32 has a step of one; the code is then the lower byte. With an inverse of zero
  // infinities and NaNs have any bits, and become 0.
  FSGD_INLINE static int8_t encode(float x, float inverse) {
    return static_cast<int8_t>(static_cast<uint8_t>(inverse == 0.0f ? 0u : shifted(x, inverse)));
  }
  FSGD_INLINE static uint32_t shifted(float x, float inverse) {
    return bit_cast<uint32_t>(multiply(x, inverse) + 12582912.0f);
  }
};

// The block in use. Smaller ones are more exact and cost more bytes: benchmarks/int8_error.py.
inline constexpr int kInt8Block = 64;
using Int8 = Int8Momentum<kInt8Block>;

}  // namespace fused_sgd
