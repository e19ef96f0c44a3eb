// Arithmetic with exactly one rounding per call, on the host and on the device.
//
// The update rule promises the same bits everywhere. A compiler may fuse `a * b + c` into one rounding or
// keep it as two, so the rule never writes such an expression: it calls these functions, and every target is
// compiled with contraction off (-ffp-contract=off for the host; the __*_rn intrinsics are never contracted).
#pragma once

#include <cmath>
#include <cstdint>

// Always inlined. The CPU walk is compiled once per instruction set, and an out-of-line copy of a shared inline
// function would be merged by the linker: the portable walk could then run AVX-512 code on a machine without it.
#if defined(__CUDACC__)
#define FSGD_INLINE __host__ __device__ __forceinline__
#else
#define FSGD_INLINE inline __attribute__((always_inline))
#endif

// Loops over packs have few turns, and arrays that they index must stay in registers.
#if defined(__CUDA_ARCH__)
#define FSGD_UNROLL _Pragma("unroll")
#else
#define FSGD_UNROLL
#endif

namespace fused_sgd {

#if defined(__CUDA_ARCH__)
FSGD_INLINE float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
FSGD_INLINE double fma(double a, double b, double c) { return __fma_rn(a, b, c); }
FSGD_INLINE float multiply(float a, float b) { return __fmul_rn(a, b); }
FSGD_INLINE double multiply(double a, double b) { return __dmul_rn(a, b); }
FSGD_INLINE float divide(float a, float b) { return __fdiv_rn(a, b); }
FSGD_INLINE double divide(double a, double b) { return __ddiv_rn(a, b); }
FSGD_INLINE float subtract(float a, float b) { return __fsub_rn(a, b); }
FSGD_INLINE double subtract(double a, double b) { return __dsub_rn(a, b); }
FSGD_INLINE double square_root(double a) { return __dsqrt_rn(a); }
#else
FSGD_INLINE float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
FSGD_INLINE double fma(double a, double b, double c) { return __builtin_fma(a, b, c); }
FSGD_INLINE float multiply(float a, float b) { return a * b; }
FSGD_INLINE double multiply(double a, double b) { return a * b; }
FSGD_INLINE float divide(float a, float b) { return a / b; }
FSGD_INLINE double divide(double a, double b) { return a / b; }
FSGD_INLINE float subtract(float a, float b) { return a - b; }
FSGD_INLINE double subtract(double a, double b) { return a - b; }
FSGD_INLINE double square_root(double a) { return __builtin_sqrt(a); }
#endif

template <class To, class From>
FSGD_INLINE To bit_cast(From from) {
  return __builtin_bit_cast(To, from);
}

}  // namespace fused_sgd
