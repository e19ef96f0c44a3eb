// A param group's dict, read at every step: its hyperparameters as doubles, and what decides the path.
#pragma once

#include <Python.h>
#include <c10/core/Device.h>
#include <pybind11/pybind11.h>

#include <array>

#include "../core/rule.h"

namespace fused_sgd {

// A strong reference. (pybind11's py::object would do, but its checks cost more than the look-up they would guard.)
class Ref {
 public:
  Ref() = default;
  ~Ref() { set(nullptr); }
  Ref(Ref&& other) noexcept : object_(other.object_) { other.object_ = nullptr; }
  Ref& operator=(Ref&& other) noexcept {
    std::swap(object_, other.object_);
    return *this;
  }
  // The old object goes last: its finalizer may run any Python code, and must find this reference whole.
  void set(PyObject* borrowed) {
    PyObject* old = object_;
    Py_XINCREF(borrowed);
    object_ = borrowed;
    Py_XDECREF(old);
  }
  PyObject* get() const { return object_; }

 private:
  PyObject* object_ = nullptr;
};

enum class DictKind { Group, State };  // a param group, the state of a parameter

// Whether a dict is unchanged since it was last looked into, which saves looking its keys up again. Python before 3.12
// counts each dict's versions (PEP 509). Later ones tell whoever watches a dict before they change it: there all dicts
// of a kind have one count, of changes of any of them. (A schedule of learning rates changes groups, and costs no look
// into the state.) Where Python has no watcher left to give, the answer is always no. A DictVersion is of one dict for
// as long as it lives, and is asked of no other.
template <DictKind kKind>
class DictVersion {
 public:
#if PY_VERSION_HEX < 0x030C0000
  bool is_of(PyObject* dict) const { return version_ != 0 && version_ == version_of(dict); }
  void take(PyObject* dict) { version_ = version_of(dict); }

 private:
  static uint64_t version_of(PyObject* dict) { return reinterpret_cast<PyDictObject*>(dict)->ma_version_tag; }
#else
  bool is_of(PyObject*) const { return version_ == changes_; }
  void take(PyObject* dict) {
    version_ = watcher() >= 0 && PyDict_Watch(watcher(), dict) == 0 ? changes_ : 0;
    if (version_ == 0) PyErr_Clear();
  }

 private:
  static int watcher() {
    static const int id = PyDict_AddWatcher([](PyDict_WatchEvent, PyObject*, PyObject*, PyObject*) {
      ++changes_;
      return 0;
    });
    return id;
  }

  static inline uint64_t changes_ = 1;
#endif
  uint64_t version_ = 0;
};

// The keys a step looks up. When one from kFirstPathKey on changes, the group's parameters are judged anew. Those from
// kFirstOptional on may be missing.
enum Key {
  kLr,
  kMomentum,
  kDampening,
  kWeightDecay,
  kNesterov,
  kMaximize,
  kDecoupledWeightDecay,
  kMaxGradNorm,
  kSkipNonfinite,
  kEmaDecay,
  kFused,
  kForeach,
  kDifferentiable,
  kMomentumDtype,
  kMasterWeights,
  kStochasticRounding,
  kTrustCoeff,  // only of FusedLARS, like all that follow
  kEps,
  kTrustClip,
  kAlwaysAdapt,
  kLrInMomentum,
  kKeyCount,
  kFirstPathKey = kEmaDecay,
  kFirstOptional = kTrustCoeff
};
extern const std::array<const char*, kKeyCount> kKeyNames;

class GroupReader {
 public:
  enum Outcome { kSame, kValuesChanged, kPathChanged };

  // Reads `dict` again. A value that is the same object as last time is not parsed again, if it is of a kind that
  // cannot change. Throws py::error_already_set for a missing key.
  Outcome read(PyObject* dict);

  const Group& values() const { return group_; }
  // Whether a hyperparameter is a tensor on a GPU, whose kernel reads it there: then values() holds its address.
  bool has_addresses() const { return lr_device_ != kNoDevice || weight_decay_device_ != kNoDevice; }
  // Options of the whole optimizer, which every group repeats. 0 for no clipping.
  double max_grad_norm() const { return max_grad_norm_; }
  bool skip_nonfinite() const { return skip_nonfinite_; }
  // values() for parameters on another device: what stands elsewhere is read, which waits for the GPU.
  Group values_for(c10::Device device) const;
  // What a trust ratio is computed from, as a dict: numbers as they were read, and tensors on a GPU.
  pybind11::dict trust_options() const;
  // The first hyperparameter that is finite and beyond float32's range, or kKeyCount.
  Key too_large() const { return too_large_; }
  // The first hyperparameter that is NaN or no number, or kKeyCount.
  Key invalid() const { return invalid_; }
  int traverse(visitproc visit, void* arg) const;

 private:
  Outcome parse(PyObject* dict);
  void parse_numbers();

  static constexpr c10::DeviceIndex kNoDevice = -1;
  Group group_;
  double max_grad_norm_ = 0;
  bool skip_nonfinite_ = false;
  DictVersion<DictKind::Group> version_;
  c10::DeviceIndex lr_device_ = kNoDevice;  // of the GPU that the value stands on
  c10::DeviceIndex weight_decay_device_ = kNoDevice;
  std::array<Ref, kKeyCount> seen_;
  bool any_mutable_ = false;
  Key invalid_ = kKeyCount;
  Key too_large_ = kKeyCount;
};

PyObject* interned(const char* text);  // never freed
double as_double(PyObject* value);     // of anything float() takes; throws py::error_already_set

}  // namespace fused_sgd
