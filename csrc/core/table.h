// The table: one optimizer step as plain data. Per tensor a row, per distinct set of hyperparameters a group, per
// launch the scalars that only the step knows. A backend walks it and knows nothing else; it holds no torch type.
//
// Work is counted in chunks. A chunk is 2^log2_chunk_bytes of ONE tensor's parameter (the last one may be shorter), so
// that chunks cost about the same whatever the dtype, and every tensor begins with a chunk of its own. Rows carry the
// running sum of chunks, so the tensor of any chunk is found by binary search and no list of chunks exists.
#pragma once

#include <cstddef>
#include <limits>
#include <span>
#include <stdexcept>
#include <vector>

#include "combinations.h"
#include "rule.h"

namespace fused_sgd {

inline constexpr int kMaxColumns = 3;  // parameter, gradient, momentum buffer

// The head of a row; its column pointers follow it in memory: parameter, gradient, momentum buffer, each as many as its
// format has. A row without momentum leaves the last ones unset.
struct Row {
  int64_t length;      // elements
  uint32_t chunk_end;  // chunks of this row and of all before it
  uint32_t kind;  // group (16 bits), combination (8 bits), first step (1 bit): all that may differ between two rows

  static FSGD_INLINE uint32_t make_kind(uint32_t group, uint32_t combination, bool first_step) {
    return group | combination << 16 | static_cast<uint32_t>(first_step) << 24;
  }
  FSGD_INLINE uint32_t group() const { return kind & 0xFFFFu; }            // index into Table::groups
  FSGD_INLINE uint32_t combination() const { return kind >> 16 & 0xFFu; }  // line of FSGD_COMBINATIONS
  FSGD_INLINE bool first_step() const { return (kind >> 24 & 1u) != 0; }   // of this parameter

  FSGD_INLINE void* const* columns() const { return reinterpret_cast<void* const*>(this + 1); }
  FSGD_INLINE void** columns() { return reinterpret_cast<void**>(this + 1); }
};
static_assert(sizeof(Row) == 16, "a row is 16 bytes and its pointers: 40 bytes for the usual three");

struct Table {
  const std::byte* rows = nullptr;
  const Group* groups = nullptr;
  const float* grad_scale = nullptr;  // one value: gradients are divided by it; null for none
  const float* found_inf = nullptr;   // one value: unless it is 0, the step is skipped; null for none. Only for GPUs:
                                      // a CPU's step is skipped before it begins
  uint32_t row_count = 0;
  uint32_t row_bytes = sizeof(Row) + kMaxColumns * sizeof(void*);
  uint32_t log2_chunk_bytes = 0;

  FSGD_INLINE const Row& row(uint32_t i) const {
    return *reinterpret_cast<const Row*>(rows + std::size_t{i} * row_bytes);
  }
  FSGD_INLINE uint32_t chunk_begin(uint32_t i) const { return i == 0 ? 0 : row(i - 1).chunk_end; }
  FSGD_INLINE uint32_t chunk_count() const { return row_count == 0 ? 0 : row(row_count - 1).chunk_end; }
  FSGD_INLINE int64_t chunk_elements(int parameter_bytes) const {  // of an element
    return (int64_t{1} << log2_chunk_bytes) / parameter_bytes;
  }

  // The row that holds `chunk`, which must be below chunk_count().
  FSGD_INLINE uint32_t find_row(uint32_t chunk) const {
    uint32_t low = 0, high = row_count - 1;
    while (low < high) {
      const uint32_t middle = (low + high) / 2;
      if (row(middle).chunk_end > chunk) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    return low;
  }
};

// Packs a table. Its memory is kept between steps, so packing again allocates nothing.
class TablePacker {
 public:
  // columns: pointers a row, over the largest row to come. log2_chunk_bytes: 12 (4 KiB) or more.
  void start(int columns, uint32_t log2_chunk_bytes) {
    row_bytes_ = static_cast<uint32_t>(sizeof(Row) + static_cast<std::size_t>(columns) * sizeof(void*));
    log2_chunk_bytes_ = log2_chunk_bytes;
    row_count_ = 0;
    used_bytes_ = 0;
    chunks_ = 0;
    elements_ = 0;
    groups_.clear();
  }

