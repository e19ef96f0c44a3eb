#include "python_tensors.h"

#include <c10/core/impl/VirtualGuardImpl.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/python_variable.h>

#include "groups.h"
#include "tensors.h"

namespace py = pybind11;

namespace fused_sgd {
namespace {

// torch.distributed.tensor.DTensor once something imported it, else null. (A DTensor cannot exist before.)
PyTypeObject* dtensor_type() {
  static PyTypeObject* type = nullptr;
  if (type == nullptr) {
    PyObject* modules = PyImport_GetModuleDict();
    PyObject* module = PyDict_GetItemString(modules, "torch.distributed.tensor");
    if (module == nullptr) return nullptr;
    PyObject* found = PyObject_GetAttrString(module, "DTensor");
    if (found == nullptr) PyErr_Clear();
    type = reinterpret_cast<PyTypeObject*>(found);  // kept for good, as the module is
  }
  return type;
}

}  // namespace

// The tensor whose memory `object` stands for: itself, or a DTensor's local shard. Null for any other subclass.
const at::Tensor* local_tensor(PyObject* object) {
  if (THPVariable_CheckExact(object)) return &THPVariable_Unpack(object);
  if (Py_TYPE(object) != dtensor_type()) return nullptr;
  static PyObject* name = interned("_local_tensor");
  const py::object local = py::reinterpret_steal<py::object>(PyObject_GetAttr(object, name));
  if (!local) throw py::error_already_set();
  return THPVariable_CheckExact(local.ptr()) ? &THPVariable_Unpack(local.ptr()) : nullptr;
}

// The tensor, if it has elements in memory of its own, of the CPU or a GPU; else null.
const at::Tensor* memory_of(const at::Tensor* tensor) {
  const bool has = tensor != nullptr && tensor->defined() && !tensor->unsafeGetTensorImpl()->is_python_dispatch() &&
                   tensor->layout() == at::kStrided && (tensor->is_cpu() || tensor->is_cuda()) &&
                   tensor->has_storage() && !tensor->unsafeGetTensorImpl()->is_nested() && tensor->numel() > 0 &&
                   static_cast<int64_t>(tensor->storage().nbytes()) >= extent(*tensor);
  return has ? tensor : nullptr;
}

// By way of c10's guards, which every torch has, so that no CUDA header of torch's is needed.
void* current_stream(c10::Device device) {
  return c10::impl::VirtualGuardImpl(device.type()).getStream(device).native_handle();
}

std::string role_name(Role role, PyObject* key) {
  if (role == Role::Parameter) return "parameter";
  if (role == Role::Gradient) return "gradient";
  std::string name = key == nullptr ? "state" : PyUnicode_AsUTF8(key);
  for (char& c : name) c = c == '_' ? ' ' : c;
  return name;
}

const at::Tensor* local_gradient(const at::Tensor& grad) {
  if (!grad.unsafeGetTensorImpl()->is_python_dispatch()) return &grad;
  const py::object object = py::reinterpret_steal<py::object>(THPVariable_Wrap(grad));
  return local_tensor(object.ptr());
}

const at::Tensor* python_gradient(PyObject* param) {
  static PyObject* name = interned("grad");
  const py::object grad = py::reinterpret_steal<py::object>(PyObject_GetAttr(param, name));
  if (!grad) throw py::error_already_set();
  return grad.is_none() ? nullptr : &THPVariable_Unpack(param);
}

}  // namespace fused_sgd
