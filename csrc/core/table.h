// The table: one optimizer step as plain data. Per tensor a row, per distinct set of hyperparameters a group, per
// launch the scalars that only the step knows. A backend walks it and knows nothing else; it holds no torch type.
//
// Work is counted in chunks. A chunk is kChunk elements of ONE tensor (the last one may be shorter), and every tensor
// begins with a chunk of its own. Rows carry the running sum of chunks, so the tensor of any chunk is found by binary
// search and no list of chunks exists (but a guide to a few of them, where many look). Norms are summed by pieces of
// the same size, tiles (squares.h), which stay where they are when a GPU moves its chunks to aligned addresses.
#pragma once

#include <cstddef>
#include <limits>
#include <span>
#include <stdexcept>
#include <vector>

#include "combinations.h"
#include "rule.h"
#include "squares.h"

namespace fused_sgd {

inline constexpr int64_t kChunk = kTile;    // elements
inline constexpr uint32_t kMaxGuide = 128;  // entries
inline constexpr int kMaxColumns = 6;       // parameter 2, gradient 1, momentum buffer 2, average 1

// The head of a row; its column pointers follow it in memory: parameter, gradient, momentum buffer, each as many as its
// format has, and the parameter's average. Those that a row has not, it leaves unset.
struct Row {
  int64_t length;      // elements
  uint32_t chunk_end;  // chunks of this row and of all before it
  uint32_t kind;       // group (16 bits), combination (8 bits): all else that may differ between two rows

  static FSGD_INLINE uint32_t make_kind(uint32_t group, uint32_t combination) { return group | combination << 16; }
  FSGD_INLINE uint32_t group() const { return kind & 0xFFFFu; }            // index into Table::groups
  FSGD_INLINE uint32_t combination() const { return kind >> 16 & 0xFFu; }  // line of FSGD_COMBINATIONS

  FSGD_INLINE void* const* columns() const { return reinterpret_cast<void* const*>(this + 1); }
  FSGD_INLINE void** columns() { return reinterpret_cast<void**>(this + 1); }
};
static_assert(sizeof(Row) == 16, "a row is 16 bytes and its pointers: 40 bytes for the usual three");

struct Table {
  const std::byte* rows = nullptr;
  const Group* groups = nullptr;
  Scalars scalars;
  const uint32_t* guide =
      nullptr;  // where there is one: the rows of the chunks 0, 1 << guide_shift, 2 << guide_shift …
  uint32_t guide_count = 0;
  uint32_t guide_shift = 0;
  uint32_t row_count = 0;
  uint32_t row_bytes = sizeof(Row) + kMaxColumns * sizeof(void*);

  FSGD_INLINE const Row& row(uint32_t i) const {
    return *reinterpret_cast<const Row*>(rows + std::size_t{i} * row_bytes);
  }
  FSGD_INLINE int columns() const { return static_cast<int>((row_bytes - sizeof(Row)) / sizeof(void*)); }
  FSGD_INLINE uint32_t chunk_begin(uint32_t i) const { return i == 0 ? 0 : row(i - 1).chunk_end; }
  FSGD_INLINE uint32_t chunk_count() const { return row_count == 0 ? 0 : row(row_count - 1).chunk_end; }
  FSGD_INLINE uint32_t chunks_of(uint32_t i) const { return row(i).chunk_end - chunk_begin(i); }

