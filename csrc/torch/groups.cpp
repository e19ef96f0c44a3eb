#include "groups.h"

#include <ATen/ATen.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cmath>
#include <limits>

namespace py = pybind11;

namespace fused_sgd {

const std::array<const char*, kKeyCount> kKeyNames = {"lr",
                                                      "momentum",
                                                      "dampening",
                                                      "weight_decay",
                                                      "nesterov",
                                                      "maximize",
                                                      "decoupled_weight_decay",
                                                      "max_grad_norm",
                                                      "skip_nonfinite",
                                                      "ema_decay",
                                                      "fused",
                                                      "foreach",
                                                      "differentiable",
                                                      "momentum_dtype",
                                                      "master_weights",
                                                      "stochastic_rounding",
                                                      "trust_coeff",
                                                      "eps",
                                                      "trust_clip",
                                                      "always_adapt",
                                                      "lr_in_momentum"};

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

bool is_immutable(PyObject* value) {
  return PyFloat_CheckExact(value) || PyLong_CheckExact(value) || PyBool_Check(value) || value == Py_None ||
         PyUnicode_CheckExact(value) || THPDtype_Check(value);
}

// Where a kernel can read a number: in a tensor on a GPU, of one element of float32 or float64. Else Source::Value.
Source source_on_gpu(PyObject* value) {
  if (!THPVariable_CheckExact(value)) return Source::Value;
  const at::Tensor& tensor = THPVariable_Unpack(value);
  if (!tensor.is_cuda() || tensor.layout() != at::kStrided || tensor.numel() != 1) return Source::Value;
  if (tensor.is_neg()) return Source::Value;
  if (tensor.scalar_type() == at::kFloat) return Source::Float32;
  return tensor.scalar_type() == at::kDouble ? Source::Float64 : Source::Value;
}

double address_of(PyObject* value) {
  return bit_cast<double>(reinterpret_cast<uint64_t>(THPVariable_Unpack(value).const_data_ptr()));
}

bool as_bool(PyObject* value) {
  const int truth = PyObject_IsTrue(value);
  if (truth < 0) throw py::error_already_set();
  return truth != 0;
}

}  // namespace

GroupReader::Outcome GroupReader::read(PyObject* dict) {
  if (!any_mutable_ && version_.is_of(dict)) return kSame;
  version_ = {};
  try {
    const Outcome outcome = parse(dict);
    version_.take(dict);
    return outcome;
  } catch (...) {
    for (Ref& ref : seen_) ref.set(nullptr);  // what was half read is read again, and judged again
    throw;
  }
}

GroupReader::Outcome GroupReader::parse(PyObject* dict) {
  bool changed = any_mutable_;
  bool path_changed = false;
  for (int key = 0; key < kKeyCount; ++key) {
    PyObject* value = PyDict_GetItemWithError(dict, key_object(key));
    if (value == nullptr) {
      if (!PyErr_Occurred() && key >= kFirstOptional) {
        value = Py_None;
      } else {
        if (!PyErr_Occurred()) PyErr_SetObject(PyExc_KeyError, key_object(key));
        throw py::error_already_set();
      }
    }
    if (value == seen_[key].get()) continue;
    changed = true;
    // A tensor may come with requires_grad, which only the reference handles.
    path_changed = path_changed || key >= kFirstPathKey || THPVariable_Check(value);
    seen_[key].set(value);
  }
  if (!changed) return kSame;

  any_mutable_ = false;
  for (const Ref& ref : seen_) any_mutable_ = any_mutable_ || !is_immutable(ref.get());
  const Group before = group_;
  const std::pair options_before(max_grad_norm_, skip_nonfinite_);
  parse_numbers();
  if (path_changed) return kPathChanged;
  const bool same = group_ == before && options_before == std::pair(max_grad_norm_, skip_nonfinite_);
  return same ? kSame : kValuesChanged;
}

