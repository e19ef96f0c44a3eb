#include "plan.h"

#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/python_variable.h>

#include "python_tensors.h"

namespace py = pybind11;

namespace fused_sgd {
namespace {

// The tensor, if it is one on a GPU.
at::Tensor on_gpu(PyObject* object) {
  if (!THPVariable_Check(object) || !THPVariable_Unpack(object).is_cuda()) return {};
  return THPVariable_Unpack(object);
}

py::list places(const std::vector<Where>& entries) {
  py::list list;
  for (const Where& where : entries) list.append(py::make_tuple(where.group, where.index));
  return list;
}

}  // namespace

// Marks the plan as being in use. A step may run Python code (a parameter's hash, a number's __float__), which may call
// the plan again; another thread may, too. Nobody gets in; what they wanted dropped is dropped here.
class Plan::Busy {
 public:
  explicit Busy(Plan& plan) : plan_(plan) {
    if (plan.busy_)
      throw std::runtime_error("step() is already running on this optimizer, in another thread or further up");
    plan.busy_ = true;
  }
  ~Busy() {
    ++plan_.round_;
    plan_.held_.clear();
    plan_.copies_.clear();
    plan_.gpu_grad_scale_ = plan_.gpu_found_inf_ = at::Tensor();
    const auto groups = std::exchange(plan_.discarded_groups_, std::vector<GroupEntry>());
    const auto entries = std::exchange(plan_.discarded_entries_, std::vector<Entry>());
    plan_.busy_ = false;
    if (std::exchange(plan_.forget_when_done_, false)) plan_.forget_state();
  }  // now groups and entries go
  Busy(const Busy&) = delete;
  Busy& operator=(const Busy&) = delete;

