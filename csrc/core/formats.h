// Storage formats: how one logical tensor lies in memory. The rule never sees them, the walks never look inside.
//
// A format is a small class made from its column pointers, with
//   Acc                     the accumulation type its elements are computed in
//   kColumns                how many pointers of a table row it takes
//   kBytes                  bytes an element, over the columns of which every element has its part
//   kBlock                  how many consecutive elements are stored together: 1, or the size of a scale block
//   load(i) -> Acc          element i
//   store(i, x) -> Acc      element i, rounded once, when kBlock == 1; what a load would now give
//   until_aligned()         how many elements lie before the first 16-byte boundary
//   aligned(i)              whether element i lies on one
//   Packed<n>               n elements as they are stored
//   load_pack<n>(i, wide)   elements i to i + n - 1 as Packed<n>; wide: in as few accesses as can be, element i being
//                           aligned
//   unpack(packed, x[n])    their values
//   store_pack(i, wide, x)  n elements, rounded; x becomes what a load would now give
//   prefetch<n>(i)          calls what loads of elements i to i + n - 1 read most of into a CPU's cache; there need not
//                           be so many elements
// and, when kBlock > 1, instead of store(i, x) and that store_pack
//   open(block) -> Common   what a block's elements have in common; `block` counts from logical element 0
//   load(i, common) -> Acc  element i of that block
//   Reduction               4 bytes: what a block's store needs to know of all its elements (a largest magnitude, say)
//   reduce(Reduction&, x)   folds one new value in
//   merge(Reduction&, r)    folds another reduction in; in any order
//   store(i, x, reduction)  element i, once its whole block was reduced
//   store_pack(i, wide, x, reduction)  n elements of one block, and if they are its first what is stored once a block
//   finish(block, reduction)  what is stored once a block (its scale)
//   load_block(block, x[kBlock]), store_block(block, x[kBlock])   all of that, for a CPU; and, for loops over two
//                           neighbours in one word, the same with (block, even[kBlock / 2], odd[kBlock / 2])
// Tensors in such a format are whole blocks. Only a momentum buffer may have one.
//
// A format whose numbers have 16 bits may have load_pair(i, x[2]) and store_pair(i, x[2]): elements i and i + 1, x as
// for packs. A parameter's format may also have
//   kBatch                  store_pack of so many elements is much cheaper than single ones. Packs of such a format
//                           begin at multiples of their size, counted from logical element 0
//   kConvertsMany           whether packs are better brought into an array of numbers before a CPU computes on them
//   Draw, draw(i, n, draws), store(i, x, draw)  random bits, which are drawn for n elements from i on, multiples of
//                           kBatch, within 512 elements from a multiple of 512, with much less work than one by one:
//                           draws[k] is what store(i + k, x) would draw. Its store_pair is store_pair(i, x[2], draws),
//                           both draws in one word, and its store_pack is store_pack(i, wide, x, draws)
//   Record* record          what they depend on, which count_step() changes; it may be made to point to a copy
//   random()                where they come from, read now: random().draws<n>(i) is what store_pack needs
//   count_step(columns)     changes what all of the tensor's elements depend on, after a step that was not skipped
//
// For a CPU any format may have
//   numbers(i)              where elements from i on stand as fp32 or bf16, one after the other; or else
//   are_below<n>(limit, i)  whether the magnitudes of n elements, of whole blocks, are below a limit, all of them: a
//                           power of two, 2 or more, or infinity, which asks whether they are finite
//   LoadsFinite             loads elements that are known to be finite faster
//   StoresFinite            stores numbers that are known to be finite faster
//
// A new format is a class and its lines in combinations.h.
#pragma once

#if defined(__F16C__) && !defined(__CUDACC__)
#include <immintrin.h>
#endif

#include <type_traits>

#include "column.h"

