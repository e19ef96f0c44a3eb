// The plan: from an optimizer's param groups and state to a table, at every step.
//
// It is a cache and only a cache. What it keeps of a parameter is a judgement ("kernel, walked in these strides") with
// the fingerprint of the tensors the judgement was made of. Each step looks everything up again: the groups' dicts, the
// lists in them, each gradient, each state tensor, every pointer. What no longer matches is reported to Python, where
// the judging is done (fused_sgd/_judge.py), and nothing is written until all of it is settled.
//
//   plan.cpp          what a step may find, and the order of its parts
//   plan_steady.cpp   is all as it was? then only values and the gradients' addresses go into the tables, and where the
//                     walk is all that follows, the same threads go on with it
//   plan_match.cpp    else the plan is brought to the optimizer's shape, and the tables are packed anew
//   plan_memory.cpp   memory that is shared, copied, or put into the state
//   plan_norms.cpp    the first pass, where a step must see every gradient before it writes
//   plan_walk.cpp     the step itself, and what comes after
#pragma once

#include <c10/core/DeviceGuard.h>
#include <pybind11/pybind11.h>

#include <array>

#include "../core/table.h"
#include "../cuda/launch.h"
#include "groups.h"
#include "overlap.h"
#include "parts.h"
#include "tensors.h"

namespace fused_sgd {

class Plan {
 public:
  Plan();

  // One step over `param_groups` (list of dicts) and `state` (parameter -> dict of tensors; the one given to watch()).
  // grad_scale is None or anything float() takes; found_inf is None, 0, or a tensor on a GPU. What stands on a GPU is
  // read by its kernels. reduce is None or a function that adds up a float64 tensor over processes, in place. elsewhere
  // is None or what "norms" asked for. Returns None when the step is done, or
  //   ("elsewhere", [(group, index)…])   done, but for these parameters, which no kernel takes
  //   ("skipped",)                   nothing was written, because a gradient is not finite
  // or, with nothing written, what stands in its way:
  //   ("state",)                     `state` is not the dict given to watch()
  //   ("scalars",)                   grad_scale and found_inf are on a GPU and must be known here: call step() again
  //                                  with numbers
  //   ("norms", [(group, index)…])   no kernel takes these parameters: call step() again with their gradients' sum of
  //                                  squares and 1 if one is not finite, else 0
  //   ("mode",)                      a torch dispatch mode is active: no kernel may hide from it
  //   ("invalid", group, key)        a hyperparameter is NaN, no number, or out of range
  //   ("differ", group, key)         an option of the whole optimizer is another one in this group
  //   ("judge", [(group, index)…])   these parameters must be judged: call admit() for each, then step() again
  //   ("written", [(group, index)…]) someone else wrote into these parameters, which are copies of something in the
  //                                  state: bring that up to date, call refreshed() for each, then step() again
  //   ("too large", group, key, index)  a hyperparameter does not fit float32, which this parameter is computed in
  //   ("freed", group, index, role)  a tensor's storage is smaller than the tensor
  //   ("overlap", (group, index, role), (group, index, role))   written memory is shared
  pybind11::object step(PyObject* param_groups, PyObject* state, PyObject* grad_scale, PyObject* found_inf,
                        PyObject* reduce, PyObject* elsewhere);

  // A judgement of one parameter that has a gradient: walked by the kernel for as long as its tensors stay as they are,
  // or (combination < 0) left to Python for the step that follows at once.
  // combination: its line of FSGD_COMBINATIONS. keys: (key, column, elementwise) for each state tensor: its place in
  // the table's row, and whether it is walked in the parameter's strides. is_copy: the parameter is a copy of something
  // in the state, and reported when someone else has written it. new_states: tensors by key, to put into the
  // state with the next step; or None.
  void admit(int64_t group, int64_t index, int combination, const pybind11::tuple& keys, bool is_copy,
             pybind11::object new_states);

  // What a parameter is a copy of is up to date with it, as it is now.
  void refreshed(int64_t group, int64_t index);

  // `state` will report every change of itself, by forget_state(); so what was found in it may be kept.
  void watch(pybind11::object state);

  // Drops what is known of the state, or everything. Python calls it when the outer state dict was changed; during a
  // step (another thread, a finalizer) it takes effect afterwards.
  void forget_state();
  void forget();

  // What the last step found, as fresh float64 tensors: [sum of squares of all gradients, non-finite], or None, also
  // after a step that failed.
  pybind11::object totals() const;
  // A list of (group, index, parameter, [its sum of squares, its gradient's], max_grad_norm or 0, options) for the
  // parameters of the last step; options as that step read them, see GroupReader::trust_options().
  pybind11::list row_squares() const;
  // How many steps a GPU skipped, for each that counts them.
  std::vector<at::Tensor> skipped_steps() const;
  // Makes totals() and row_squares() empty: what was found is not of the last step any more.
  void forget_norms();
  // How often step() or forget_norms() was called: as long as this is the same, what was found in a step is of the
  // last one.
  uint32_t calls() const { return round_; }

