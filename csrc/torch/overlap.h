// Memory that must not be shared: what a step writes, against everything else it writes or reads.
#pragma once

#include <ATen/ATen.h>
#include <Python.h>

#include <optional>
#include <utility>
#include <vector>

namespace fused_sgd {

enum class Role : uint8_t { Parameter, Gradient, State };

// A parameter's place in the optimizer.
struct Where {
  uint32_t group;
  uint32_t index;
};

// The memory of one tensor of a step.
struct Range {
  const char* begin;
  const char* end;  // one past the last byte
  bool dense;       // every byte in between belongs to it
  Role role;
  Where owner;
  PyObject* key;  // of a state tensor, else null
  // To look closer, unless dense. Not the tensor itself: holding on to it would show (torch.utils.swap_tensors
  // refuses).
  std::vector<int64_t> sizes, strides;
  int64_t itemsize;
};

Range make_range(const at::Tensor& tensor, const char* data, int64_t required_bytes, Role role, Where owner,
                 PyObject* key = nullptr);

// The written tensors of a step, sorted. Kept between steps, since they rarely move.
class WrittenMemory {
 public:
  using Conflict = std::optional<std::pair<Range, Range>>;

  void clear() { ranges_.clear(); }
  void add(Range range) { ranges_.push_back(std::move(range)); }
  // Sorts; returns a pair that overlaps, if there is one.
  Conflict seal();
  // A written tensor that overlaps `read`, if there is one. Call it after seal().
  Conflict overlapping(const Range& read) const;
  // Whether [begin, end) is clear of the extents of all written tensors; false may also mean an interleaved view.
  bool clear_of(const char* begin, const char* end) const;

 private:
  std::vector<Range> ranges_;
  std::vector<const char*> furthest_;  // end of the furthest-reaching range up to and including each one
};

// Whether two elements of one tensor lie on the same memory (an expanded tensor, say).
bool overlaps_itself(const at::Tensor& tensor);

}  // namespace fused_sgd
