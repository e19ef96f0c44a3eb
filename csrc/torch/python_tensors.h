// Between Python objects and the tensors they stand for.
#pragma once

#include <ATen/ATen.h>
#include <Python.h>
#include <torch/csrc/autograd/variable.h>

#include <string>

#include "overlap.h"

namespace fused_sgd {

// The tensor whose memory `object` stands for: itself, or a DTensor's local shard. Null for any other subclass.
const at::Tensor* local_tensor(PyObject* object);

// A tensor's gradient, by reference; null or undefined when it has none. (at::Tensor::grad() would warn for
// non-leaves.)
inline const at::Tensor* gradient_of(const at::Tensor& tensor) {
  const c10::AutogradMetaInterface* meta = tensor.unsafeGetTensorImpl()->autograd_meta();
  return meta == nullptr ? nullptr : &static_cast<const torch::autograd::AutogradMeta*>(meta)->grad_;
}

// local_tensor() for a gradient, which is usually reached without making its Python object.
const at::Tensor* local_gradient(const at::Tensor& grad);

// The gradient of a parameter of another class, which may have its own idea of `grad`; kept alive by whoever gave it.
// Such a parameter never goes to the kernel: only whether the answer is null matters.
const at::Tensor* python_gradient(PyObject* param);

// The tensor, if it has elements in memory of its own, of the CPU or a GPU; else null.
const at::Tensor* memory_of(const at::Tensor* tensor);

// The current stream of a GPU, as a handle.
void* current_stream(c10::Device device);

// How a message calls a tensor. key: of a state tensor.
std::string role_name(Role role, PyObject* key);

}  // namespace fused_sgd
