#include "plan.h"

#include <ATen/Parallel.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/variable.h>

#include "../cpu/walk.h"

namespace py = pybind11;

namespace fused_sgd {
namespace {

// One chunk of fp32 is 1024 elements: fine enough to split evenly over threads, coarse enough to cost nothing.
constexpr uint32_t kLog2ChunkBytes = 12;
// Below this much work a second thread costs more than it gives. A tensor counts for the elements that could be done
// while its row is looked up.
constexpr int64_t kSerialElements = 32768;
constexpr int64_t kElementsARow = 64;
// From here on the GIL is released. Less work is done in a small part of the 5 ms for which Python itself lets a thread
// keep it, and holding on to every tensor, as must be done without it, would take longer than the work.
constexpr int64_t kReleaseElements = 1 << 20;

PyObject* momentum_key() {
  static PyObject* key = interned("momentum_buffer");
  return key;
}

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

// The tensor whose memory `object` stands for: itself, or a DTensor's local shard. Null for any other subclass.
const at::Tensor* local_tensor(PyObject* object) {
  if (THPVariable_CheckExact(object)) return &THPVariable_Unpack(object);
  if (Py_TYPE(object) != dtensor_type()) return nullptr;
  static PyObject* name = interned("_local_tensor");
  const py::object local = py::reinterpret_steal<py::object>(PyObject_GetAttr(object, name));
  if (!local) throw py::error_already_set();
  return THPVariable_CheckExact(local.ptr()) ? &THPVariable_Unpack(local.ptr()) : nullptr;
}

// A tensor's gradient, by reference; null or undefined when it has none. (at::Tensor::grad() would warn for
// non-leaves.)
const at::Tensor* gradient_of(const at::Tensor& tensor) {
  const c10::AutogradMetaInterface* meta = tensor.unsafeGetTensorImpl()->autograd_meta();
  return meta == nullptr ? nullptr : &static_cast<const torch::autograd::AutogradMeta*>(meta)->grad_;
}

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

const char* role_name(Role role) {
  switch (role) {
    case Role::Parameter:
      return "parameter";
    case Role::Gradient:
      return "gradient";
    default:
      return "momentum buffer";
  }
}

py::tuple freed(Where where, Role role) { return py::make_tuple("freed", where.group, where.index, role_name(role)); }

py::tuple overlap(const std::pair<Range, Range>& conflict) {
  const auto side = [](const Range& r) { return py::make_tuple(r.owner.group, r.owner.index, role_name(r.role)); };
  return py::make_tuple("overlap", side(conflict.first), side(conflict.second));
}

}  // namespace

py::object Plan::step(PyObject* param_groups, PyObject* state, PyObject* grad_scale) {
  if (busy_) throw std::runtime_error("step() is already running on this optimizer in another thread");
  if (!watches(state)) return py::make_tuple("state");
  if (c10::impl::TorchDispatchModeTLS::any_modes_set()) return py::make_tuple("mode");
  has_grad_scale_ = grad_scale != Py_None;
  grad_scale_ = has_grad_scale_ ? static_cast<float>(as_double(grad_scale)) : 1;

  if (py::object obstacle = scan(param_groups, state); !obstacle.is_none()) return obstacle;
  if (written_moved_ || grads_moved_) {
    if (py::object obstacle = check_overlap(); !obstacle.is_none()) return obstacle;
  }
  if (any_staged_) stage();
  if (any_new_buffer_) install_new_buffers(state);
  walk();
  commit();
  if (elsewhere_.empty()) return py::none();
  py::list entries;
  for (const Where& where : elsewhere_) {
    entries.append(py::make_tuple(where.group, where.index));
    groups_[where.group].entries[where.index].path = Path::Unjudged;
  }
  return py::make_tuple("elsewhere", entries);
}

// Brings groups_[number] to the shape of the optimizer's group.
void Plan::match_group(std::size_t number, PyObject* dict) {
  GroupEntry& group = groups_[number];
  if (group.dict.get() != dict) {
    group = GroupEntry();
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
    entry = Entry();
    entry.param.set(param);
    entry.where = Where{static_cast<uint32_t>(number), static_cast<uint32_t>(i)};
    written_moved_ = true;
  }
}

// The parameter's momentum buffer: the one in its state, or the one about to be installed; null when there is none.
FSGD_INLINE const at::Tensor* Plan::momentum_of(Entry& entry, PyObject* state) {
  if (entry.state.get() != nullptr && entry.state_version.is_of(entry.state.get())) {
    PyObject* buffer = entry.momentum_object;
    return THPVariable_CheckExact(buffer) ? &THPVariable_Unpack(buffer) : local_tensor(buffer);
  }
  return find_momentum(entry, state);
}

const at::Tensor* Plan::find_momentum(Entry& entry, PyObject* state) {
  if (!entry.state_known) {
    PyObject* inner = PyDict_GetItemWithError(state, entry.param.get());
    if (inner == nullptr && PyErr_Occurred()) throw py::error_already_set();
    entry.state.set(inner != nullptr && PyDict_Check(inner) ? inner : nullptr);
    entry.state_known = true;
  }
  PyObject* inner = entry.state.get();
  PyObject* buffer = inner == nullptr ? nullptr : PyDict_GetItemWithError(inner, momentum_key());
  if (buffer == nullptr && PyErr_Occurred()) throw py::error_already_set();
  if (buffer == nullptr || buffer == Py_None) {
    buffer = entry.new_buffer.get();
  } else {
    entry.new_buffer.set(nullptr);
    if (!THPVariable_Check(buffer)) return nullptr;
    entry.state_version.take(inner);
    entry.momentum_object = buffer;
  }
  return buffer == nullptr ? nullptr : local_tensor(buffer);
}

// Whether what was judged of a parameter is still true. Finds the tensors the kernel would walk.
FSGD_INLINE bool Plan::holds(Entry& entry, Active& active, const at::Tensor& grad, bool momentum, PyObject* state) {
  if (entry.path == Path::Unjudged) return false;
  if (entry.path == Path::Elsewhere) return true;
  if (entry.momentum != momentum) return false;
  active.param = entry.is_dtensor ? local_tensor(entry.param.get()) : &THPVariable_Unpack(entry.param.get());
  if (active.param == nullptr || !entry.param_print->matches(*active.param->unsafeGetTensorImpl())) return false;
  active.grad = local_gradient(grad);
  if (active.grad == nullptr || !entry.grad_print->matches(*active.grad->unsafeGetTensorImpl())) return false;
  active.momentum = momentum ? momentum_of(entry, state) : nullptr;
  return !momentum ||
         (active.momentum != nullptr && entry.momentum_print->matches(*active.momentum->unsafeGetTensorImpl()));
}

// Looks at everything the step will touch, and packs the table. Writes to no tensor and no state.
py::object Plan::scan(PyObject* param_groups, PyObject* state) {
  active_.clear();
  elsewhere_.clear();
  packer_.start(kMaxColumns, kLog2ChunkBytes);
  grads_moved_ = any_staged_ = any_new_buffer_ = false;
  py::object to_judge;
  const auto group_count = static_cast<std::size_t>(PyList_GET_SIZE(param_groups));
  if (groups_.size() != group_count) {
    groups_.resize(group_count);
    written_moved_ = true;
  }
  for (std::size_t g = 0; g < group_count; ++g) {
    match_group(g, PyList_GET_ITEM(param_groups, g));
    GroupEntry& group = groups_[g];
    if (group.reader.read(group.dict.get()) == GroupReader::kPathChanged) {
      for (Entry& entry : group.entries) entry.path = Path::Unjudged;
    }
    if (const Key key = group.reader.invalid(); key != kKeyCount) return py::make_tuple("invalid", g, kKeyNames[key]);
    const uint32_t table_group = packer_.add_group(group.reader.values());
    const bool momentum = group.reader.values().momentum != 0;

    for (std::size_t i = 0; i < group.entries.size(); ++i) {
      Entry& entry = group.entries[i];
      const at::Tensor* grad = gradient_of(THPVariable_Unpack(entry.param.get()));
      if (grad == nullptr || !grad->defined()) {
        written_moved_ = written_moved_ || entry.last_param != nullptr;
        entry.last_param = nullptr;
        continue;
      }
      Active& a = active_.emplace_back(&entry);
      if (!holds(entry, a, *grad, momentum, state)) {
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
      any_new_buffer_ |= entry.new_buffer.get() != nullptr;
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
        const bool first_step = entry.new_buffer.get() != nullptr;
        void** columns = packer_.add_row(entry.length, table_group, entry.combination, first_step);
        columns[0] = a.param_data;
        columns[1] = a.grad_data;
        columns[2] = a.momentum_data;
      }
    }
  }
  return to_judge ? py::make_tuple("judge", to_judge) : py::object(py::none());
}

// Whether memory that the step writes is shared with anything else it touches. Called when something moved; when only
// gradients did, a few comparisons each settle it.
py::object Plan::check_overlap() {
  if (written_moved_) {
    written_.clear();
    for (const Active& a : active_) {
      if (a.param_data == nullptr) continue;
      const Entry& e = *a.entry;
      written_.add(make_range(*a.param, a.param_data, e.param_print->required_bytes, Role::Parameter, e.where));
      if (a.momentum_data != nullptr) {
        written_.add(
            make_range(*a.momentum, a.momentum_data, e.momentum_print->required_bytes, Role::Momentum, e.where));
      }
    }
    if (const auto conflict = written_.seal()) return overlap(*conflict);
  }
  for (const Active& a : active_) {
    if (a.grad_data == nullptr || (!written_moved_ && a.grad_data == a.entry->last_grad)) continue;
    const int64_t bytes = a.entry->grad_print->required_bytes;
    if (written_.clear_of(a.grad_data, a.grad_data + bytes)) continue;
    if (const auto conflict =
            written_.overlapping(make_range(*a.grad, a.grad_data, bytes, Role::Gradient, a.entry->where))) {
      return overlap(*conflict);
    }
  }
  return py::none();
}

// Tensors in other strides than the walk's are walked through a copy: their rows' pointers become the copies'.
void Plan::stage() {
  copies_.clear();
  uint32_t row = 0;
  for (const Active& a : active_) {
    const Entry& e = *a.entry;
    if (e.length == 0) continue;
    void** columns = packer_.columns(row++);
    if (!e.staged()) continue;
    const auto strides = walk_strides(*a.param);
    const auto through_copy = [&](bool needed, const at::Tensor* tensor, void*& data) {
      if (!needed) return;
      copies_.push_back(staged(*tensor, strides));
      data = copies_.back().mutable_data_ptr();
    };
    through_copy(e.stage_grad, a.grad, columns[1]);
    through_copy(e.stage_param, a.param, columns[0]);
    through_copy(e.stage_momentum, a.momentum, columns[2]);
  }
}

// New momentum buffers become visible, all of them or none. The outer dict is written behind State's back: what it
// would report to this plan, this plan knows.
void Plan::install_new_buffers(PyObject* state) {
  std::size_t done = 0;
  try {
    for (; done < active_.size(); ++done) {
      Entry& entry = *active_[done].entry;
      PyObject* buffer = entry.new_buffer.get();
      if (buffer == nullptr) continue;
      if (entry.state.get() == nullptr) {
        const py::dict inner;
        if (PyDict_SetItem(state, entry.param.get(), inner.ptr()) != 0) throw py::error_already_set();
        entry.state.set(inner.ptr());
      }
      if (PyDict_SetItem(entry.state.get(), momentum_key(), buffer) != 0) throw py::error_already_set();
    }
  } catch (py::error_already_set&) {
    for (std::size_t i = 0; i < done; ++i) {
      const Entry& entry = *active_[i].entry;
      if (entry.new_buffer.get() != nullptr) PyDict_DelItem(entry.state.get(), momentum_key());
    }
    PyErr_Clear();
    throw;
  }
}

void Plan::walk() {
  const Table table = packer_.table(has_grad_scale_ ? &grad_scale_ : nullptr);
  const cpu::Walk walk = cpu::instruction_set().walk;
  const uint32_t chunks = table.chunk_count();
  const int64_t work = packer_.elements() + kElementsARow * table.row_count;
  const int64_t threads = std::clamp<int64_t>(2 * work / kSerialElements, 1, at::get_num_threads());
  const auto share = [&](int64_t thread) { return static_cast<uint32_t>(chunks * thread / threads); };
  const auto run = [&] {
    if (work < kSerialElements || threads == 1) return walk(table, 0, chunks);
    at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) { walk(table, share(begin), share(end)); });
  };
  if (work < kReleaseElements) return run();

  // Meanwhile another Python thread may drop a gradient or clear the state. (The plan holds the parameters.)
  held_.clear();
  for (const Active& a : active_) {
    held_.push_back(*a.grad);
    if (a.momentum != nullptr) held_.push_back(*a.momentum);
  }
  busy_ = true;
  {
    const py::gil_scoped_release no_gil;
    run();
  }
  busy_ = false;
  held_.clear();
}