  int traverse(visitproc visit, void* arg) const;  // for Python's garbage collector

 private:
  enum class Path : uint8_t { Unjudged, Elsewhere, Kernel };
  static constexpr int kMaxStates = 4;

  // A tensor of the parameter's own dict that the kernel walks.
  struct StateTensor {
    PyObject* key = nullptr;     // interned
    PyObject* object = nullptr;  // what this version of the dict holds, borrowed from it
    const Fingerprint* print = nullptr;
    char* last = nullptr;  // where the last step found it
    uint8_t column = 0;    // of the table
    bool stage = false;
  };

  struct Entry {
    Ref param;
    Ref state;  // the parameter's own dict
    DictVersion<DictKind::State> state_version;
    const Fingerprint *param_print = nullptr, *grad_print = nullptr;
    int64_t length = 0;  // reals
    Path path = Path::Unjudged;
    uint8_t state_count = 0;
    uint8_t combination = 0;
    uint8_t target = 0;  // index into targets_
    uint8_t grad_column = 0;
    bool state_known = false;
    bool momentum = false;
    bool is_dtensor = false;
    bool is_subclass = false;  // its gradient is whatever Python says
    bool stage_param = false, stage_grad = false;
    bool any_new = false;        // a state tensor is not in the state yet
    bool is_copy = false;        // of its master weights
    uint32_t version = 0;        // of such a parameter, after the last step
    const char* home = nullptr;  // and where it was when it was judged: `p.data = other` changes no version
    std::array<StateTensor, kMaxStates> states;
    char *last_param = nullptr, *last_grad = nullptr;  // null when the parameter took no part
    Ref new_states;                                    // a dict of what is to be put into the state,
    uint32_t new_round = 0;                            // by this round and no later one
    uint32_t round = 0;                                // in which it was left to Python
    Where where{};

    bool staged() const;
    bool written_by_others(const c10::TensorImpl& param) const {
      return is_copy && param.version_counter().current_version() != version;
    }
  };
  struct GroupEntry {
    Ref dict;
    GroupReader reader;
    std::vector<Entry> entries;
    std::vector<PyObject*> params;  // theirs, borrowed
    // Where its hyperparameters stand in the tables: (target, group of the table).
    std::vector<std::pair<uint8_t, uint32_t>> placed;
    bool momentum = false;  // whether the group had one when it was placed
  };
  // Where a table is walked: on the CPU, which is always the first, or on a GPU.
  struct Target {
    explicit Target(c10::Device its_device);
    c10::Device device;
    TablePacker packer;
    std::unique_ptr<cuda::Launcher> launcher;  // null for the CPU
    cuda::Stream stream = nullptr;             // the current one, while there is something to launch
    at::Tensor grad_scale, found_inf;          // on this device
    Scalars scalars;
  };
  // One parameter that takes part in this step. Tensors are local ones. Data pointers are null for a tensor without
  // elements, which has no row in the table.
  struct Active {
    explicit Active(Entry* its_entry) : entry(its_entry) {}
    Entry* entry;
    void** row = nullptr;  // its pointers in the table
    const at::Tensor *param = nullptr, *grad = nullptr;
    std::array<const at::Tensor*, kMaxStates> states{};
    char *param_data = nullptr, *grad_data = nullptr;
    std::array<char*, kMaxStates> state_data{};
  };

  // What a steady step compares of a tensor: all that it was.
  struct Watched {
    const c10::TensorImpl* impl = nullptr;
    const c10::StorageImpl* storage = nullptr;  // only to be called into the cache
    const Fingerprint* print = nullptr;
    char* data = nullptr;  // null when it has no row in the table

    void call() const;
    void call_version() const;
    void call_version_count() const;
    bool holds(const c10::TensorImpl* now) const;
  };
  struct WatchedState {
    PyObject* object = nullptr;
    Watched tensor;
  };
  // And of a parameter that takes part; close together, as an Entry and an Active are not. Objects are borrowed from
  // the entry, or are its state's for as long as the dict's version is this one.
  struct WatchedEntry {
    PyObject* param_object = nullptr;
    Watched param, grad;
    const at::Tensor* grad_slot = nullptr;
    void** grad_pointer = nullptr;  // in the table
    PyObject* state = nullptr;
    DictVersion<DictKind::State> state_version;
    uint32_t first_state = 0;            // of watched_states_
    c10::DeviceIndex device_index = -1;  // of a GPU
    uint8_t state_count = 0;
    bool is_copy = false;
  };

  class Busy;
  pybind11::object run(PyObject* state, PyObject* reduce, PyObject* elsewhere);
  pybind11::object settle(PyObject* state);

