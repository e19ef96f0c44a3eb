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
inline void pack(const TablePacker& packer, std::byte* destination) {
  const auto groups = packer.groups();
  std::memcpy(destination, groups.data(), groups.size_bytes());
  std::memcpy(destination + groups.size_bytes(), packer.rows().data(), packer.rows().size_bytes());
}

// What only the step knows. Pointers are the device's.
struct Scalars {
  const float* grad_scale = nullptr;
  const float* found_inf = nullptr;
  float grad_scale_value = 1;  // instead of a pointer
  bool has_grad_scale_value = false;
};

struct Head {
  const std::byte* memory;  // of a table that is not in the arguments
  Scalars scalars;
  uint32_t groups_bytes;
  uint32_t row_count;
  uint32_t row_bytes;
  uint32_t log2_chunk_bytes;
};

// The arguments of one launch. kCapacity: bytes of the table they hold, or 0 when it is in device memory.
template <std::size_t kCapacity>
struct Arguments {
  Head head;
  alignas(8) std::byte bytes[kCapacity == 0 ? 8 : kCapacity];

  FSGD_INLINE Table table() const {
    const std::byte* packed = kCapacity == 0 ? head.memory : bytes;
    const Scalars& scalars = head.scalars;
    Table table;
    table.groups = reinterpret_cast<const Group*>(packed);
    table.rows = packed + head.groups_bytes;
    table.grad_scale = scalars.has_grad_scale_value ? &scalars.grad_scale_value : scalars.grad_scale;
    table.found_inf = scalars.found_inf;
    table.row_count = head.row_count;
    table.row_bytes = head.row_bytes;
    table.log2_chunk_bytes = head.log2_chunk_bytes;
    return table;
  }
};

// Small tables have small arguments of their own, since a launch copies all of them.
inline constexpr std::size_t kSmallCapacity = 4096;
inline constexpr std::size_t kLargeCapacity = (kMaxArgumentBytes - sizeof(Head)) / 8 * 8;
static_assert(sizeof(Arguments<kLargeCapacity>) <= kMaxArgumentBytes);

inline Head make_head(const TablePacker& packer, const Scalars& scalars, const std::byte* memory) {
  const Table table = packer.table(nullptr);
  const auto groups_bytes = static_cast<uint32_t>(packer.groups().size_bytes());
  return Head{memory, scalars, groups_bytes, table.row_count, table.row_bytes, table.log2_chunk_bytes};
}

// A chunk of 8 to 64 KiB of parameter: small enough that every block the device can hold at once has work, large enough
// that looking the row up costs nothing. A block of 256 threads loads 8 KiB of each column at a time.
constexpr uint32_t choose_log2_chunk_bytes(uint64_t parameter_bytes, uint64_t blocks_at_once) {
  uint32_t log2 = 13;
  while (log2 < 16 && (blocks_at_once << (log2 + 1)) <= parameter_bytes) ++log2;
  return log2;
}

}  // namespace fused_sgd::cuda
