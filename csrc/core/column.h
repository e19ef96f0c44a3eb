// One column of a storage format: consecutive numbers in memory, accessed one by one or in packs.
#pragma once

#include "arithmetic.h"

namespace fused_sgd {

template <class Element>
struct Column {
  Element* data;

  FSGD_INLINE explicit Column(void* column) : data(static_cast<Element*>(column)) {}

  FSGD_INLINE uint32_t until_aligned() const {  // elements before the first 16-byte boundary
    return static_cast<uint32_t>(-reinterpret_cast<uintptr_t>(data) % 16 / sizeof(Element));
  }
  FSGD_INLINE bool aligned(int64_t i) const { return reinterpret_cast<uintptr_t>(data + i) % 16 == 0; }

  // n, a power of two, elements. Beside wider columns a pack may have less than 16 bytes: one access of so many.
  template <int n>
  struct alignas(n * sizeof(Element) < 16 ? n * sizeof(Element) : 16) Packed {
    Element element[n];
  };
  template <int n>
  FSGD_INLINE Packed<n> load_pack(int64_t i, bool wide) const {
    if (wide) return *reinterpret_cast<const Packed<n>*>(data + i);
    Packed<n> pack;
    FSGD_UNROLL
    for (int k = 0; k < n; ++k) pack.element[k] = data[i + k];
    return pack;
  }
  template <int n>
  FSGD_INLINE void store_pack(int64_t i, bool wide, const Packed<n>& pack) const {
    if (wide) {
      *reinterpret_cast<Packed<n>*>(data + i) = pack;
    } else {
      FSGD_UNROLL
      for (int k = 0; k < n; ++k) data[i + k] = pack.element[k];
    }
  }
};

}  // namespace fused_sgd