 private:
  Plan& plan_;
};

Plan::Target::Target(c10::Device its_device) : device(its_device) { packer.start(kMaxColumns); }

Plan::Plan() { targets_.emplace_back(c10::Device(c10::kCPU)); }

bool Plan::Entry::staged() const {
  bool any = stage_param || stage_grad;
  for (int k = 0; k < state_count; ++k) any = any || states[k].stage;
  return any;
}

bool Plan::any_on_gpu() const {
  for (const Target& target : targets_) {
    if (target.launcher != nullptr && target.packer.row_count() != 0) return true;
  }
  return false;
}

py::object Plan::step(PyObject* param_groups, PyObject* state, PyObject* grad_scale, PyObject* found_inf,
                      PyObject* reduce, PyObject* elsewhere) {
  const Busy busy(*this);
  totals_known_ = tells_totals_ = tells_rows_ = false;
  totals_device_ = c10::kCPU;
  if (!watches(state)) return py::make_tuple("state");
  if (c10::impl::TorchDispatchModeTLS::any_modes_set()) return py::make_tuple("mode");
  gpu_grad_scale_ = on_gpu(grad_scale);
  gpu_found_inf_ = on_gpu(found_inf);
  found_inf_known_ = found_inf != Py_None;
  has_grad_scale_ = grad_scale != Py_None && !gpu_grad_scale_.defined();
  grad_scale_ = has_grad_scale_ ? static_cast<float>(as_double(grad_scale)) : 1;
  const bool was_steady = std::exchange(steady_, false);
  if (py::object obstacle = prepare(param_groups, state); !obstacle.is_none()) return obstacle;
  if (was_steady && may_be_steady()) {
    if (only_walks()) {
      norms_ = cuda::Norms::None;
      targets_[0].scalars = Scalars{};
      if (has_grad_scale_) targets_[0].scalars.grad_scale = &grad_scale_;
      if (walk_if_steady()) {
        commit();
        return py::none();
      }
    } else if (is_steady()) {
      return run(state, reduce, elsewhere);
    }
  }
  if (py::object obstacle = scan(); !obstacle.is_none()) return obstacle;
  return run(state, reduce, elsewhere);
}

// From a table to changed memory.
py::object Plan::run(PyObject* state, PyObject* reduce, PyObject* elsewhere) {
  if (written_moved_ || grads_moved_ || !elsewhere_.empty()) {
    if (py::object obstacle = check_overlap(); !obstacle.is_none()) {
      steady_ = false;  // so that the next step looks at what moved again
      return obstacle;
    }
  }
  const bool on_gpu = any_on_gpu();
  // Not everything is stepped where the GPUs are, so what they alone know must be known here.
  const bool host_decides = targets_[0].packer.row_count() != 0 || !elsewhere_.empty();
  // What was left to Python stays so for the call that follows at once; and what is about to be put into the state.
  const auto call_again = [&](py::tuple what) {
    for (const Where& where : elsewhere_) groups_[where.group].entries[where.index].round = round_ + 1;
    for (const Active& a : active_) a.entry->new_round = round_ + 1;
    return what;
  };
  if (host_decides && (gpu_grad_scale_.defined() || gpu_found_inf_.defined())) {
    return call_again(py::make_tuple("scalars"));
  }
  norms_ = norms_needed();
  const bool global = norms_ != cuda::Norms::None && !(norms_are_local() && reduce == Py_None && !on_gpu);
  totals_are_whole_ = global || elsewhere_.empty();
  if (global && !elsewhere_.empty() && elsewhere == Py_None) {
    return call_again(py::make_tuple("norms", places(elsewhere_)));
  }
  Scalars& scalars = targets_[0].scalars;
  scalars = Scalars{};
  if (has_grad_scale_) scalars.grad_scale = &grad_scale_;
  try {
    if (any_new_ && on_gpu) {
      if (py::object obstacle = settle(state); !obstacle.is_none()) return obstacle;
    }
    if (any_staged_) stage();
    if (on_gpu) prepare_launches();
    if (global) {
      if (host_decides || !on_gpu) measure_on_cpu();
      if (on_gpu) measure_on_gpus();
      combine(reduce, elsewhere);
      if (reduce != Py_None) {  // which ran Python code, and so perhaps other threads: all is looked at once more
        if (py::object obstacle = scan(); !obstacle.is_none()) return obstacle;
        if (any_staged_) stage();
        if (on_gpu) prepare_launches();
      }
      if (skip_nonfinite_ && host_decides && nonfinite_was_found()) {
        remove_new_states(state);
        tells_totals_ = totals_are_whole_;
        return py::make_tuple("skipped");
      }
      scalars.totals = totals_.data();
      scalars.row_squares = row_squares_.data();
      scalars.max_grad_norm = max_grad_norm_;
    }
    if (any_new_) {
      if (py::object obstacle = settle(state); !obstacle.is_none()) return obstacle;
      if (any_staged_) stage();
    }
    if (on_gpu) launch();
  } catch (...) {
    remove_new_states(state);
    throw;
  }
  walk();
  commit();
  tells_totals_ = totals_known_ && totals_are_whole_;
  tells_rows_ = totals_known_ && norms_ == cuda::Norms::GradientsAndParameters;
  if (elsewhere_.empty()) return py::none();
  return py::make_tuple("elsewhere", places(elsewhere_));
}

// Puts new tensors into the state. This hashes parameters, which runs Python code, and so perhaps other threads: all is
// looked at once more.
py::object Plan::settle(PyObject* state) {
  install_new_states(state);
  return scan();
}

void Plan::admit(int64_t g, int64_t i, int combination, const py::tuple& keys, bool is_copy, py::object new_states) {
  if (busy_) throw std::runtime_error("step() is already running on this optimizer in another thread");
  Entry& e = groups_.at(g).entries.at(i);
  e.new_states.set(nullptr);
  e.any_new = false;
  if (combination < 0) {
    e.path = Path::Elsewhere;
    e.round = round_;
    written_moved_ = written_moved_ || e.last_param != nullptr;
    e.last_param = nullptr;
    return;
  }
  TORCH_INTERNAL_ASSERT(combination < kCombinationCount && keys.size() <= kMaxStates);
  const at::Tensor& param = THPVariable_Unpack(e.param.get());
  const at::Tensor* gradient_pointer = gradient_of(param);
  if (gradient_pointer == nullptr || !gradient_pointer->defined()) throw std::logic_error("admit() without a gradient");
  const at::Tensor* local_param = local_tensor(e.param.get());
  const at::Tensor* local_grad = local_gradient(*gradient_pointer);
  TORCH_INTERNAL_ASSERT(local_param && local_grad, "admit() of a parameter the kernel cannot take");
  if (!new_states.is_none()) e.new_states.set(new_states.ptr());
  e.new_round = round_;
  e.momentum = groups_[g].reader.values().momentum != 0;
  e.combination = static_cast<uint8_t>(combination);
  e.grad_column = static_cast<uint8_t>(kCombinations[combination].gradient_column());
  e.target = target_of(local_param->device());
  e.is_dtensor = local_param != &param;
  e.is_copy = is_copy;
  e.version = local_param->unsafeGetTensorImpl()->version_counter().current_version();
  e.length = local_param->numel() * (local_param->is_complex() ? 2 : 1);
  const auto strides = walk_strides(*local_param);
  e.stage_param = needs_staging(*local_param, strides);
  e.stage_grad = needs_staging(*local_grad, strides);
  e.param_print = prints_.get(*local_param);
  e.home = e.param_print->locate(*local_param->unsafeGetTensorImpl(), true);
  e.grad_print = prints_.get(*local_grad);
  e.state_count = static_cast<uint8_t>(keys.size());
  e.state_version = {};
  e.states = {};
  Active found(&e);
  for (int k = 0; k < e.state_count; ++k) {
    const auto key = keys[k].cast<py::tuple>();
    e.states[k].key = interned(key[0].cast<std::string>().c_str());
    e.states[k].column = key[1].cast<uint8_t>();
  }
  TORCH_INTERNAL_ASSERT(find_state_tensors(e, found), "admit() without its state");
  for (int k = 0; k < e.state_count; ++k) {
    const bool elementwise = keys[k].cast<py::tuple>()[2].cast<bool>();
    e.states[k].print = prints_.get(*found.states[k]);
    e.states[k].stage = elementwise && needs_staging(*found.states[k], strides);
  }
  e.path = Path::Kernel;
  written_moved_ = true;
}

void Plan::refreshed(int64_t g, int64_t i) {
  Entry& e = groups_.at(g).entries.at(i);
  const at::Tensor* param = local_tensor(e.param.get());
  if (param != nullptr) e.version = param->unsafeGetTensorImpl()->version_counter().current_version();
}

uint8_t Plan::target_of(c10::Device device) {
  for (std::size_t i = 0; i < targets_.size(); ++i) {
    if (targets_[i].device == device) return static_cast<uint8_t>(i);
  }
  TORCH_INTERNAL_ASSERT(targets_.size() < 256);
  targets_.emplace_back(device);
  const auto release_cache = [] { c10::getDeviceAllocator(c10::kCUDA)->emptyCache(); };
  targets_.back().launcher = std::make_unique<cuda::Launcher>(device.index(), release_cache);
  return static_cast<uint8_t>(targets_.size() - 1);
}

void Plan::watch(py::object state) {
  forget_state();
  state_ = py::weakref(state);
}

bool Plan::watches(PyObject* state) const {
#if PY_VERSION_HEX < 0x030D0000
  return state_ && PyWeakref_GET_OBJECT(state_.ptr()) == state;
#else
  PyObject* watched = nullptr;
  if (!state_ || PyWeakref_GetRef(state_.ptr(), &watched) != 1) return false;
  Py_DECREF(watched);
  return watched == state;
#endif
}

void Plan::forget_state() {
  if (busy_) {
    forget_when_done_ = true;
    return;
  }
  states_known_ = steady_ = false;
  for (GroupEntry& group : groups_) {
    for (Entry& entry : group.entries) {
      entry.state.set(nullptr);
      entry.state_version = {};
      entry.new_states.set(nullptr);
      entry.any_new = false;
      entry.state_known = false;
    }
  }
}

void Plan::forget_norms() {
  if (busy_) return;
  ++round_;
  tells_totals_ = tells_rows_ = false;
}

void Plan::forget() {
  if (busy_) return;
  const auto groups = std::exchange(groups_, std::vector<GroupEntry>());  // goes last
  active_.clear();
  idle_.clear();
  watched_.clear();
  watched_states_.clear();
  prints_.clear();
  written_.clear();
  written_moved_ = true;
  steady_ = false;
}

int Plan::traverse(visitproc visit, void* arg) const {
  for (const GroupEntry& group : groups_) {
    Py_VISIT(group.dict.get());
    if (const int stop = group.reader.traverse(visit, arg)) return stop;
    for (const Entry& entry : group.entries) {
      Py_VISIT(entry.param.get());
      Py_VISIT(entry.state.get());
      Py_VISIT(entry.new_states.get());
    }
  }
  return 0;
}

}  // namespace fused_sgd
