// How a table reaches the device: as the kernel's arguments up to their limit, in device memory beyond it.
#pragma once

#include <cstring>

#include "walk.h"

namespace fused_sgd::cuda {

inline constexpr std::size_t kMaxArgumentBytes = 32764;  // of a launch, since CUDA 12.1

// The groups and then the rows of a table, one after the other: what travels.
inline std::size_t packed_bytes(const TablePacker& packer) {
  return packer.groups().size_bytes() + packer.rows().size_bytes();
}
// The same and the guide, which arguments have, too.
inline std::size_t argument_bytes(const TablePacker& packer) {
  return packed_bytes(packer) + packer.guide().size_bytes();
}
inline void pack(const TablePacker& packer, std::byte* destination) {
  const auto groups = packer.groups();
  std::memcpy(destination, groups.data(), groups.size_bytes());
  std::memcpy(destination + groups.size_bytes(), packer.rows().data(), packer.rows().size_bytes());
}
inline void pack_arguments(const TablePacker& packer, std::byte* destination) {
  pack(packer, destination);
  std::memcpy(destination + packed_bytes(packer), packer.guide().data(), packer.guide().size_bytes());
}

// Where the first pass of a step leaves its sums; see squares.h. All of it is the device's.
struct Sums {
  double* grad_squares = nullptr;   // of each chunk
  double* param_squares = nullptr;  // the same; null where nobody asks for the parameters' norms
  double* row_squares = nullptr;    // parameter and gradient of each row
  double* totals = nullptr;         // sum of squares of all gradients, and 1 if one of them is not finite
  // 0 between two steps:
  uint32_t* nonfinite = nullptr;
  uint32_t* counter = nullptr;       // rows that are done
  uint32_t* row_counters = nullptr;  // of each row, chunks that are done
};

struct Head {
  const std::byte* memory;  // of a table that is not in the arguments
  Scalars scalars;
  Sums sums;
  float grad_scale;  // instead of a pointer to it
  uint32_t has_grad_scale;
  uint32_t groups_bytes;
  uint32_t row_count;
  uint32_t row_bytes;
  uint32_t guide_count;
  uint32_t guide_shift;
  uint32_t reversed;  // chunks are walked from the last to the first
};

// The arguments of one launch. kCapacity: bytes of the table they hold, or 0 when it is in device memory.
template <std::size_t kCapacity>
struct Arguments {
  Head head;
  alignas(8) std::byte bytes[kCapacity == 0 ? 8 : kCapacity];

  FSGD_INLINE Table table() const {
    const std::byte* packed = kCapacity == 0 ? head.memory : bytes;
    Table table;
    table.groups = reinterpret_cast<const Group*>(packed);
    table.rows = packed + head.groups_bytes;
    table.scalars = head.scalars;
    if (head.has_grad_scale != 0) table.scalars.grad_scale = &head.grad_scale;
    table.row_count = head.row_count;
    table.row_bytes = head.row_bytes;
    if constexpr (kCapacity > 0) {
      table.guide = reinterpret_cast<const uint32_t*>(table.rows + std::size_t{head.row_count} * head.row_bytes);
      table.guide_count = head.guide_count;
      table.guide_shift = head.guide_shift;
    }
    return table;
  }
};

// Small tables have small arguments of their own, since a launch copies all of them.
inline constexpr std::size_t kSmallCapacity = 8192;
inline constexpr std::size_t kLargeCapacity = (kMaxArgumentBytes - sizeof(Head)) / 8 * 8;
static_assert(sizeof(Arguments<kLargeCapacity>) <= kMaxArgumentBytes);

// grad_scale: a number on the host, or null when there is none or scalars has its address.
inline Head make_head(const TablePacker& packer, const Scalars& scalars, const float* grad_scale, const Sums& sums,
                      const std::byte* memory) {
  const Table table = packer.table();
  Head head{};
  head.memory = memory;
  head.scalars = scalars;
  head.sums = sums;
  head.grad_scale = grad_scale != nullptr ? *grad_scale : 1;
  head.has_grad_scale = grad_scale != nullptr;
  head.groups_bytes = static_cast<uint32_t>(packer.groups().size_bytes());
  head.row_count = table.row_count;
  head.row_bytes = table.row_bytes;
  head.guide_count = static_cast<uint32_t>(packer.guide().size());
  head.guide_shift = packer.guide_shift();
  head.reversed = scalars.totals != nullptr;  // a first pass read the last ones last: they may still be in the cache
  return head;
}

}  // namespace fused_sgd::cuda