  // The number of these hyperparameters; equal ones share a row. The last ones are looked at first, and few are looked
  // at: a missed match costs a row, not correctness.
  uint32_t add_group(const Group& group) {
    const std::size_t seen = groups_.size();
    for (std::size_t back = 1; back <= seen && back <= 8; ++back) {
      if (groups_[seen - back] == group) return static_cast<uint32_t>(seen - back);
    }
    if (seen > std::numeric_limits<uint16_t>::max()) {
      throw std::length_error("more than 65536 param groups with different hyperparameters in one step");
    }
    groups_.push_back(group);
    return static_cast<uint32_t>(seen);
  }

  // A row; the caller writes its pointers, to what is returned. length > 0; group as add_group() returned it.
  void** add_row(int64_t length, uint32_t group, uint32_t combination, bool first_step) {
    if (bytes_.size() < used_bytes_ + row_bytes_) bytes_.resize(2 * (used_bytes_ + row_bytes_));
    chunks_ += count_chunks(length, combination);
    if (chunks_ > std::numeric_limits<uint32_t>::max()) {
      throw std::length_error("the parameters of one step have more than 2^32 chunks");
    }
    elements_ += length;
    ++row_count_;
    Row* row = reinterpret_cast<Row*>(bytes_.data() + used_bytes_);
    used_bytes_ += row_bytes_;
    row->length = length;
    row->chunk_end = static_cast<uint32_t>(chunks_);
    row->kind = Row::make_kind(group, combination, first_step);
    return row->columns();
  }

  // The pointers of a row that was added.
  void** columns(uint32_t row) {
    return reinterpret_cast<Row*>(bytes_.data() + std::size_t{row} * row_bytes_)->columns();
  }
  uint32_t row_count() const { return row_count_; }
  int64_t elements() const { return elements_; }

  Table table(const float* grad_scale) const {
    return Table{bytes_.data(), groups_.data(), grad_scale, nullptr, row_count_, row_bytes_, log2_chunk_bytes_};
  }
  std::span<const std::byte> rows() const { return {bytes_.data(), used_bytes_}; }
  std::span<const Group> groups() const { return groups_; }
  // Of all parameters, each rounded up to a chunk.
  uint64_t parameter_bytes() const { return chunks_ << log2_chunk_bytes_; }

  // Counts the rows' chunks anew, in another size.
  void rechunk(uint32_t log2_chunk_bytes) {
    log2_chunk_bytes_ = log2_chunk_bytes;
    chunks_ = 0;
    for (uint32_t i = 0; i < row_count_; ++i) {
      Row& row = *reinterpret_cast<Row*>(bytes_.data() + std::size_t{i} * row_bytes_);
      chunks_ += count_chunks(row.length, row.combination());
      row.chunk_end = static_cast<uint32_t>(chunks_);
    }
  }

  // The combination that all rows have, or -1 when they differ.
  int only_combination() const {
    const Table all = table(nullptr);
    for (uint32_t i = 1; i < row_count_; ++i) {
      if (all.row(i).combination() != all.row(0).combination()) return -1;
    }
    return row_count_ == 0 ? -1 : static_cast<int>(all.row(0).combination());
  }

 private:
  uint64_t count_chunks(int64_t length, uint32_t combination) const {
    return static_cast<uint64_t>((length - 1) >>
                                 (log2_chunk_bytes_ - kCombinations[combination].parameter_log2_bytes)) +
           1;
  }

  std::vector<std::byte> bytes_;
  std::vector<Group> groups_;
  uint32_t row_bytes_ = 0;
  uint32_t log2_chunk_bytes_ = 0;
  uint32_t row_count_ = 0;
  std::size_t used_bytes_ = 0;
  uint64_t chunks_ = 0;
  int64_t elements_ = 0;
};

}  // namespace fused_sgd
