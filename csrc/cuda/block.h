// What the threads of a block share, and what formats have only some of.
#pragma once

#include "../core/table.h"

namespace fused_sgd::cuda {

// kCount neighbouring threads, which share a block of elements. On a GPU each of them does its own part, and they meet
// in shuffles; on the host the first one does the parts of all.
template <int kCount>
class Neighbours {
  static_assert(kCount <= 32 && (kCount & (kCount - 1)) == 0);

 public:
#if defined(__CUDA_ARCH__)
  static constexpr int kParts = 1;  // that one thread does
  FSGD_INLINE static bool takes_part(uint32_t) { return true; }
  template <class M, bool kWholeWarp>
  FSGD_INLINE static void merge(typename M::Reduction (&reduction)[kParts]) {
    static_assert(sizeof(typename M::Reduction) == 4);
    const uint32_t mask =
        kWholeWarp ? ~0u : ((kCount == 32 ? 0u : 1u << kCount) - 1u) << (threadIdx.x % 32 / kCount * kCount);
    FSGD_UNROLL
    for (int distance = 1; distance < kCount; distance *= 2) {
      const auto other = __shfl_xor_sync(mask, bit_cast<uint32_t>(reduction[0]), distance);
      M::merge(reduction[0], bit_cast<typename M::Reduction>(other));
    }
  }
#else
  static constexpr int kParts = kCount;
  FSGD_INLINE static bool takes_part(uint32_t thread) { return thread % kCount == 0; }
  template <class M, bool kWholeWarp>
  FSGD_INLINE static void merge(typename M::Reduction (&reduction)[kParts]) {
    for (int part = 1; part < kParts; ++part) M::merge(reduction[0], reduction[part]);
    for (int part = 1; part < kParts; ++part) reduction[part] = reduction[0];
  }
#endif
};

// For formats that have no record, no random bits or no reduction.
struct None {};

// What a stochastic format's random bits depend on.
template <class P>
struct RecordOf {
  using Type = None;
};
template <class P>
  requires requires { typename P::Record; }
struct RecordOf<P> {
  using Type = typename P::Record;
};

// What its random bits come from, read now.
template <class P>
FSGD_INLINE auto random_of(const P& param) {
  if constexpr (kDraws<P>) {
    return param.random();
  } else {
    return None();
  }
}

template <class M>
struct ReductionOf {
  using Type = None;
};
template <class M>
  requires(M::kBlock > 1)
struct ReductionOf<M> {
  using Type = typename M::Reduction;
};

// A variable of a GPU's shared memory, which runs no constructor.
template <class T>
class SharedMemory {
 public:
  FSGD_INLINE void set(const T& value) { *reinterpret_cast<T*>(bytes_) = value; }  // nvcc copies bytes one by one
  FSGD_INLINE const T& get() const { return *reinterpret_cast<const T*>(bytes_); }

 private:
  alignas(16) unsigned char bytes_[sizeof(T)];
};

}  // namespace fused_sgd::cuda
