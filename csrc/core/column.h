// One column of a storage format: consecutive numbers in memory, accessed one by one or in packs.
#pragma once

#include <bit>

#include "arithmetic.h"

namespace fused_sgd {

template <class Element>
struct Column {
  Element* data;

  FSGD_INLINE explicit Column(void* column) : data(static_cast<Element*>(column)) {}

  // Two elements of 16 bits, the first one in the lower half.
  static_assert(std::endian::native == std::endian::little);
  typedef uint32_t Word __attribute__((aligned(2), may_alias));
  FSGD_INLINE Word& word(int64_t i) const {
    static_assert(sizeof(Element) == 2);
    return *reinterpret_cast<Word*>(data + i);
  }

  // Calls the memory of n elements into a CPU's cache. There need not be so many.
  template <int n>
  FSGD_INLINE void prefetch(int64_t i) const {
#if !defined(__CUDA_ARCH__)
    constexpr int kInLine = 64 / sizeof(Element);
    for (int k = 0; k < n; k += kInLine) __builtin_prefetch(data + i + k);
#endif
  }

  FSGD_INLINE uint32_t until_aligned() const {  // elements before the first 16-byte boundary
    return static_cast<uint32_t>(-reinterpret_cast<uintptr_t>(data) % 16 / sizeof(Element));
  }
  FSGD_INLINE bool aligned(int64_t i) const { return reinterpret_cast<uintptr_t>(data + i) % 16 == 0; }

  // n, a power of two, elements. Beside wider columns a pack may have less than 16 bytes: one access of so many.
  template <int n>
  struct alignas(n * sizeof(Element) < 16 ? n * sizeof(Element) : 16) Packed {
    Element element[n];
  };
  // wide: in one access, or as few as can be, since element i is aligned. The host only checks that it is.
  template <int n>
  FSGD_INLINE Packed<n> load_pack(int64_t i, bool wide) const {
    Packed<n> pack;
#if defined(__CUDA_ARCH__)
    if (wide) return *reinterpret_cast<const Packed<n>*>(data + i);
    FSGD_UNROLL
    for (int k = 0; k < n; ++k) pack.element[k] = data[i + k];
#else
    check_alignment<n>(i, wide);
    __builtin_memcpy(&pack, data + i, sizeof(pack));
#endif
    return pack;
  }
  template <int n>
  FSGD_INLINE void store_pack(int64_t i, bool wide, const Packed<n>& pack) const {
#if defined(__CUDA_ARCH__)
    if (wide) {
      *reinterpret_cast<Packed<n>*>(data + i) = pack;
    } else {
      FSGD_UNROLL
      for (int k = 0; k < n; ++k) data[i + k] = pack.element[k];
    }
#else
    check_alignment<n>(i, wide);
    __builtin_memcpy(data + i, &pack, sizeof(pack));
#endif
  }

 private:
  template <int n>
  FSGD_INLINE void check_alignment(int64_t i, bool wide) const {
    if (wide && reinterpret_cast<uintptr_t>(data + i) % alignof(Packed<n>) != 0) __builtin_trap();
  }
};

}  // namespace fused_sgd
