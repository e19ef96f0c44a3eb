#include "plan.h"

#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/variable.h>

#include <cmath>

#include "python_tensors.h"

namespace py = pybind11;

namespace fused_sgd {
namespace {

// One chunk of fp32 is 1024 elements: fine enough to split evenly over threads, coarse enough to cost nothing.
constexpr uint32_t kLog2ChunkBytes = 12;
// The gradient of a parameter of another class, which may have its own idea of `grad`. Kept alive by whoever gave it.
const at::Tensor* python_gradient(PyObject* param) {
  static PyObject* name = interned("grad");
  const py::object grad = py::reinterpret_steal<py::object>(PyObject_GetAttr(param, name));
  if (!grad) throw py::error_already_set();
  // Such a parameter never goes to the kernel: that there is a gradient is all that matters.
  return grad.is_none() ? nullptr : &THPVariable_Unpack(param);
}

bool computed_in_double(int combination) { return kCombinations[combination].parameter == Format::Float64; }

// local_tensor() for a gradient, which is usually reached without making its Python object.
const at::Tensor* local_gradient(const at::Tensor& grad) {
  if (!grad.unsafeGetTensorImpl()->is_python_dispatch()) return &grad;
  const py::object object = py::reinterpret_steal<py::object>(THPVariable_Wrap(grad));
  return local_tensor(object.ptr());
}

py::error_already_set type_error(const std::string& message) {
  PyErr_SetString(PyExc_TypeError, message.c_str());
  return {};
}

// The tensor, if it is one on a GPU.
at::Tensor on_gpu(PyObject* object) {
  if (!THPVariable_Check(object) || !THPVariable_Unpack(object).is_cuda()) return {};
  return THPVariable_Unpack(object);
}

py::tuple freed(Where where, Role role) { return py::make_tuple("freed", where.group, where.index, role_name(role)); }

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

Plan::Plan() { targets_.push_back(Target{c10::Device(c10::kCPU), {}, nullptr, nullptr, {}, {}}); }

py::object Plan::step(PyObject* param_groups, PyObject* state, PyObject* grad_scale, PyObject* found_inf) {
  const Busy busy(*this);
  if (!watches(state)) return py::make_tuple("state");
  if (c10::impl::TorchDispatchModeTLS::any_modes_set()) return py::make_tuple("mode");
  gpu_grad_scale_ = on_gpu(grad_scale);
  gpu_found_inf_ = on_gpu(found_inf);
  has_grad_scale_ = grad_scale != Py_None && !gpu_grad_scale_.defined();
  grad_scale_ = has_grad_scale_ ? static_cast<float>(as_double(grad_scale)) : 1;
  return run(param_groups, state);
}

py::object Plan::run(PyObject* param_groups, PyObject* state) {
  if (py::object obstacle = prepare(param_groups, state); !obstacle.is_none()) return obstacle;
  if (py::object obstacle = scan(); !obstacle.is_none()) return obstacle;
  if (written_moved_ || grads_moved_ || !elsewhere_.empty()) {
    if (py::object obstacle = check_overlap(); !obstacle.is_none()) return obstacle;
  }
  if (gpu_grad_scale_.defined() || gpu_found_inf_.defined()) {
    if (targets_[0].packer.row_count() != 0 || !elsewhere_.empty()) return py::make_tuple("scalars");
  }
  try {
    if (any_new_buffer_) {
      // This hashes parameters, which runs Python code, and so perhaps other threads: all is looked at once more.
      install_new_buffers(state);
      if (py::object obstacle = scan(); !obstacle.is_none()) return obstacle;
    }
    if (any_staged_) stage();
    if (targets_.size() > 1) prepare_launches();
  } catch (...) {
    remove_new_buffers(state);
    throw;
  }
  if (targets_.size() > 1) launch();
  walk();
  commit();
  if (elsewhere_.empty()) return py::none();
  py::list entries;
  for (const Where& where : elsewhere_) entries.append(py::make_tuple(where.group, where.index));
  return py::make_tuple("elsewhere", entries);
}

// Brings groups_[number] to the shape of the optimizer's group.
void Plan::match_group(std::size_t number, PyObject* dict) {
  GroupEntry& group = groups_[number];
  if (group.dict.get() != dict) {
    discarded_groups_.push_back(std::exchange(group, GroupEntry()));
    group.dict.set(dict);
    written_moved_ = true;
  }
  static PyObject* params_key = interned("params");
  PyObject* params = PyDict_GetItemWithError(dict, params_key);
  if (params == nullptr || !PyList_Check(params)) {
    throw type_error("param_groups[" + std::to_string(number) + "]['params'] must be a list of tensors");
  }
  const auto size = static_cast<std::size_t>(PyList_GET_SIZE(params));
  if (group.entries.size() != size) {
    for (Entry& entry : group.entries) discarded_entries_.push_back(std::move(entry));
    group.entries.clear();
    group.entries.resize(size);
    written_moved_ = true;
  }
  for (std::size_t i = 0; i < size; ++i) {
    PyObject* param = PyList_GET_ITEM(params, i);
    Entry& entry = group.entries[i];
    if (entry.param.get() == param) continue;
    if (!THPVariable_Check(param)) {
      throw type_error("param_groups[" + std::to_string(number) + "]['params'][" + std::to_string(i) +
                       "] is not a tensor");
    }
    discarded_entries_.push_back(std::exchange(entry, Entry()));
    entry.param.set(param);
    entry.is_subclass = local_tensor(param) == nullptr;
    states_known_ = false;
    entry.where = Where{static_cast<uint32_t>(number), static_cast<uint32_t>(i)};
    written_moved_ = true;
  }
}

// Finds the parameters' own dicts. Hashing a parameter runs Python code, so this comes before any pointer is taken.
void Plan::find_states(PyObject* state) {
  states_known_ = true;
  for (GroupEntry& group : groups_) {
    for (Entry& entry : group.entries) {
      if (entry.state_known) continue;
      PyObject* inner = PyDict_GetItemWithError(state, entry.param.get());
      if (inner == nullptr && PyErr_Occurred()) {
        states_known_ = false;
        throw py::error_already_set();
      }
      entry.state.set(inner != nullptr && PyDict_Check(inner) ? inner : nullptr);
      entry.state_known = true;
    }
  }
}

// The parameter's momentum buffer: the one in its state, or the one about to be installed; null when there is none.
FSGD_INLINE const at::Tensor* Plan::momentum_of(Entry& entry) {
  if (entry.state.get() != nullptr && entry.state_version.is_of(entry.state.get())) {
    PyObject* buffer = entry.momentum_object;
    return THPVariable_CheckExact(buffer) ? &THPVariable_Unpack(buffer) : local_tensor(buffer);
  }
  return find_momentum(entry);
}

const at::Tensor* Plan::find_momentum(Entry& entry) {
  PyObject* inner = entry.state.get();
  PyObject* buffer = inner == nullptr ? nullptr : PyDict_GetItemWithError(inner, momentum_key());
  if (buffer == nullptr && PyErr_Occurred()) throw py::error_already_set();
  if (buffer == nullptr || buffer == Py_None) {
    buffer = entry.new_buffer.get();
  } else {
    entry.first_step = entry.first_step && buffer == entry.new_buffer.get();
    if (!THPVariable_Check(buffer)) return nullptr;
    entry.state_version.take(inner);
    entry.momentum_object = buffer;
  }
  return buffer == nullptr ? nullptr : local_tensor(buffer);
}

// Whether what was judged of a parameter is still true. Finds the tensors the kernel would walk.
FSGD_INLINE bool Plan::holds(Entry& entry, Active& active, const at::Tensor& grad, bool momentum) {
  if (entry.path == Path::Unjudged) return false;
  if (entry.path == Path::Elsewhere) return entry.round == round_;
  if (entry.momentum != momentum) return false;
  active.param = entry.is_dtensor ? local_tensor(entry.param.get()) : &THPVariable_Unpack(entry.param.get());
  if (active.param == nullptr || !entry.param_print->matches(*active.param->unsafeGetTensorImpl())) return false;
  active.grad = local_gradient(grad);
  if (active.grad == nullptr || !entry.grad_print->matches(*active.grad->unsafeGetTensorImpl())) return false;
  active.momentum = momentum ? momentum_of(entry) : nullptr;
  if (momentum &&
      (active.momentum == nullptr || !entry.momentum_print->matches(*active.momentum->unsafeGetTensorImpl()))) {
    return false;
  }
  // Fingerprints tell a GPU from a CPU, not one GPU from another.
  if (entry.target == 0) return true;
  const c10::Device device = targets_[entry.target].device;
  return active.param->device() == device && active.grad->device() == device &&
         (!momentum || active.momentum->device() == device);
}

// Brings the plan to the shape of the optimizer and reads its dicts. This may run Python code; nothing after it does.
py::object Plan::prepare(PyObject* param_groups, PyObject* state) {
  const auto group_count = static_cast<std::size_t>(PyList_GET_SIZE(param_groups));
  if (groups_.size() != group_count) {
    while (groups_.size() > group_count) {
      discarded_groups_.push_back(std::move(groups_.back()));
      groups_.pop_back();
    }
    groups_.resize(group_count);
    written_moved_ = true;
  }
  for (std::size_t g = 0; g < group_count; ++g) {
    if (static_cast<std::size_t>(PyList_GET_SIZE(param_groups)) != group_count) {
      throw std::runtime_error("param_groups changed during the step");
    }
    PyObject* dict = PyList_GET_ITEM(param_groups, g);
    if (!PyDict_Check(dict)) throw type_error("param_groups[" + std::to_string(g) + "] must be a dict");
    match_group(g, dict);
    GroupEntry& group = groups_[g];
    if (group.reader.read(group.dict.get()) == GroupReader::kPathChanged) {
      for (Entry& entry : group.entries) entry.path = Path::Unjudged;
    }
    if (const Key key = group.reader.invalid(); key != kKeyCount) return py::make_tuple("invalid", g, kKeyNames[key]);
  }
  if (!states_known_) find_states(state);
  return py::none();
}

// Looks at everything the step will touch, and packs the table. Writes to no tensor and no state.
py::object Plan::scan() {
  active_.clear();
  elsewhere_.clear();
  for (Target& target : targets_) target.packer.start(kMaxColumns, kLog2ChunkBytes);
  grads_moved_ = any_staged_ = any_new_buffer_ = false;
  py::object to_judge;
  bool scalars_needed = false;
  for (std::size_t g = 0; g < groups_.size(); ++g) {
    GroupEntry& group = groups_[g];
    Target* target = nullptr;  // the last parameter's
    uint32_t table_group = 0;
    const bool momentum = group.reader.values().momentum != 0;
    const Key too_large = group.reader.too_large();

    for (std::size_t i = 0; i < group.entries.size(); ++i) {
      Entry& entry = group.entries[i];
      const at::Tensor* grad =
          entry.is_subclass ? python_gradient(entry.param.get()) : gradient_of(THPVariable_Unpack(entry.param.get()));
      if (grad == nullptr || !grad->defined()) {
        written_moved_ = written_moved_ || entry.last_param != nullptr;
        entry.last_param = nullptr;
        continue;
      }
      Active& a = active_.emplace_back(&entry);
      if (!holds(entry, a, *grad, momentum)) {
        active_.pop_back();
        entry.path = Path::Unjudged;
        if (!to_judge) to_judge = py::list();
        to_judge.cast<py::list>().append(py::make_tuple(g, i));
        continue;
      }
      if (entry.path == Path::Elsewhere) {
        elsewhere_.push_back(entry.where);
        active_.pop_back();
        continue;
      }
      if (too_large != kKeyCount && !computed_in_double(entry.combination)) {
        return py::make_tuple("too large", g, kKeyNames[too_large], i);
      }
      any_new_buffer_ |= entry.first_step;
      if (target != &targets_[entry.target]) {
        target = &targets_[entry.target];
        Group values = group.reader.values();
        if (group.reader.has_addresses()) {
          values = group.reader.values_for(target->device);
          if (values.lr_source == Source::Value && std::isnan(values.lr)) return py::make_tuple("invalid", g, "lr");
          if (values.weight_decay_source == Source::Value && std::isnan(values.weight_decay)) {
            return py::make_tuple("invalid", g, "weight_decay");
          }
        }
        table_group = target->packer.add_group(values);
      }
      bool first_step = entry.first_step;
      if (entry.target != 0 && first_step) {
        // The buffer holds -0.0, with which the ordinary formula gives the first step to the bit, unless there is
        // dampening. So a step that the device skips or a graph repeats needs no flag.
        first_step = group.reader.values().dampening != 0;
        scalars_needed = scalars_needed || (first_step && gpu_found_inf_.defined());
        if (first_step && cuda::is_capturing(current_stream(target->device))) return py::make_tuple("capture", g, i);
      }
      if (entry.length != 0) {
        a.param_data = entry.param_print->locate(*a.param->unsafeGetTensorImpl(), true);
        a.grad_data = entry.grad_print->locate(*a.grad->unsafeGetTensorImpl(), false);
        if (a.param_data == nullptr) return freed(entry.where, Role::Parameter);
        if (a.grad_data == nullptr) return freed(entry.where, Role::Gradient);
        if (momentum) {
          a.momentum_data = entry.momentum_print->locate(*a.momentum->unsafeGetTensorImpl(), true);
          if (a.momentum_data == nullptr) return freed(entry.where, Role::Momentum);
        }
        written_moved_ |= a.param_data != entry.last_param || a.momentum_data != entry.last_momentum;
        grads_moved_ |= a.grad_data != entry.last_grad;
        any_staged_ |= entry.staged();
        void** columns = target->packer.add_row(entry.length, table_group, entry.combination, first_step);
        columns[0] = a.param_data;
        columns[1] = a.grad_data;
        columns[2] = a.momentum_data;
      }
    }
  }
  if (to_judge) return py::make_tuple("judge", to_judge);
  if (scalars_needed) return py::make_tuple("scalars");
  return py::none();
}

void Plan::admit(int64_t g, int64_t i, bool kernel, py::object new_buffer) {
  if (busy_) throw std::runtime_error("step() is already running on this optimizer in another thread");
  Entry& e = groups_.at(g).entries.at(i);
  e.new_buffer.set(nullptr);
  if (!kernel) {
    e.path = Path::Elsewhere;
    e.round = round_;
    written_moved_ = written_moved_ || e.last_param != nullptr;
    e.last_param = nullptr;
    return;
  }
  const at::Tensor& param = THPVariable_Unpack(e.param.get());
  const at::Tensor* gradient_pointer = gradient_of(param);
  if (gradient_pointer == nullptr || !gradient_pointer->defined()) throw std::logic_error("admit() without a gradient");
  const at::Tensor& grad = *gradient_pointer;
  e.first_step = !new_buffer.is_none();
  if (e.first_step) e.new_buffer.set(new_buffer.ptr());
  e.momentum = groups_[g].reader.values().momentum != 0;
  const at::Tensor* local_param = local_tensor(e.param.get());
  const at::Tensor* local_grad = local_gradient(grad);
  const at::Tensor* momentum = e.momentum ? momentum_of(e) : local_param;
  TORCH_INTERNAL_ASSERT(local_param && local_grad && momentum, "admit() of a parameter the kernel cannot take");
  const auto p = format_of(local_param->scalar_type()), d = format_of(local_grad->scalar_type()),
             m = format_of(momentum->scalar_type());
  const int combination = p && d && m ? find_combination(*p, *d, *m) : -1;
  TORCH_INTERNAL_ASSERT(combination >= 0, "admit() of an unsupported storage combination");
  e.combination = static_cast<uint8_t>(combination);
  e.target = target_of(local_param->device());
  e.is_dtensor = local_param != &param;
  e.length = local_param->numel() * (local_param->is_complex() ? 2 : 1);
  const auto strides = walk_strides(*local_param);
  e.stage_param = needs_staging(*local_param, strides);
  e.stage_grad = needs_staging(*local_grad, strides);
  e.stage_momentum = e.momentum && needs_staging(*momentum, strides);
  e.param_print = prints_.get(*local_param);
  e.grad_print = prints_.get(*local_grad);
  if (e.momentum) e.momentum_print = prints_.get(*momentum);
  e.path = Path::Kernel;
  written_moved_ = true;
}

uint8_t Plan::target_of(c10::Device device) {
  for (std::size_t i = 0; i < targets_.size(); ++i) {
    if (targets_[i].device == device) return static_cast<uint8_t>(i);
  }
  TORCH_INTERNAL_ASSERT(targets_.size() < 256);
  targets_.push_back(Target{device, {}, std::make_unique<cuda::Launcher>(device.index()), nullptr, {}, {}});
  targets_.back().packer.start(kMaxColumns, kLog2ChunkBytes);
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
  states_known_ = false;
  for (GroupEntry& group : groups_) {
    for (Entry& entry : group.entries) {
      entry.state.set(nullptr);
      entry.state_version = DictVersion();
      entry.new_buffer.set(nullptr);
      entry.first_step = false;
      entry.state_known = false;
    }
  }
}

void Plan::forget() {
  if (busy_) return;
  const auto groups = std::exchange(groups_, std::vector<GroupEntry>());  // goes last
  prints_.clear();
  written_.clear();
  written_moved_ = true;
}

int Plan::traverse(visitproc visit, void* arg) const {
  for (const GroupEntry& group : groups_) {
    Py_VISIT(group.dict.get());
    if (const int stop = group.reader.traverse(visit, arg)) return stop;
    for (const Entry& entry : group.entries) {
      Py_VISIT(entry.param.get());
      Py_VISIT(entry.state.get());
      Py_VISIT(entry.new_buffer.get());
    }
  }
  return 0;
}

}  // namespace fused_sgd
