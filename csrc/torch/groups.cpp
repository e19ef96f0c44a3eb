#include "groups.h"

#include <ATen/ATen.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cmath>

namespace py = pybind11;

namespace fused_sgd {

const std::array<const char*, kKeyCount> kKeyNames = {"lr",       "momentum", "dampening", "weight_decay",  "nesterov",
                                                      "maximize", "fused",    "foreach",   "differentiable"};

PyObject* interned(const char* text) {
  PyObject* string = PyUnicode_InternFromString(text);
  if (string == nullptr) throw py::error_already_set();
  return string;
}

double as_double(PyObject* value) {
  if (THPVariable_Check(value)) return THPVariable_Unpack(value).detach().item<double>();
  const double number = PyFloat_AsDouble(value);  // ints and numpy scalars too
  if (number == -1.0 && PyErr_Occurred()) throw py::error_already_set();
  return number;
}

namespace {

PyObject* key_object(int key) {
  static const std::array<PyObject*, kKeyCount> objects = [] {
    std::array<PyObject*, kKeyCount> strings;
    for (int i = 0; i < kKeyCount; ++i) strings[i] = interned(kKeyNames[i]);
    return strings;
  }();
  return objects[key];
}

bool as_bool(PyObject* value) {
  const int truth = PyObject_IsTrue(value);
  if (truth < 0) throw py::error_already_set();
  return truth != 0;
}

}  // namespace

GroupReader::Outcome GroupReader::read(PyObject* dict) {
  bool changed = any_tensor_;  // a tensor's value may change while it stays the same object
  bool path_changed = false;
  for (int key = 0; key < kKeyCount; ++key) {
    PyObject* value = PyDict_GetItemWithError(dict, key_object(key));
    if (value == nullptr) {
      if (!PyErr_Occurred()) PyErr_SetObject(PyExc_KeyError, key_object(key));
      throw py::error_already_set();
    }
    if (value == seen_[key].get()) continue;
    changed = true;
    // A tensor may come with requires_grad, which only the reference handles.
    path_changed = path_changed || key >= kFused || THPVariable_Check(value);
    seen_[key].set(value);
  }
  if (!changed) return kSame;

  any_tensor_ = false;
  for (int key = kLr; key <= kWeightDecay; ++key) any_tensor_ = any_tensor_ || THPVariable_Check(seen_[key].get());
  group_.lr = as_double(seen_[kLr].get());
  group_.momentum = as_double(seen_[kMomentum].get());
  group_.dampening = as_double(seen_[kDampening].get());
  group_.weight_decay = as_double(seen_[kWeightDecay].get());
  group_.nesterov = as_bool(seen_[kNesterov].get());
  group_.maximize = as_bool(seen_[kMaximize].get());
  return path_changed ? kPathChanged : kSame;
}

Key GroupReader::invalid() const {
  if (std::isnan(group_.lr)) return kLr;
  if (std::isnan(group_.momentum)) return kMomentum;
  if (std::isnan(group_.dampening)) return kDampening;
  if (std::isnan(group_.weight_decay)) return kWeightDecay;
  return kKeyCount;
}

int GroupReader::traverse(visitproc visit, void* arg) const {
  for (const Ref& ref : seen_) Py_VISIT(ref.get());
  return 0;
}

}  // namespace fused_sgd