// From the objects in seen_.
void GroupReader::parse_numbers() {
  Group group;
  invalid_ = too_large_ = kKeyCount;
  group.lr_source = source_on_gpu(seen_[kLr].get());
  group.weight_decay_source = source_on_gpu(seen_[kWeightDecay].get());
  lr_device_ = weight_decay_device_ = kNoDevice;
  if (group.lr_source != Source::Value) {
    group.lr = address_of(seen_[kLr].get());
    lr_device_ = THPVariable_Unpack(seen_[kLr].get()).device().index();
  }
  if (group.weight_decay_source != Source::Value) {
    group.weight_decay = address_of(seen_[kWeightDecay].get());
    weight_decay_device_ = THPVariable_Unpack(seen_[kWeightDecay].get()).device().index();
  }
  const auto number = [&](Key key) {
    double value = std::nan("");
    try {
      value = as_double(seen_[key].get());
    } catch (const py::error_already_set&) {  // no number at all; NaN stands for it until it is replaced
    } catch (const c10::Error&) {             // a tensor of several elements
    }
    if (invalid_ == kKeyCount && std::isnan(value)) invalid_ = key;
    // (All others are used as doubles.)
    const bool is_cast = key == kLr || key == kMomentum || key == kDampening || key == kWeightDecay;
    if (is_cast && std::isfinite(value) && std::fabs(value) > std::numeric_limits<float>::max()) too_large_ = key;
    return value;
  };
  const auto in_range = [&](Key key, bool good) {
    if (invalid_ == kKeyCount && !good) invalid_ = key;
  };
  const auto is_given = [&](Key key) { return seen_[key].get() != Py_None; };
  if (lr_device_ == kNoDevice) group.lr = number(kLr);
  if (weight_decay_device_ == kNoDevice) group.weight_decay = number(kWeightDecay);
  group.momentum = number(kMomentum);
  group.dampening = number(kDampening);
  group.nesterov = as_bool(seen_[kNesterov].get());
  group.maximize = as_bool(seen_[kMaximize].get());
  group.decoupled_weight_decay = as_bool(seen_[kDecoupledWeightDecay].get());
  group.has_ema = is_given(kEmaDecay);
  if (group.has_ema) {
    group.ema_decay = number(kEmaDecay);
    in_range(kEmaDecay, group.ema_decay >= 0 && group.ema_decay < 1);
  }
  max_grad_norm_ = 0;
  if (is_given(kMaxGradNorm)) {
    max_grad_norm_ = number(kMaxGradNorm);
    in_range(kMaxGradNorm, max_grad_norm_ > 0);
  }
  skip_nonfinite_ = as_bool(seen_[kSkipNonfinite].get());
  if (is_given(kTrustCoeff)) {
    group.lars = kLars | (as_bool(seen_[kTrustClip].get()) ? kTrustClipped : 0) |
                 (as_bool(seen_[kAlwaysAdapt].get()) ? kAdaptAlways : 0) |
                 (as_bool(seen_[kLrInMomentum].get()) ? kLrThroughMomentum : 0);
    group.trust_coeff = number(kTrustCoeff);
    group.trust_eps = number(kEps);
    in_range(kTrustCoeff, group.trust_coeff >= 0);
    in_range(kEps, group.trust_eps >= 0);
    in_range(kDecoupledWeightDecay, group.decoupled_weight_decay == 0);
  }
  // An integer 0 has no sign: -lr is +0.0 then, as in Python. (But trust_clip divides by lr.)
  if (group.lr == 0 && group.lars == 0 && PyLong_Check(seen_[kLr].get())) group.lr = -0.0;
  group_ = group;
}

Group GroupReader::values_for(c10::Device device) const {
  Group group = group_;
  const auto fetch = [&](c10::DeviceIndex stands_on, Key key, double& value, Source& source) {
    if (stands_on == kNoDevice || (device.is_cuda() && device.index() == stands_on)) return;
    value = as_double(seen_[key].get());
    source = Source::Value;
  };
  fetch(lr_device_, kLr, group.lr, group.lr_source);
  fetch(weight_decay_device_, kWeightDecay, group.weight_decay, group.weight_decay_source);
  return group;
}

py::dict GroupReader::trust_options() const {
  const auto tensor = [&](Key key) { return py::reinterpret_borrow<py::object>(seen_[key].get()); };
  py::dict options;
  options["lr"] = lr_device_ == kNoDevice ? py::float_(group_.lr) : tensor(kLr);
  options["weight_decay"] = weight_decay_device_ == kNoDevice ? py::float_(group_.weight_decay) : tensor(kWeightDecay);
  options["trust_coeff"] = group_.trust_coeff;
  options["eps"] = group_.trust_eps;
  options["trust_clip"] = (group_.lars & kTrustClipped) != 0;
  options["always_adapt"] = (group_.lars & kAdaptAlways) != 0;
  return options;
}

int GroupReader::traverse(visitproc visit, void* arg) const {
  for (const Ref& ref : seen_) Py_VISIT(ref.get());
  return 0;
}

}  // namespace fused_sgd
