// Between Python objects and the tensors they stand for.
#pragma once

#include <ATen/ATen.h>
#include <Python.h>

#include "overlap.h"

namespace fused_sgd {

PyObject* momentum_key();  // "momentum_buffer", interned

// The tensor whose memory `object` stands for: itself, or a DTensor's local shard. Null for any other subclass.
const at::Tensor* local_tensor(PyObject* object);

// A tensor's gradient, by reference; null or undefined when it has none. (at::Tensor::grad() would warn for
// non-leaves.)
const at::Tensor* gradient_of(const at::Tensor& tensor);

// The tensor, if it has elements in memory of its own, of the CPU or a GPU; else null.
const at::Tensor* memory_of(const at::Tensor* tensor);

// The current stream of a GPU, as a handle.
void* current_stream(c10::Device device);

const char* role_name(Role role);

}  // namespace fused_sgd
