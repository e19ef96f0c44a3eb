// The plan: from an optimizer's param groups and state to a table, at every step.
//
// It is a cache and only a cache. What it keeps of a parameter is a judgement ("kernel, walked in these strides") with
// the fingerprint of the tensors the judgement was made of. Each step looks everything up again: the groups' dicts, the
// lists in them, each gradient, each momentum buffer, every pointer. What no longer matches is reported to Python,
// where the judging is done (fused_sgd/_judge.py), and nothing is written until all of it is settled.
#pragma once

#include <pybind11/pybind11.h>

#include "../core/table.h"
#include "../cuda/launch.h"
#include "groups.h"
#include "overlap.h"
#include "tensors.h"

namespace fused_sgd {

class Plan {
 public:
  Plan();

  // One step over `param_groups` (list of dicts) and `state` (parameter -> dict of tensors; the one given to watch()).
  // grad_scale is None or anything float() takes; found_inf is None or a tensor on a GPU. What stands on a GPU is read
  // by its kernels. Returns None when the step is done, or
  //   ("elsewhere", [(group, index)…])   done, but for these parameters, which no kernel takes
  // or, with nothing written, what stands in its way:
  //   ("state",)                     `state` is not the dict given to watch()
  //   ("scalars",)                   grad_scale and found_inf are on a GPU and must be known here: call step() again
  //                                  with numbers
  //   ("capture", group, index)      the first step with dampening cannot be captured
  //   ("mode",)                      a torch dispatch mode is active: no kernel may hide from it
  //   ("invalid", group, key)        a hyperparameter is NaN or no number
  //   ("judge", [(group, index)…])   these parameters must be judged: call admit() for each, then step() again
  //   ("too large", group, key, index)  a hyperparameter does not fit float32, which this parameter is computed in
  //   ("freed", group, index, role)  a tensor's storage is smaller than the tensor
  //   ("overlap", (group, index, role), (group, index, role))   written memory is shared
  pybind11::object step(PyObject* param_groups, PyObject* state, PyObject* grad_scale, PyObject* found_inf);

  // A judgement of one parameter that has a gradient: walked by the kernel for as long as its tensors stay as they are,
  // or left to Python for the step that follows at once.
  // new_buffer: the momentum buffer to put into the state with the next step, which is then the parameter's first.
  void admit(int64_t group, int64_t index, bool kernel, pybind11::object new_buffer);

  // `state` will report every change of itself, by forget_state(); so what was found in it may be kept.
  void watch(pybind11::object state);

  // Drops what is known of the state, or everything. Python calls it when the outer state dict was changed; during a
  // step (another thread, a finalizer) it takes effect afterwards.
  void forget_state();
  void forget();

  int traverse(visitproc visit, void* arg) const;  // for Python's garbage collector

 private:
  enum class Path : uint8_t { Unjudged, Elsewhere, Kernel };

  // Two cache lines, and a step reads them all.
  struct alignas(64) Entry {
    Ref param;
    Ref state;  // the parameter's own dict
    DictVersion state_version;
    PyObject* momentum_object = nullptr;  // what that version of the dict holds, borrowed from it
    const Fingerprint *param_print = nullptr, *grad_print = nullptr, *momentum_print = nullptr;
    int64_t length = 0;  // reals
    // What the last step used; null when the parameter took no part.
    char *last_param = nullptr, *last_grad = nullptr, *last_momentum = nullptr;
    Path path = Path::Unjudged;
    bool state_known = false;
    bool momentum = false;
    bool first_step = false;
    bool is_dtensor = false;
    bool is_subclass = false;  // its gradient is whatever Python says
    bool stage_param = false, stage_grad = false, stage_momentum = false;
    uint8_t combination = 0;
    uint8_t target = 0;  // index into targets_
    Ref new_buffer;      // to be put into the state
    uint32_t round = 0;  // in which it was left to Python
    Where where{};

    bool staged() const { return stage_param || stage_grad || stage_momentum; }
  };
  static_assert(sizeof(Entry) <= 128);
  struct GroupEntry {
    Ref dict;
    GroupReader reader;
    std::vector<Entry> entries;
  };
  // Where a table is walked: on the CPU, which is always the first, or on a GPU.
  struct Target {
    c10::Device device;
    TablePacker packer;
    std::unique_ptr<cuda::Launcher> launcher;  // null for the CPU
    cuda::Stream stream = nullptr;             // the current one, while there is something to launch
    at::Tensor grad_scale, found_inf;          // on this device
  };
  // One parameter that takes part in this step. Tensors are local ones; momentum may be null. Data pointers are null
  // for a tensor without elements, which has no row in the table.
  struct Active {
    explicit Active(Entry* its_entry) : entry(its_entry) {}
    Entry* entry;
    const at::Tensor *param = nullptr, *grad = nullptr, *momentum = nullptr;
    char *param_data = nullptr, *grad_data = nullptr, *momentum_data = nullptr;
  };

  class Busy;
  pybind11::object run(PyObject* param_groups, PyObject* state);
  void match_group(std::size_t number, PyObject* dict);
  void find_states(PyObject* state);
  pybind11::object prepare(PyObject* param_groups, PyObject* state);
  pybind11::object scan();
  bool holds(Entry& entry, Active& active, const at::Tensor& grad, bool momentum);
  const at::Tensor* momentum_of(Entry& entry);
  const at::Tensor* find_momentum(Entry& entry);
  pybind11::object check_overlap();
  void stage();
  void install_new_buffers(PyObject* state);
  void remove_new_buffers(PyObject* state);
  void prepare_launches();
  void launch();
  void walk();
  void commit();

  bool watches(PyObject* state) const;
  uint8_t target_of(c10::Device device);

  std::vector<GroupEntry> groups_;
  // What a step replaced. It goes when the step is over: finalizers may run any Python code.
  std::vector<GroupEntry> discarded_groups_;
  std::vector<Entry> discarded_entries_;
  pybind11::object state_;  // a weak reference: State holds the plan, and a circle would outlive the optimizer
  std::vector<Active> active_;
  std::vector<Where> elsewhere_;
  std::vector<at::Tensor> held_;    // gradients, kept alive while the GIL is released
  std::vector<at::Tensor> copies_;  // what staged tensors are walked through
  WrittenMemory written_;
  FingerprintPool prints_;
  std::vector<Target> targets_;
  std::vector<Entry*> installed_;  // whose new buffers this step put into the state
  float grad_scale_ = 1;
  bool has_grad_scale_ = false;
  at::Tensor gpu_grad_scale_, gpu_found_inf_;  // undefined unless they were given as tensors on a GPU
  bool written_moved_ = true;                  // since the overlap check
  bool grads_moved_ = true;
  bool any_staged_ = false;
  bool any_new_buffer_ = false;
  uint32_t round_ = 0;  // counts calls of step()
  bool states_known_ = true;
  bool busy_ = false;
  bool forget_when_done_ = false;
};

}  // namespace fused_sgd
