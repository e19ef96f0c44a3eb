#include "overlap.h"

#include <algorithm>

namespace fused_sgd {
namespace {

// Calls visit(first byte, size) for each element of a range, or once for a dense one, until it returns false. Returns
// whether it never did.
template <class Visit>
bool for_each_element(const Range& range, Visit visit) {
  if (range.dense) return visit(range.begin, range.end - range.begin);
  int64_t count = 1;
  for (const int64_t size : range.sizes) count *= size;
  std::vector<int64_t> index(range.sizes.size(), 0);
  const char* element = range.begin;
  for (; count > 0; --count) {
    if (!visit(element, range.itemsize)) return false;
    for (std::size_t dim = index.size(); dim-- > 0;) {
      element += range.strides[dim] * range.itemsize;
      if (++index[dim] < range.sizes[dim]) break;
      element -= range.sizes[dim] * range.strides[dim] * range.itemsize;
      index[dim] = 0;
    }
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
  for_each_element(a, [&](const char* element, int64_t size) {
    bytes.mark(element, size);
    return true;
  });
  return !for_each_element(b, [&](const char* element, int64_t size) { return !bytes.touches(element, size); });
}

}  // namespace

Range make_range(const at::Tensor& tensor, const char* data, int64_t required_bytes, Role role, Where owner,
                 PyObject* key) {
  const bool dense = tensor.is_non_overlapping_and_dense();
  Range range{
      data, data + required_bytes, dense, role, owner, key, {}, {}, static_cast<int64_t>(tensor.element_size())};
  if (!dense) {
    range.sizes = tensor.sizes().vec();
    range.strides = tensor.strides().vec();
  }
  return range;
}

WrittenMemory::Conflict WrittenMemory::seal() {
  std::sort(ranges_.begin(), ranges_.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
  furthest_.clear();
  const char* furthest = nullptr;
  for (const Range& range : ranges_) furthest_.push_back(furthest = std::max(furthest, range.end));
  // Ranges whose extents meet form a cluster. Whether views in it interleave or collide, one map of its bytes tells.
  for (std::size_t first = 0, next; first < ranges_.size(); first = next) {
    next = first + 1;
    while (next < ranges_.size() && ranges_[next].begin < furthest_[next - 1]) ++next;
    if (next == first + 1) continue;
    ByteMap bytes(ranges_[first].begin, furthest_[next - 1]);
    for (std::size_t i = first; i < next; ++i) {
      const bool free =
          for_each_element(ranges_[i], [&](const char* element, int64_t size) { return bytes.mark(element, size); });
      if (free) continue;
      for (std::size_t other = first; other < i; ++other) {
        if (share_memory(ranges_[other], ranges_[i])) return std::make_pair(ranges_[other], ranges_[i]);
      }
    }
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
  const char* begin = static_cast<const char*>(tensor.const_data_ptr());
  const int64_t bytes_spanned = (reach + 1) * static_cast<int64_t>(tensor.element_size());
  ByteMap bytes(begin, begin + bytes_spanned);
  const Range range = make_range(tensor, begin, bytes_spanned, Role::Parameter, {});
  return !for_each_element(range, [&](const char* element, int64_t size) { return bytes.mark(element, size); });
}

}  // namespace fused_sgd