// After the walk: copies go home, autograd learns what was written, and the plan remembers what it saw.
void Plan::commit() {
  for (const Active& a : active_) {
    const at::Tensor& outer = THPVariable_Unpack(a.entry->param.get());
    a.param->unsafeGetTensorImpl()->bump_version();
    if (&outer != a.param) outer.unsafeGetTensorImpl()->bump_version();  // a DTensor around it
    if (a.momentum != nullptr) a.momentum->unsafeGetTensorImpl()->bump_version();
  }
  if (any_staged_) {
    const at::NoGradGuard no_grad;
    auto copy = copies_.begin();
    for (const Active& a : active_) {
      if (a.entry->length == 0) continue;
      if (a.entry->stage_grad) ++copy;
      if (a.entry->stage_param) at::Tensor(*a.param).copy_(*copy++);
      if (a.entry->stage_momentum) at::Tensor(*a.momentum).copy_(*copy++);
    }
    copies_.clear();
  }
  if (!written_moved_ && !grads_moved_ && !any_new_buffer_) return;
  for (const Active& a : active_) {
    a.entry->new_buffer.set(nullptr);
    a.entry->last_param = a.param_data;
    a.entry->last_grad = a.grad_data;
    a.entry->last_momentum = a.momentum_data;
  }
  written_moved_ = false;
}