namespace fused_sgd {

// bf16 is the upper half of an fp32. Rounds to nearest even; every NaN becomes 0x7FC0.
FSGD_INLINE float bfloat16_to_float(uint16_t bits) { return bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

FSGD_INLINE uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>(value != value ? 0x7FC0u : rounded);
}

// fp16 by integer arithmetic and selects alone, so that loops over it vectorise on every instruction set. Subnormals
// are exact in both directions and never pass through an fp32 subnormal, which flush-to-zero would destroy.
FSGD_INLINE float float16_to_float(uint16_t half) {
  const uint32_t magnitude = half & 0x7FFFu;
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t shifted = magnitude << 13;
  const uint32_t normal = shifted + (112u << 23);      // exponent bias 15 -> 127
  const uint32_t non_finite = shifted + (224u << 23);  // exponent 31 -> 255
  // A subnormal is magnitude * 2^-24: put it below the leading one of 2^-14, then take 2^-14 away; the rest is exact.
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(shifted + (113u << 23)) - 6.103515625e-05f);
  const uint32_t finite = magnitude < 0x0400u ? subnormal : normal;
  return bit_cast<float>((magnitude >= 0x7C00u ? non_finite : finite) | sign);
}

// Rounds to nearest even; overflow becomes infinity; every NaN becomes 0x7E00.
FSGD_INLINE uint16_t float_to_float16(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t normal = (magnitude - (112u << 23) + 0x0FFFu + ((magnitude >> 13) & 1u)) >> 13;
  // Below 2^-14 the step is 2^-24, which is the fp32 step at 0.5: adding 0.5 makes the hardware round there.
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3F000000u;
  uint32_t half = magnitude < (113u << 23) ? subnormal : normal;
  half = (magnitude >= (143u << 23) ? 0x7C00u : half) | sign;  // 2^16 and above
  return static_cast<uint16_t>(value != value ? 0x7E00u : half);
}

// Many conversions at once, where a processor has an instruction for it that compilers do not find.
#if defined(__F16C__) && !defined(__CUDACC__)
inline constexpr bool kHasFloat16Instructions = true;
FSGD_INLINE void convert_eight(const uint16_t* half, float* x) {
  _mm256_storeu_ps(x, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(half))));
}
FSGD_INLINE void convert_eight(const float* x, uint16_t* half) {
  const __m256 values = _mm256_loadu_ps(x);
  const __m128i converted = _mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(values, values, _CMP_UNORD_Q));
  const __m128i nans = _mm_packs_epi32(_mm256_castsi256_si128(nan), _mm256_extracti128_si256(nan, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(half), _mm_blendv_epi8(converted, _mm_set1_epi16(0x7E00), nans));
}
#else
inline constexpr bool kHasFloat16Instructions = false;
inline void convert_eight(const uint16_t*, float*) {}
inline void convert_eight(const float*, uint16_t*) {}
#endif

// (A comparison of the functions themselves is no constant under sanitizers.)
template <auto kFunction, auto kOther>
inline constexpr bool kSame = std::is_same_v<std::integral_constant<decltype(kFunction), kFunction>,
                                             std::integral_constant<decltype(kOther), kOther>>;
template <auto kConversion>
inline constexpr bool kConvertsEight =
    kHasFloat16Instructions && (kSame<kConversion, float16_to_float> || kSame<kConversion, float_to_float16>);
// How many elements are best stored together for the sake of such an instruction.
template <auto kConversion>
inline constexpr int kBatchFor = kConvertsEight<kConversion> ? 16 : 1;

