// One column of a storage format: consecutive numbers in memory, accessed one by one or in packs.
#pragma once

#include <bit>

#include "arithmetic.h"

namespace fused_sgd {

// What a pack is made of in a GPU's registers: its elements of 8 or 16 bits by words of four or two, the first one
// lowest. Taken out one by one they would have a register each, from the load on.
static_assert(std::endian::native == std::endian::little);
template <class Element>
FSGD_INLINE uint32_t get_word(const Element* elements) {
  uint32_t word;
  __builtin_memcpy(&word, elements, sizeof(word));
  return word;
}
// The upper halves of two words, the first one's lower.
FSGD_INLINE uint32_t upper_halves(uint32_t first, uint32_t second) {
#if defined(__CUDA_ARCH__)
  return __byte_perm(first, second, 0x7632);
#else
  return first >> 16 | (second & 0xFFFF0000u);
#endif
}
template <class Element>
FSGD_INLINE void set_word(Element* elements, uint32_t word) {
  __builtin_memcpy(elements, &word, sizeof(word));
}

template <int kBytes>
struct alignas(kBytes < 16 ? kBytes : 16) Words {
  static_assert(kBytes % 4 == 0);
  uint32_t word[kBytes / 4];
};

template <class Element>
struct Column {
  Element* data;

  FSGD_INLINE explicit Column(void* column) : data(static_cast<Element*>(column)) {}

  // Two elements of 16 bits, the first one in the lower half.
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
    if (wide) {
      const auto words = *reinterpret_cast<const Words<sizeof(pack)>*>(data + i);
      __builtin_memcpy(&pack, &words, sizeof(pack));
      return pack;
    }
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
      Words<sizeof(pack)> words;
      __builtin_memcpy(&words, &pack, sizeof(pack));
      *reinterpret_cast<Words<sizeof(pack)>*>(data + i) = words;
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