  // plan_steady.cpp
  void watch_all();
  bool may_be_steady();
  bool replace_groups();
  bool is_steady();
  bool only_walks() const;
  bool walk_if_steady();
  bool are_steady(std::pair<std::size_t, std::size_t> range);
  void bump_watched(std::pair<std::size_t, std::size_t> range) const;

  // plan_match.cpp
  void match_group(std::size_t number, PyObject* dict);
  void find_states(PyObject* state);
  pybind11::object prepare(PyObject* param_groups, PyObject* state);
  pybind11::object scan();
  pybind11::object place(GroupEntry& group, std::size_t number, uint8_t target, uint32_t* table_group);
  bool holds(Entry& entry, Active& active, const at::Tensor& grad, bool momentum);
  bool find_state_tensors(Entry& entry, Active& active);
  void look_up_states(Entry& entry);
  pybind11::object locate(Active& active);

  // plan_memory.cpp
  pybind11::object check_overlap();
  void stage();
  void unstage();
  void install_new_states(PyObject* state);
  void remove_new_states(PyObject* state);

  // plan_norms.cpp
  cuda::Norms norms_needed() const;
  bool norms_are_local() const;
  void start_sums();
  double* param_squares();
  void measure_on_cpu();
  void know_totals(const Table& table, bool nonfinite);
  void measure_on_gpus();
  void combine(PyObject* reduce, PyObject* elsewhere);
  bool nonfinite_was_found() const;
  at::Tensor totals_of(const Target& target) const;
  at::Tensor row_squares_of(const Target& target) const;

  // plan_walk.cpp
  void prepare_launches();
  void launch();
  void walk();
  void commit();
  bool releases_gil() const;
  int64_t walk_work() const;
  void walk_on_cpu();
  void walk_in_batches();
  void walk_parts(const Table& table, const Parts& parts) const;

  bool watches(PyObject* state) const;
  uint8_t target_of(c10::Device device);
  bool any_on_gpu() const;
  // For each GPU that has something to do, which is the current device meanwhile.
  template <class F>
  void on_gpus(F f) {
    for (Target& target : targets_) {
      if (target.launcher == nullptr || target.packer.row_count() == 0) continue;
      const c10::DeviceGuard guard(target.device);
      f(target);
    }
  }

  std::vector<GroupEntry> groups_;
  // What a step replaced. It goes when the step is over: finalizers may run any Python code.
  std::vector<GroupEntry> discarded_groups_;
  std::vector<Entry> discarded_entries_;
  pybind11::object state_;  // a weak reference: State holds the plan, and a circle would outlive the optimizer
  std::vector<Active> active_;
  std::vector<const Entry*> idle_;            // without a gradient
  std::vector<WatchedEntry> watched_;         // for each of active_, when steady_
  std::vector<WatchedState> watched_states_;  // of all of them, one after the other
  std::vector<Where> elsewhere_;
  std::vector<at::Tensor> held_;    // kept alive while the GIL is released
  std::vector<at::Tensor> copies_;  // what staged tensors are walked through
  WrittenMemory written_;
  FingerprintPool prints_;
  std::vector<Target> targets_;
  std::vector<std::pair<Entry*, PyObject*>> installed_;  // whose state tensors, by key, this step put there
  // Of the first pass on the CPU; see squares.h.
  std::vector<double> grad_squares_, param_squares_, row_squares_;
  std::array<double, 2> totals_{};
  cuda::Norms norms_ = cuda::Norms::None;  // that this step needs
  bool totals_known_ = false;              // in this step
  c10::Device totals_device_ = c10::kCPU;  // where they are told, if it is no GPU's kernel that has them
  bool totals_are_whole_ = true;           // and not those of the kernels' parameters alone
  // What totals() and row_squares() may tell: of a step that came to its end.
  bool tells_totals_ = false, tells_rows_ = false;
  double max_grad_norm_ = 0;
  bool skip_nonfinite_ = false;
  float grad_scale_ = 1;
  bool has_grad_scale_ = false;
  bool found_inf_known_ = false;               // a GradScaler has looked at the gradients already
  at::Tensor gpu_grad_scale_, gpu_found_inf_;  // undefined unless they were given as tensors on a GPU
  bool written_moved_ = true;                  // since the overlap check
  bool grads_moved_ = true;
  bool any_staged_ = false;
  bool any_new_ = false;
  bool any_copies_ = false;
  bool simple_ = false;          // plan_steady.cpp can tell whether the next step is like the one that was scanned
  bool steady_ = false;          // the tables are those of a step that was done, and nothing but values may differ
  bool repeats_ = false;         // this step is such a step
  bool values_changed_ = false;  // of a group's hyperparameters
  uint32_t round_ = 0;           // counts calls of step()
  bool states_known_ = true;
  bool busy_ = false;
  bool forget_when_done_ = false;
};

}  // namespace fused_sgd