template <auto kDecode, class Element, class Acc, int n>
FSGD_INLINE void decode(const Element (&stored)[n], Acc (&x)[n]) {
  if constexpr (kConvertsEight<kDecode> && n % 8 == 0) {
    for (int k = 0; k < n; k += 8) convert_eight(stored + k, x + k);
#if defined(__CUDA_ARCH__)
  } else if constexpr (sizeof(Element) == 2 && n % 2 == 0) {
    FSGD_UNROLL
    for (int k = 0; k < n; k += 2) {
      const uint32_t word = get_word(stored + k);
      x[k] = kDecode(static_cast<Element>(word));
      x[k + 1] = kDecode(static_cast<Element>(word >> 16));
    }
#endif
  } else {
    FSGD_UNROLL
    for (int k = 0; k < n; ++k) x[k] = kDecode(stored[k]);
  }
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
// GPUs round two at once, and make 0x7FFF of every NaN and of nothing else. Nothing is carried from the lower half.
FSGD_INLINE uint32_t mask_of_nans(uint32_t halves) {
  uint32_t mask;  // of each half, its highest bit in all of them
  asm("prmt.b32 %0, %1, 0, 0xBB99;" : "=r"(mask) : "r"((halves & 0x7FFF7FFFu) + 0x00010001u));
  return mask;
}
template <auto kEncode>
FSGD_INLINE void encode_two(float first, float second, uint16_t* stored) {
  uint32_t halves;
  if constexpr (kSame<kEncode, float_to_bfloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(halves) : "f"(second), "f"(first));
    halves &= ~(mask_of_nans(halves) & 0x003F003Fu);  // 0x7FC0
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(halves) : "f"(second), "f"(first));
    halves &= ~(mask_of_nans(halves) & 0x01FF01FFu);  // 0x7E00
  }
  set_word(stored, halves);
}
template <auto kEncode>
inline constexpr bool kEncodesTwo = kSame<kEncode, float_to_bfloat16> || kSame<kEncode, float_to_float16>;
#else
template <auto kEncode, class Acc, class Element>
FSGD_INLINE void encode_two(Acc, Acc, Element*) {}
template <auto kEncode>
inline constexpr bool kEncodesTwo = false;
#endif

template <auto kEncode, class Element, class Acc, int n>
FSGD_INLINE void encode(const Acc (&x)[n], Element (&stored)[n]) {
  if constexpr (kConvertsEight<kEncode> && n % 8 == 0) {
    for (int k = 0; k < n; k += 8) convert_eight(x + k, stored + k);
  } else if constexpr (kEncodesTwo<kEncode> && n % 2 == 0) {
    FSGD_UNROLL
    for (int k = 0; k < n; k += 2) encode_two<kEncode>(x[k], x[k + 1], stored + k);
  } else {
    FSGD_UNROLL
    for (int k = 0; k < n; ++k) stored[k] = kEncode(x[k]);
  }
}

// A format whose element is one number in one column.
template <class Element, class AccType, AccType (*kDecode)(Element), Element (*kEncode)(AccType)>
struct Plain {
  using Acc = AccType;
  static constexpr int kColumns = 1;
  static constexpr int kBytes = sizeof(Element);
  static constexpr int kBlock = 1;
  static constexpr int kBatch = kBatchFor<kDecode>;
  static constexpr bool kConvertsMany = kBatch > 1;

  Column<Element> column;

  FSGD_INLINE explicit Plain(void* const* columns) : column(columns[0]) {}
  FSGD_INLINE Acc load(int64_t i) const { return kDecode(column.data[i]); }
  FSGD_INLINE Acc store(int64_t i, Acc x) const {
    const Element stored = kEncode(x);
    column.data[i] = stored;
    return kDecode(stored);
  }

  template <int n>
  FSGD_INLINE void prefetch(int64_t i) const {
    column.template prefetch<n>(i);
  }
  FSGD_INLINE uint32_t until_aligned() const { return column.until_aligned(); }
  FSGD_INLINE bool aligned(int64_t i) const { return column.aligned(i); }
  template <int n>
  using Packed = typename Column<Element>::template Packed<n>;
  template <int n>
  FSGD_INLINE Packed<n> load_pack(int64_t i, bool wide) const {
    return column.template load_pack<n>(i, wide);
  }
  template <int n>
  FSGD_INLINE static void unpack(const Packed<n>& pack, Acc (&x)[n]) {
    decode<kDecode>(pack.element, x);
  }
  template <int n>
  FSGD_INLINE void store_pack(int64_t i, bool wide, Acc (&x)[n]) const {
    Packed<n> pack;
    encode<kEncode>(x, pack.element);
    decode<kDecode>(pack.element, x);
    column.store_pack(i, wide, pack);
  }
};

