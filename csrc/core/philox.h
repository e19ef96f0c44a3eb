// Random bits from a counter: Philox4x32-10 of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1,
// 2, 3" (SC 2011, https://doi.org/10.1145/2063384.2063405). Whoever knows counter and key has the bits: no state, no
// order.
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
  static constexpr int kRounds = 10;
};

FSGD_INLINE PhiloxWords philox(PhiloxWords counter, PhiloxKey key) {
  using C = PhiloxConstants;
  uint32_t c0 = counter.word[0], c1 = counter.word[1], c2 = counter.word[2], c3 = counter.word[3];
  uint32_t k0 = key.word[0], k1 = key.word[1];
  FSGD_UNROLL
  for (int round = 0; round < C::kRounds; ++round) {
    const uint64_t product0 = uint64_t{C::kMultiplier0} * c0, product1 = uint64_t{C::kMultiplier1} * c2;
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

#if defined(__AVX512F__)
using Register = __m512i;
FSGD_INLINE Register multiply_halves(Register a, Register b) {
  return _mm512_maskz_mul_epu32(0xFF, a, b);  // the one without a mask warns of what GCC's own header does
}
#elif defined(__AVX2__)
using Register = __m256i;
FSGD_INLINE Register multiply_halves(Register a, Register b) { return _mm256_mul_epu32(a, b); }
#else
using Register = __m128i;
FSGD_INLINE Register multiply_halves(Register a, Register b) { return _mm_mul_epu32(a, b); }
#endif

inline constexpr int kCount = sizeof(Register) / 8;
typedef uint64_t Lanes __attribute__((vector_size(sizeof(Register)), may_alias));

FSGD_INLINE Lanes multiply(Lanes a, uint32_t b) {
  return (Lanes)multiply_halves((Register)a, (Register)(Lanes{} + b));  // reinterpreting
}

// kChains * kCount calls. Each round of a chain waits for its products, so there are several, side by side.
template <int kChains>
FSGD_INLINE void philox(PhiloxWords counter, PhiloxKey key, PhiloxWords* words) {
  using C = PhiloxConstants;
  Lanes c0[kChains], c1[kChains], c2[kChains], c3[kChains];
  for (int chain = 0; chain < kChains; ++chain) {
    c0[chain] = Lanes{} + (counter.word[0] + static_cast<uint32_t>(chain * kCount));
    for (int lane = 0; lane < kCount; ++lane) c0[chain][lane] += static_cast<uint32_t>(lane);
    c1[chain] = Lanes{} + counter.word[1];
    c2[chain] = Lanes{} + counter.word[2];
    c3[chain] = Lanes{} + counter.word[3];
  }
  uint32_t k0 = key.word[0], k1 = key.word[1];
#pragma GCC unroll 10
  for (int round = 0; round < C::kRounds; ++round) {
#pragma GCC unroll 4
    for (int chain = 0; chain < kChains; ++chain) {
      const Lanes product0 = multiply(c0[chain], C::kMultiplier0), product1 = multiply(c2[chain], C::kMultiplier1);
      c0[chain] = (product1 >> 32) ^ c1[chain] ^ k0;
      c1[chain] = product1;
      c2[chain] = (product0 >> 32) ^ c3[chain] ^ k1;
      c3[chain] = product0;
    }
    k0 += C::kWeyl0;
    k1 += C::kWeyl1;
  }
#pragma GCC unroll 4
  for (int chain = 0; chain < kChains; ++chain) {
    const Lanes low = (c0[chain] & 0xFFFFFFFFu) | c1[chain] << 32, high = (c2[chain] & 0xFFFFFFFFu) | c3[chain] << 32;
    for (int lane = 0; lane < kCount; ++lane) {
      const uint64_t call[2] = {low[lane], high[lane]};
      __builtin_memcpy(words + chain * kCount + lane, call, sizeof(call));
    }
  }
}

// As many calls as this can do of n; returns how many those are.
FSGD_INLINE int philox(PhiloxWords counter, PhiloxKey key, PhiloxWords* words, int n) {
  constexpr int kChains = kCount == 8 ? 2 : 4;  // 16 calls, as a batch of bf16 takes, or 8
  int call = 0;
  for (; call + kChains * kCount <= n; call += kChains * kCount) {
    philox<kChains>(ahead(counter, call), key, words + call);
  }
  for (; call + kCount <= n; call += kCount) philox<1>(ahead(counter, call), key, words + call);
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
void philox(PhiloxWords counter, PhiloxKey key, PhiloxWords* words, int n) {
  int call = 0;
#if defined(FSGD_PHILOX_LANES)
  call = lanes::philox(counter, key, words, n);
#endif
  FSGD_UNROLL
  for (; call < n; ++call) words[call] = philox(ahead(counter, call), key);
}

}  // namespace fused_sgd
