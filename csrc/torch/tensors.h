// What the plan needs to know of a tensor: its fingerprint, where its memory lies, and which storage format it is.
#pragma once

#include <ATen/ATen.h>
#include <c10/core/impl/COWDeleter.h>

#include <map>
#include <vector>

#include "../core/combinations.h"

namespace fused_sgd {

// Whether a tensor's memory is a lazy copy, which whoever writes it must make a copy first: one thread at a time.
FSGD_INLINE bool is_lazy_copy(const c10::StorageImpl& storage) {
  return storage.data_ptr().get_deleter() == &c10::impl::cow::cow_deleter;
}

// What must stay the same about an ordinary strided tensor for a judgement of it to hold. Compared at every step, in
// nanoseconds. The dispatch key set stands for device type, layout, conj and neg bits, subclass, inference mode and
// quantisation.
struct Fingerprint {
  uint64_t keys;
  caffe2::TypeMeta dtype;
  uint8_t itemsize;
  int64_t required_bytes;  // of storage, behind the tensor's offset
  c10::SmallVector<int64_t, 5> sizes;
  c10::SmallVector<int64_t, 5> strides;

  explicit Fingerprint(const at::Tensor& tensor);

  FSGD_INLINE bool matches(const c10::TensorImpl& impl) const {
    if (impl.key_set().raw_repr() != keys || impl.dtype() != dtype) return false;
    const at::IntArrayRef its_sizes = impl.sizes(), its_strides = impl.strides();
    const std::size_t dims = sizes.size();
    if (its_sizes.size() != dims) return false;
    const int64_t *size = sizes.data(), *stride = strides.data();
    int64_t difference = 0;  // one branch a tensor instead of two a dimension
    for (std::size_t dim = 0; dim < dims; ++dim) {
      difference |= (its_sizes.data()[dim] ^ size[dim]) | (its_strides.data()[dim] ^ stride[dim]);
    }
    return difference == 0;
  }

  // Where the first element of a tensor that matches is, or nullptr when its storage no longer holds all elements.
  // `writable` breaks a lazy copy-on-write first.
  FSGD_INLINE char* locate(const c10::TensorImpl& impl, bool writable) const {
    c10::StorageImpl* storage = impl.unsafe_storage().unsafeGetStorageImpl();
    const int64_t offset = impl.storage_offset() * itemsize;
    if (static_cast<int64_t>(storage->nbytes()) < offset + required_bytes) return nullptr;
    char* base = static_cast<char*>(writable ? storage->mutable_data() : const_cast<void*>(storage->data()));
    return base == nullptr ? nullptr : base + offset;
  }
};

// Fingerprints, each kept once: a parameter, its gradient and its momentum buffer have the same one as a rule, and then
// take the same place in the cache. Pointers stay valid until clear().
class FingerprintPool {
 public:
  const Fingerprint* get(const at::Tensor& tensor);
  void clear() { prints_.clear(); }

 private:
  std::map<std::vector<int64_t>, Fingerprint> prints_;
};

// Bytes from the first element of a strided tensor that has elements to the end of its last.
int64_t extent(const at::Tensor& tensor);

// Whether two tensors of one shape keep element i of a dense walk at the same offset. Dimensions of size 1 do not
// count.
bool same_strides(at::IntArrayRef sizes, at::IntArrayRef a, at::IntArrayRef b);

// The strides in which a tensor is walked: its own when it is dense, contiguous ones otherwise.
c10::SmallVector<int64_t, 8> walk_strides(const at::Tensor& tensor);

// Whether the walk must go through a copy of `tensor` laid out in `strides`: other strides, or lazy conj or neg bits.
bool needs_staging(const at::Tensor& tensor, at::IntArrayRef strides);

// A copy of `tensor` laid out in `strides`.
at::Tensor staged(const at::Tensor& tensor, at::IntArrayRef strides);

}  // namespace fused_sgd