void Plan::admit(int64_t g, int64_t i, bool kernel, py::object new_buffer) {
  Entry& e = groups_.at(g).entries.at(i);
  e.new_buffer.set(nullptr);
  const at::Tensor& param = THPVariable_Unpack(e.param.get());
  const at::Tensor* gradient_pointer = gradient_of(param);
  if (gradient_pointer == nullptr || !gradient_pointer->defined()) throw std::logic_error("admit() without a gradient");
  const at::Tensor& grad = *gradient_pointer;
  if (!kernel) {
    e.path = Path::Elsewhere;
    written_moved_ = written_moved_ || e.last_param != nullptr;
    e.last_param = nullptr;
    return;
  }
  if (!new_buffer.is_none()) e.new_buffer.set(new_buffer.ptr());
  e.momentum = groups_[g].reader.values().momentum != 0;
  const at::Tensor* local_param = local_tensor(e.param.get());
  const at::Tensor* local_grad = local_gradient(grad);
  const at::Tensor* momentum =
      e.momentum ? momentum_of(e, py::reinterpret_borrow<py::object>(state_)().ptr()) : local_param;
  TORCH_INTERNAL_ASSERT(local_param && local_grad && momentum, "admit() of a parameter the kernel cannot take");
  const auto p = format_of(local_param->scalar_type()), d = format_of(local_grad->scalar_type()),
             m = format_of(momentum->scalar_type());
  const int combination = p && d && m ? find_combination(*p, *d, *m) : -1;
  TORCH_INTERNAL_ASSERT(combination >= 0, "admit() of an unsupported storage combination");
  e.combination = static_cast<uint8_t>(combination);
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
  for (GroupEntry& group : groups_) {
    for (Entry& entry : group.entries) {
      entry.state.set(nullptr);
      entry.state_version = DictVersion();
      entry.new_buffer.set(nullptr);
      entry.state_known = false;
    }
  }
}

void Plan::forget() {
  groups_.clear();
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
