// fp32 master weights beside the narrow parameter that the model computes with. A step reads the master alone and
// writes both.
#pragma once

#include "formats.h"
#include "split.h"

namespace fused_sgd {

// Columns: the narrow parameter, its fp32 master.
template <uint16_t (*kNarrow)(float)>
struct Master {
  using Acc = float;
  static constexpr int kColumns = 2;
  static constexpr int kBytes = 6;
  static constexpr int kBlock = 1;
  static constexpr int kBatch = kBatchFor<kNarrow>;
  static constexpr bool kConvertsMany = kBatch > 1;

  Column<uint16_t> parameter;
  Column<float> master;

  FSGD_INLINE explicit Master(void* const* columns) : parameter(columns[0]), master(columns[1]) {}
  FSGD_INLINE float load(int64_t i) const { return master.data[i]; }
  FSGD_INLINE float store(int64_t i, float x) const {
    parameter.data[i] = kNarrow(x);
    master.data[i] = x;
    return x;
  }

  template <int n>
  FSGD_INLINE void prefetch(int64_t i) const {
    master.template prefetch<n>(i);
  }
  FSGD_INLINE uint32_t until_aligned() const { return parameter.until_aligned(); }
  FSGD_INLINE bool aligned(int64_t i) const { return parameter.aligned(i) && master.aligned(i); }
  template <int n>
  using Packed = Column<float>::Packed<n>;
  template <int n>
  FSGD_INLINE Packed<n> load_pack(int64_t i, bool wide) const {
    return master.load_pack<n>(i, wide);
  }
  template <int n>
  FSGD_INLINE static void unpack(const Packed<n>& pack, float (&x)[n]) {
    FSGD_UNROLL
    for (int k = 0; k < n; ++k) x[k] = pack.element[k];
  }
  template <int n>
  FSGD_INLINE void store_pack(int64_t i, bool wide, const float (&x)[n]) const {
    Column<uint16_t>::Packed<n> narrow;
    Packed<n> exact;
    encode<kNarrow>(x, narrow.element);
    FSGD_UNROLL
    for (int k = 0; k < n; ++k) exact.element[k] = x[k];
    parameter.store_pack(i, wide, narrow);
    master.store_pack(i, wide, exact);
  }
};

// Ties go where the split format takes them, so that training with either leaves the same parameters.
FSGD_INLINE uint16_t split_high(float x) { return round_split(x).high; }

using MasterBFloat16 = Master<split_high>;
using MasterFloat16 = Master<float_to_float16>;

}  // namespace fused_sgd
