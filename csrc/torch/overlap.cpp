#include "overlap.h"

#include <algorithm>

namespace fused_sgd {
namespace {

// Calls visit(first byte) for each element of a strided tensor, until it returns false. Returns whether it never did.
template <class Visit>
bool for_each_element(const at::Tensor& tensor, Visit visit) {
  const int64_t itemsize = static_cast<int64_t>(tensor.element_size());
  const char* base = static_cast<const char*>(tensor.const_data_ptr());
  std::vector<int64_t> index(tensor.dim(), 0);
  for (int64_t n = tensor.numel(); n > 0; --n) {
    int64_t offset = 0;
    for (int64_t dim = 0; dim < tensor.dim(); ++dim) offset += index[dim] * tensor.stride(dim);
    if (!visit(base + offset * itemsize)) return false;
    for (int64_t dim = tensor.dim() - 1; dim >= 0 && ++index[dim] == tensor.size(dim); --dim) index[dim] = 0;
  }
  return true;
}

// One bit a byte of [begin, end).
class ByteMap {
 public:
  ByteMap(const char* begin, const char* end) : begin_(begin), bits_(static_cast<std::size_t>(end - begin)) {}

  // Marks an element's bytes. Returns false if one of them was marked.
  bool mark(const char* element, int64_t itemsize) {
    const bool free = !touches(element, itemsize);
    for (int64_t i = 0; i < itemsize; ++i) {
      if (inside(element + i)) bits_[element + i - begin_] = true;
    }
    return free;
  }
  bool touches(const char* element, int64_t itemsize) const {
    for (int64_t i = 0; i < itemsize; ++i) {
      if (inside(element + i) && bits_[element + i - begin_]) return true;
    }
    return false;
  }

 private:
  bool inside(const char* byte) const {
    return byte >= begin_ && byte < begin_ + static_cast<std::ptrdiff_t>(bits_.size());
  }
  const char* begin_;
  std::vector<bool> bits_;
};

// Whether two ranges share a byte. Where a view leaves gaps, the other may lie in them: then element by element.
bool share_memory(const Range& a, const Range& b) {
  if (a.end <= b.begin || b.end <= a.begin) return false;
  if (a.dense && b.dense) return true;
  ByteMap bytes(std::max(a.begin, b.begin), std::min(a.end, b.end));
  const auto each = [](const Range& range, auto visit) {
    if (!range.dense) {
      const int64_t itemsize = static_cast<int64_t>(range.tensor.element_size());
      return for_each_element(range.tensor, [&](const char* element) { return visit(element, itemsize); });
    }
    return visit(range.begin, range.end - range.begin);
  };
  each(a, [&](const char* element, int64_t size) {
    bytes.mark(element, size);
    return true;
  });
  return !each(b, [&](const char* element, int64_t size) { return !bytes.touches(element, size); });
}

}  // namespace

Range make_range(const at::Tensor& tensor, const char* data, int64_t required_bytes, Role role, Where owner) {
  const bool dense = tensor.is_non_overlapping_and_dense();
  return Range{data, data + required_bytes, dense, role, owner, dense ? at::Tensor() : tensor};
}

WrittenMemory::Conflict WrittenMemory::seal() {
  std::sort(ranges_.begin(), ranges_.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
  furthest_.clear();
  const char* furthest = nullptr;
  for (std::size_t i = 0; i < ranges_.size(); ++i) {
    for (std::size_t j = i + 1; j < ranges_.size() && ranges_[j].begin < ranges_[i].end; ++j) {
      if (share_memory(ranges_[i], ranges_[j])) return std::make_pair(ranges_[i], ranges_[j]);
    }
    furthest = std::max(furthest, ranges_[i].end);
    furthest_.push_back(furthest);
  }
  return std::nullopt;
}

bool WrittenMemory::clear_of(const char* begin, const char* end) const {
  const auto first_beyond =
      std::lower_bound(ranges_.begin(), ranges_.end(), end, [](const Range& r, const char* e) { return r.begin < e; });
  return first_beyond == ranges_.begin() || furthest_[first_beyond - ranges_.begin() - 1] <= begin;
}

WrittenMemory::Conflict WrittenMemory::overlapping(const Range& read) const {
  for (const Range& written : ranges_) {
    if (share_memory(written, read)) return std::make_pair(written, read);
  }
  return std::nullopt;
}

bool overlaps_itself(const at::Tensor& tensor) {
  // Sorted by stride, a dimension whose step clears everything below it cannot run into it.
  std::vector<std::pair<int64_t, int64_t>> dims;  // (stride, size)
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
    if (tensor.size(dim) == 0) return false;
    if (tensor.size(dim) > 1) dims.emplace_back(tensor.stride(dim), tensor.size(dim));
  }
  std::sort(dims.begin(), dims.end());
  int64_t reach = 0;  // offset of the last element of the dimensions so far
  bool clear = true;
  for (const auto& [stride, size] : dims) {
    if (stride == 0) return true;
    clear = clear && stride > reach;
    reach += stride * (size - 1);
  }
  if (clear) return false;
  const int64_t itemsize = static_cast<int64_t>(tensor.element_size());
  const char* begin = static_cast<const char*>(tensor.const_data_ptr());
  ByteMap bytes(begin, begin + (reach + 1) * itemsize);
  return !for_each_element(tensor, [&](const char* element) { return bytes.mark(element, itemsize); });
}

}  // namespace fused_sgd