  // The row that holds `chunk`, which must be below chunk_count().
  FSGD_INLINE uint32_t find_row(uint32_t chunk) const {
    uint32_t low = 0, high = row_count - 1;
    if (guide != nullptr) {
      const uint32_t i = chunk >> guide_shift;
      low = guide[i];
      if (i + 1 < guide_count) high = guide[i + 1];
    }
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

// From the sums of squares of chunks to those of rows [begin, end): parameter and gradient of each, one after the
// other. param_squares may be null.
inline void add_up_rows(const Table& table, uint32_t begin, uint32_t end, const double* grad_squares,
                        const double* param_squares, double* row_squares) {
  for (uint32_t i = begin; i < end; ++i) {
    const uint32_t first = table.chunk_begin(i), chunks = table.chunks_of(i);
    if (param_squares != nullptr) row_squares[2 * i] = fold_strided(param_squares + first, chunks, 1);
    row_squares[2 * i + 1] = fold_strided(grad_squares + first, chunks, 1);
  }
}

// The gradients' sum of squares over all rows.
inline double add_up_total(const Table& table, const double* row_squares) {
  return table.row_count == 0 ? 0 : fold_strided(row_squares + 1, table.row_count, 2);
}

// After a step that was not skipped: rows begin, begin + stride, … whose format counts steps.
FSGD_INLINE void count_steps(const Table& table, uint32_t begin, uint32_t stride) {
  for (uint32_t i = begin; i < table.row_count; i += stride) {
    const Row& row = table.row(i);
    count_step(static_cast<int>(row.combination()), row.columns());
  }
}

// Packs a table. Its memory is kept between steps, so packing again allocates nothing.
class TablePacker {
 public:
  // columns: pointers a row, over the largest row to come.
  void start(int columns) {
    row_bytes_ = static_cast<uint32_t>(sizeof(Row) + static_cast<std::size_t>(columns) * sizeof(void*));
    row_count_ = 0;
    used_bytes_ = 0;
    chunks_ = 0;
    elements_ = 0;
    lines_ = Lines::None;
    guided_rows_ = 0;
    guide_.clear();
    restart_groups();
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
    has_ema_ = has_ema_ || group.has_ema != 0;
    return static_cast<uint32_t>(seen);
  }

  // A row; the caller writes its pointers, to what is returned. length > 0; group as add_group() returned it.
  void** add_row(int64_t length, uint32_t group, uint32_t combination) {
    if (bytes_.size() < used_bytes_ + row_bytes_) bytes_.resize(2 * (used_bytes_ + row_bytes_));
    chunks_ += (length - 1) / kChunk + 1;
    if (chunks_ > std::numeric_limits<int32_t>::max()) {  // a GPU's grid takes no more blocks
      throw std::length_error("the parameters of one step have 2^31 or more chunks");
    }
    elements_ += length;
    lines_ = lines_ | line_bit(static_cast<int>(combination));
    ++row_count_;
    Row* row = reinterpret_cast<Row*>(bytes_.data() + used_bytes_);
    used_bytes_ += row_bytes_;
    row->length = length;
    row->chunk_end = static_cast<uint32_t>(chunks_);
    row->kind = Row::make_kind(group, combination);
    return row->columns();
  }

  // The pointers of a row that was added.
  void** columns(uint32_t row) {
    return reinterpret_cast<Row*>(bytes_.data() + std::size_t{row} * row_bytes_)->columns();
  }
  uint32_t row_count() const { return row_count_; }
  int64_t elements() const { return elements_; }

  Table table(const Scalars& scalars = {}) const {
    Table table;
    table.rows = bytes_.data();
    table.groups = groups_.data();
    table.scalars = scalars;
    table.row_count = row_count_;
    table.row_bytes = row_bytes_;
    return table;
  }
  std::span<const std::byte> rows() const { return {bytes_.data(), used_bytes_}; }
  std::span<const Group> groups() const { return groups_; }

  // Table::guide, which spares each of a GPU's blocks most of its search.
  std::span<const uint32_t> guide() const {
    if (guided_rows_ != row_count_) {
      const Table table = this->table();
      guide_shift_ = 0;
      while (((table.chunk_count() - 1) >> guide_shift_) >= kMaxGuide) ++guide_shift_;
      guide_.clear();
      for (uint32_t chunk = 0, row = 0; chunk < table.chunk_count(); chunk += 1u << guide_shift_) {
        while (table.row(row).chunk_end <= chunk) ++row;
        guide_.push_back(row);
      }
      guided_rows_ = row_count_;
    }
    return guide_;
  }
  uint32_t guide_shift() const { return guide_shift_; }  // of what guide() returned

  // Whether some group has an average.
  bool has_ema() const { return has_ema_; }
  // Whether some row's format counts steps.
  bool counts_steps() const { return (lines_ & kCountingLines) != Lines::None; }
  // The combinations that some row has.
  Lines lines() const { return lines_; }

  // The groups anew, for rows that stay; call add_group() for them in the order of the first time.
  void restart_groups() {
    groups_.clear();
    has_ema_ = false;
  }

 private:
  std::vector<std::byte> bytes_;
  std::vector<Group> groups_;
  mutable std::vector<uint32_t> guide_;
  mutable uint32_t guide_shift_ = 0;
  mutable uint32_t guided_rows_ = 0;  // as many rows as there were when the guide was made
  uint32_t row_bytes_ = 0;
  uint32_t row_count_ = 0;
  std::size_t used_bytes_ = 0;
  int64_t chunks_ = 0;
  int64_t elements_ = 0;
  Lines lines_ = Lines::None;
  bool has_ema_ = false;
};

}  // namespace fused_sgd