// How many elements a format stores together, or wants to.
template <class F>
constexpr int batch_of() {
  if constexpr (requires { F::kBatch; }) return F::kBatch;
  return F::kBlock;
}
template <class F>
inline constexpr int kBatchOf = batch_of<F>();

// Whether what is stored depends on random bits, which are drawn together.
template <class F>
inline constexpr bool kDraws = requires { typename F::Draw; };

template <class T>
FSGD_INLINE T identity(T x) {
  return x;
}

using Float64 = Plain<double, double, identity<double>, identity<double>>;

// Whether the magnitudes of n numbers from each x on, all of fp32 or all of bf16, are below a limit, all of them: a
// power of two, 2 or more, or infinity. As bits magnitudes are ordered as numbers are, with NaNs above infinity.
template <int n, class Element, class... Others>
  requires(std::is_same_v<Element, Others> && ...)
FSGD_INLINE bool are_below(float limit, const Element* x, const Others*... others) {
  constexpr int kBits = 8 * sizeof(Element);
  using Bits = std::conditional_t<kBits == 16, uint16_t, uint32_t>;
  const auto magnitude = [](Element number) __attribute__((always_inline)) {
    return static_cast<Bits>(bit_cast<Bits>(number) & static_cast<Bits>(~(Bits{1} << (kBits - 1))));
  };
  Bits largest = 0;
  for (int k = 0; k < n; ++k) {
    Bits some = magnitude(x[k]);
    ((some = magnitude(others[k]) > some ? magnitude(others[k]) : some), ...);
    largest = some > largest ? some : largest;
  }
  return largest < bit_cast<uint32_t>(limit) >> (32 - kBits);
}

struct Float32 : Plain<float, float, identity<float>, identity<float>> {
  using Plain::Plain;
  FSGD_INLINE const float* numbers(int64_t i) const { return column.data + i; }
};

// Two neighbours in one word are decoded and rounded where they stand: a CPU's loop over words needs none of the
// instructions that widen and pack 16-bit numbers.
struct BFloat16 : Plain<uint16_t, float, bfloat16_to_float, float_to_bfloat16> {
  using Plain::Plain;
  FSGD_INLINE void load_pair(int64_t i, float (&x)[2]) const { decode_pair(column.word(i), x); }
  FSGD_INLINE void store_pair(int64_t i, float (&x)[2]) const {
    const uint32_t word = rounded(x[0]) >> 16 | (rounded(x[1]) & 0xFFFF0000u);
    column.word(i) = word;
    decode_pair(word, x);
  }

  FSGD_INLINE const uint16_t* numbers(int64_t i) const { return column.data + i; }
  struct StoresFinite {
    const BFloat16& format;
    FSGD_INLINE float store(int64_t i, float x) const { return format.store(i, x); }
    FSGD_INLINE void store_pair(int64_t i, float (&x)[2]) const {
      const uint32_t word = nearest(x[0]) >> 16 | (nearest(x[1]) & 0xFFFF0000u);
      format.column.word(i) = word;
      decode_pair(word, x);
    }
  };

 private:
  FSGD_INLINE static void decode_pair(uint32_t word, float (&x)[2]) {
    x[0] = bit_cast<float>(word << 16);
    x[1] = bit_cast<float>(word & 0xFFFF0000u);
  }
  // float_to_bfloat16() in the upper half.
  FSGD_INLINE static uint32_t rounded(float x) { return x != x ? 0x7FC00000u : nearest(x); }
  FSGD_INLINE static uint32_t nearest(float x) {  // of a number
    const uint32_t bits = bit_cast<uint32_t>(x);
    return bits + 0x7FFFu + (bits >> 16 & 1u);
  }
};
using Float16 = Plain<uint16_t, float, float16_to_float, float_to_float16>;

}  // namespace fused_sgd
