#include "tensors.h"

#include <algorithm>

namespace fused_sgd {

Fingerprint::Fingerprint(const at::Tensor& tensor)
    : keys(tensor.key_set().raw_repr()),
      dtype(tensor.dtype()),
      itemsize(static_cast<uint8_t>(tensor.element_size())),
      required_bytes(tensor.numel() == 0 ? 0 : extent(tensor)),
      sizes(tensor.sizes().begin(), tensor.sizes().end()),
      strides(tensor.strides().begin(), tensor.strides().end()) {}

int64_t extent(const at::Tensor& tensor) {
  int64_t last = 0;  // offset of the last element
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) last += (tensor.size(dim) - 1) * tensor.stride(dim);
  return (last + 1) * static_cast<int64_t>(tensor.element_size());
}

const Fingerprint* FingerprintPool::get(const at::Tensor& tensor) {
  std::vector<int64_t> key = {static_cast<int64_t>(tensor.key_set().raw_repr()),
                              static_cast<int64_t>(tensor.scalar_type())};
  key.insert(key.end(), tensor.sizes().begin(), tensor.sizes().end());
  key.insert(key.end(), tensor.strides().begin(), tensor.strides().end());
  return &prints_.try_emplace(std::move(key), tensor).first->second;
}

bool same_strides(at::IntArrayRef sizes, at::IntArrayRef a, at::IntArrayRef b) {
  for (std::size_t dim = 0; dim < sizes.size(); ++dim) {
    if (sizes[dim] > 1 && a[dim] != b[dim]) return false;
  }
  return true;
}

c10::SmallVector<int64_t, 8> walk_strides(const at::Tensor& tensor) {
  if (tensor.is_non_overlapping_and_dense()) return {tensor.strides().begin(), tensor.strides().end()};
  c10::SmallVector<int64_t, 8> strides(tensor.dim());
  int64_t next = 1;
  for (int64_t dim = tensor.dim() - 1; dim >= 0; --dim) {
    strides[dim] = next;
    next *= std::max<int64_t>(tensor.size(dim), 1);
  }
  return strides;
}

bool needs_staging(const at::Tensor& tensor, at::IntArrayRef strides) {
  return tensor.is_conj() || tensor.is_neg() || !same_strides(tensor.sizes(), tensor.strides(), strides);
}

at::Tensor staged(const at::Tensor& tensor, at::IntArrayRef strides) {
  return at::empty_strided(tensor.sizes(), strides, tensor.options()).copy_(tensor);
}

}  // namespace fused_sgd
