#include "tensors.h"

#include <algorithm>

namespace fused_sgd {

Fingerprint Fingerprint::of(const at::Tensor& tensor, const int64_t* parameter_geometry) {
  const c10::TensorImpl& impl = *tensor.unsafeGetTensorImpl();
  Fingerprint print;
  print.keys = impl.key_set().raw_repr();
  print.dtype = impl.dtype();
  print.contiguous = impl.is_contiguous();
  print.itemsize = static_cast<uint8_t>(tensor.element_size());
  const int64_t dims = tensor.dim();
  print.dims = static_cast<uint8_t>(dims);
  print.geometry = std::make_unique<int64_t[]>(2 * dims + 1);  // never null, so that "shared" can be told apart
  int64_t last = 0;                                            // offset of the last element
  for (int64_t dim = 0; dim < dims; ++dim) {
    print.geometry[dim] = tensor.size(dim);
    print.geometry[dims + dim] = tensor.stride(dim);
    last += (tensor.size(dim) - 1) * tensor.stride(dim);
  }
  print.required_bytes = tensor.numel() == 0 ? 0 : (last + 1) * print.itemsize;
  if (parameter_geometry && std::equal(&print.geometry[0], &print.geometry[0] + 2 * dims, parameter_geometry)) {
    print.geometry.reset();
  }
  return print;
}

std::optional<Format> format_of(at::ScalarType dtype) {
  switch (dtype) {
    case at::kDouble:
    case at::kComplexDouble:
      return Format::Float64;
    case at::kFloat:
    case at::kComplexFloat:
      return Format::Float32;
    case at::kBFloat16:
      return Format::BFloat16;
    case at::kHalf:
      return Format::Float16;
    default:
      return std::nullopt;
  }
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
