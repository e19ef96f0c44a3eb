// Random bits from a counter: Philox4x32-7 of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2,
// 3" (SC 2011, https://doi.org/10.1145/2063384.2063405). Whoever knows counter and key has the bits: no state, no
// order.
//
// Seven rounds are the fewest that the paper found to pass BigCrush. Ten, its advice where the use is not known, are a
// reserve for which rounding has no need.
#pragma once

#include "arithmetic.h"

// Compilers find no good vector code for products of 32 x 32 bits, so the one instruction for it is named here.
#if defined(__x86_64__) && !defined(__CUDACC__)
#define FSGD_PHILOX_LANES
#include <immintrin.h>
#endif

namespace fused_sgd {

struct PhiloxKey {
  uint32_t word[2];
};
struct PhiloxWords {
  uint32_t word[4];
};

struct PhiloxConstants {
  static constexpr uint32_t kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u;
  static constexpr uint32_t kWeyl0 = 0x9E3779B9u;  // of the golden ratio
  static constexpr uint32_t kWeyl1 = 0xBB67AE85u;  // of the square root of 3
  static constexpr int kRounds = 7;
};

FSGD_INLINE uint64_t multiply_words(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  uint64_t product;  // of 64-bit numbers compilers would add up parts that are zero
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
#else
  return uint64_t{a} * b;
#endif
}

FSGD_INLINE PhiloxWords philox(PhiloxWords counter, PhiloxKey key) {
  using C = PhiloxConstants;
  uint32_t c0 = counter.word[0], c1 = counter.word[1], c2 = counter.word[2], c3 = counter.word[3];
  uint32_t k0 = key.word[0], k1 = key.word[1];
  FSGD_UNROLL
  for (int round = 0; round < C::kRounds; ++round) {
    const uint64_t product0 = multiply_words(C::kMultiplier0, c0), product1 = multiply_words(C::kMultiplier1, c2);
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(product1);
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(product0);
    k0 += C::kWeyl0;
    k1 += C::kWeyl1;
  }
  return {{c0, c1, c2, c3}};
}

// The counter of so many calls later.
FSGD_INLINE PhiloxWords ahead(PhiloxWords counter, int calls) {
  counter.word[0] += static_cast<uint32_t>(calls);
  return counter;
}

#if defined(FSGD_PHILOX_LANES)
// Several calls side by side, a 64-bit lane each. A word is the lower half of its lane, and what is left in the upper
// half does no harm: products do not read it.
namespace lanes {

// multiply_halves: of each lane's lower halves. select: of each 16 bytes two words of a and two of b, that kWords tells
// as _mm_shuffle_ps() does.
#if defined(__AVX512F__)
using Register = __m512i;
FSGD_INLINE Register multiply_halves(Register a, Register b) {
  return _mm512_maskz_mul_epu32(0xFF, a, b);  // the one without a mask warns of what GCC's own header does
}
template <int kWords>
FSGD_INLINE __m512 select(__m512 a, __m512 b) {
  return _mm512_maskz_shuffle_ps(0xFFFF, a, b, kWords);
}
#elif defined(__AVX2__)
using Register = __m256i;
FSGD_INLINE Register multiply_halves(Register a, Register b) { return _mm256_mul_epu32(a, b); }
template <int kWords>
FSGD_INLINE __m256 select(__m256 a, __m256 b) {
  return _mm256_shuffle_ps(a, b, kWords);
}
#else
using Register = __m128i;
FSGD_INLINE Register multiply_halves(Register a, Register b) { return _mm_mul_epu32(a, b); }
template <int kWords>
FSGD_INLINE __m128 select(__m128 a, __m128 b) {
  return _mm_shuffle_ps(a, b, kWords);
}
#endif

inline constexpr int kCount = sizeof(Register) / 8;
typedef uint64_t Lanes __attribute__((vector_size(sizeof(Register)), may_alias));
typedef float Words __attribute__((vector_size(sizeof(Register)), may_alias));

FSGD_INLINE Lanes multiply(Lanes a, uint32_t b) {
  return (Lanes)multiply_halves((Register)a, (Register)(Lanes{} + b));  // reinterpreting
}

// kChains * kCount calls. Each round of a chain waits for its products, so there are several, side by side. Counters
// that differ in their first word alone have a product of each of the first two rounds in common.
template <int kChains>
FSGD_INLINE void philox(PhiloxWords counter, PhiloxKey key, char* words) {
  using C = PhiloxConstants;
  // In the end even lanes' words become one register and odd lanes' another: even ones take the first half of the
  // calls.
  Lanes call;
  for (int lane = 0; lane < kCount; ++lane) call[lane] = static_cast<uint64_t>(lane / 2 + lane % 2 * (kCount / 2));
  Lanes c0[kChains], c1[kChains], c2[kChains], c3[kChains];
  uint32_t k0 = key.word[0], k1 = key.word[1];
  const auto next_key = [&]() __attribute__((always_inline)) {
    k0 += C::kWeyl0;
    k1 += C::kWeyl1;
  };

  const uint64_t second = uint64_t{C::kMultiplier1} * counter.word[2];
  const uint32_t first_of_all = static_cast<uint32_t>(second >> 32) ^ counter.word[1] ^ k0;
#pragma GCC unroll 4
  for (int chain = 0; chain < kChains; ++chain) {
    c0[chain] = call + (counter.word[0] + static_cast<uint32_t>(chain * kCount));
    c3[chain] = multiply(c0[chain], C::kMultiplier0);
    c2[chain] = (c3[chain] >> 32) ^ (counter.word[3] ^ k1);
  }
  next_key();
  const uint64_t first = uint64_t{C::kMultiplier0} * first_of_all;
#pragma GCC unroll 4
  for (int chain = 0; chain < kChains; ++chain) {
    c1[chain] = multiply(c2[chain], C::kMultiplier1);
    c0[chain] = (c1[chain] >> 32) ^ (static_cast<uint32_t>(second) ^ k0);
    c2[chain] = c3[chain] ^ (static_cast<uint32_t>(first >> 32) ^ k1);
    c3[chain] = Lanes{} + static_cast<uint32_t>(first);
  }
#pragma GCC unroll 10
  for (int round = 2; round < C::kRounds; ++round) {
    next_key();
#pragma GCC unroll 4
    for (int chain = 0; chain < kChains; ++chain) {
      const Lanes product0 = multiply(c0[chain], C::kMultiplier0), product1 = multiply(c2[chain], C::kMultiplier1);
      c0[chain] = (product1 >> 32) ^ (c1[chain] ^ k0);
      c1[chain] = product1;
      c2[chain] = (product0 >> 32) ^ (c3[chain] ^ k1);
      c3[chain] = product0;
    }
  }
#pragma GCC unroll 4
  for (int chain = 0; chain < kChains; ++chain) {
    const auto low = select<0b10'00'10'00>((Words)c0[chain], (Words)c1[chain]);
    const auto high = select<0b10'00'10'00>((Words)c2[chain], (Words)c3[chain]);
    const auto even = select<0b10'00'10'00>(low, high), odd = select<0b11'01'11'01>(low, high);
    __builtin_memcpy(words + 2 * chain * sizeof(Register), &even, sizeof(even));
    __builtin_memcpy(words + (2 * chain + 1) * sizeof(Register), &odd, sizeof(odd));
  }
}

// As many calls as this can do of n; returns how many those are.
FSGD_INLINE int philox(PhiloxWords counter, PhiloxKey key, char* words, int n) {
  constexpr int kChains = 4;
  int call = 0;
  for (; call + kChains * kCount <= n; call += kChains * kCount) {
    philox<kChains>(ahead(counter, call), key, words + call * sizeof(PhiloxWords));
  }
  for (; call + kCount <= n; call += kCount) philox<1>(ahead(counter, call), key, words + call * sizeof(PhiloxWords));
  return call;
}

}  // namespace lanes
#endif

// n calls, whose counters follow each other; their first words must not wrap around between them. On a CPU it is not
// inlined, being long, and static, so that no instruction set's copy is linked in place of another's.
#if defined(__CUDACC__)
FSGD_INLINE
#else
[[maybe_unused]] __attribute__((noinline)) static
#endif
void philox(PhiloxWords counter, PhiloxKey key, void* words, int n) {
  const auto bytes = static_cast<char*>(words);
  int call = 0;
#if defined(FSGD_PHILOX_LANES)
  call = lanes::philox(counter, key, bytes, n);
#endif
  FSGD_UNROLL
  for (; call < n; ++call) {
    const PhiloxWords found = philox(ahead(counter, call), key);
    __builtin_memcpy(bytes + call * sizeof(found), &found, sizeof(found));
  }
}

}  // namespace fused_sgd
