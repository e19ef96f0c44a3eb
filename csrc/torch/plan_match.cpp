// The plan is brought to the optimizer's shape, every tensor is looked up, and the tables are packed.
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <cmath>

#include "plan.h"
#include "python_tensors.h"

namespace py = pybind11;

namespace fused_sgd {
namespace {

bool computed_in_double(int combination) { return kCombinations[combination].computed_in_double; }

py::error_already_set type_error(const std::string& message) {
  PyErr_SetString(PyExc_TypeError, message.c_str());
  return {};
}

py::tuple freed(Where where, Role role, PyObject* key = nullptr) {
  return py::make_tuple("freed", where.group, where.index, role_name(role, key));
}

// The tensor of an object in the state, of which is_of() says that it is still there.
FSGD_INLINE const at::Tensor* tensor_of(PyObject* object) {
  return THPVariable_CheckExact(object) ? &THPVariable_Unpack(object) : local_tensor(object);
}

}  // namespace

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
  PyObject* const* const items = PySequence_Fast_ITEMS(params);
  if (group.params.size() == size && std::equal(items, items + size, group.params.data())) return;
  if (group.entries.size() != size) {
    for (Entry& entry : group.entries) discarded_entries_.push_back(std::move(entry));
    group.entries.clear();
    group.entries.resize(size);
    written_moved_ = true;
  }
  group.params.clear();
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
  group.params.assign(items, items + size);
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
      written_moved_ = true;
    }
  }
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
  values_changed_ = false;
  for (std::size_t g = 0; g < group_count; ++g) {
    if (static_cast<std::size_t>(PyList_GET_SIZE(param_groups)) != group_count) {
      throw std::runtime_error("param_groups changed during the step");
    }
    PyObject* dict = PyList_GET_ITEM(param_groups, g);
    if (!PyDict_Check(dict)) throw type_error("param_groups[" + std::to_string(g) + "] must be a dict");
    match_group(g, dict);
    GroupEntry& group = groups_[g];
    const GroupReader::Outcome outcome = group.reader.read(group.dict.get());
    values_changed_ = values_changed_ || outcome != GroupReader::kSame;
    if (outcome == GroupReader::kPathChanged) {
      for (Entry& entry : group.entries) entry.path = Path::Unjudged;
      written_moved_ = true;
    }
    if (const Key key = group.reader.invalid(); key != kKeyCount) return py::make_tuple("invalid", g, kKeyNames[key]);
    const GroupReader& first = groups_[0].reader;
    if (group.reader.max_grad_norm() != first.max_grad_norm()) return py::make_tuple("differ", g, "max_grad_norm");
    if (group.reader.skip_nonfinite() != first.skip_nonfinite()) return py::make_tuple("differ", g, "skip_nonfinite");
  }
  max_grad_norm_ = groups_.empty() ? 0 : groups_[0].reader.max_grad_norm();
  skip_nonfinite_ = !groups_.empty() && groups_[0].reader.skip_nonfinite();
  if (!states_known_) find_states(state);
  return py::none();
}

// Finds the tensors of a parameter's state: those in its dict, or about to be put there. False if one is missing.
bool Plan::find_state_tensors(Entry& entry, Active& active) {
  if (entry.state_count == 0) return true;
  if (entry.state.get() == nullptr || !entry.state_version.is_of(entry.state.get())) look_up_states(entry);
  for (int k = 0; k < entry.state_count; ++k) {
    PyObject* object = entry.states[k].object;
    if (object == nullptr) return false;
    active.states[k] = tensor_of(object);
    if (active.states[k] == nullptr) return false;
  }
  return true;
}

void Plan::look_up_states(Entry& entry) {
  PyObject* inner = entry.state.get();
  entry.any_new = false;
  for (int k = 0; k < entry.state_count; ++k) {
    StateTensor& tensor = entry.states[k];
    tensor.object = inner == nullptr ? nullptr : PyDict_GetItemWithError(inner, tensor.key);
    if (tensor.object == nullptr && PyErr_Occurred()) throw py::error_already_set();
    if (tensor.object == Py_None) tensor.object = nullptr;
    if (tensor.object == nullptr && entry.new_states.get() != nullptr && entry.new_round == round_) {
      tensor.object = PyDict_GetItemWithError(entry.new_states.get(), tensor.key);
      if (tensor.object == nullptr && PyErr_Occurred()) throw py::error_already_set();
      entry.any_new = entry.any_new || tensor.object != nullptr;
    }
    if (tensor.object != nullptr && !THPVariable_Check(tensor.object)) tensor.object = nullptr;
  }
  entry.state_version = {};
  if (inner != nullptr && !entry.any_new) entry.state_version.take(inner);
}

// Whether what was judged of a parameter is still true. Finds the tensors the kernel would walk.
bool Plan::holds(Entry& entry, Active& active, const at::Tensor& grad, bool momentum) {
  if (entry.path == Path::Unjudged) return false;
  if (entry.path == Path::Elsewhere) return entry.round == round_;
  if (entry.momentum != momentum) return false;
  active.param = entry.is_dtensor ? local_tensor(entry.param.get()) : &THPVariable_Unpack(entry.param.get());
  if (active.param == nullptr || !entry.param_print->matches(*active.param->unsafeGetTensorImpl())) return false;
  const auto here = [&] { return entry.param_print->locate(*active.param->unsafeGetTensorImpl(), true); };
  if (entry.is_copy && here() != entry.home) return false;
  active.grad = local_gradient(grad);
  if (active.grad == nullptr || !entry.grad_print->matches(*active.grad->unsafeGetTensorImpl())) return false;
  if (!find_state_tensors(entry, active)) return false;
  for (int k = 0; k < entry.state_count; ++k) {
    if (!entry.states[k].print->matches(*active.states[k]->unsafeGetTensorImpl())) return false;
  }
  // Fingerprints tell a GPU from a CPU, not one GPU from another.
  if (entry.target == 0) return true;
  const c10::Device device = targets_[entry.target].device;
  for (int k = 0; k < entry.state_count; ++k) {
    if (active.states[k]->device() != device) return false;
  }
  return active.param->device() == device && active.grad->device() == device;
}

// Where the memory of a parameter's tensors is. None, or that one was freed.
py::object Plan::locate(Active& a) {
  Entry& e = *a.entry;
  a.param_data = e.param_print->locate(*a.param->unsafeGetTensorImpl(), true);
  a.grad_data = e.grad_print->locate(*a.grad->unsafeGetTensorImpl(), false);
  if (a.param_data == nullptr) return freed(e.where, Role::Parameter);
  if (a.grad_data == nullptr) return freed(e.where, Role::Gradient);
  written_moved_ |= a.param_data != e.last_param;
  grads_moved_ |= a.grad_data != e.last_grad;
  for (int k = 0; k < e.state_count; ++k) {
    a.state_data[k] = e.states[k].print->locate(*a.states[k]->unsafeGetTensorImpl(), true);
    if (a.state_data[k] == nullptr) return freed(e.where, Role::State, e.states[k].key);
    written_moved_ |= a.state_data[k] != e.states[k].last;
  }
  return py::none();
}

// Puts a group's hyperparameters into a target's table; *table_group becomes their number.
py::object Plan::place(GroupEntry& group, std::size_t number, uint8_t target, uint32_t* table_group) {
  const Group values =
      group.reader.has_addresses() ? group.reader.values_for(targets_[target].device) : group.reader.values();
  if (values.lr_source == Source::Value && std::isnan(values.lr)) return py::make_tuple("invalid", number, "lr");
  if (values.weight_decay_source == Source::Value && std::isnan(values.weight_decay)) {
    return py::make_tuple("invalid", number, "weight_decay");
  }
  *table_group = targets_[target].packer.add_group(values);
  group.placed.emplace_back(target, *table_group);
  return py::none();
}

// Looks at everything the step will touch, and packs the table. Writes to no tensor and no state.
py::object Plan::scan() {
  active_.clear();
  idle_.clear();
  elsewhere_.clear();
  std::size_t columns = 0;
  for (const GroupEntry& group : groups_) {
    for (const Entry& entry : group.entries) {
      columns = std::max<std::size_t>(columns, entry.grad_column + 1u);
      for (int k = 0; k < entry.state_count; ++k) columns = std::max<std::size_t>(columns, entry.states[k].column + 1u);
    }
  }
  for (Target& target : targets_) target.packer.start(static_cast<int>(columns));
  grads_moved_ = any_staged_ = any_new_ = any_copies_ = repeats_ = false;
  bool simple = true;  // enough for plan_steady.cpp
  py::object to_judge, written;
  for (std::size_t g = 0; g < groups_.size(); ++g) {
    GroupEntry& group = groups_[g];
    int target = -1;  // the last parameter's
    uint32_t table_group = 0;
    group.placed.clear();
    const bool momentum = group.momentum = group.reader.values().momentum != 0;
    const Key too_large = group.reader.too_large();

    for (std::size_t i = 0; i < group.entries.size(); ++i) {
      Entry& entry = group.entries[i];
      // A lazy module's parameter changes its class when it gets its shape.
      if (entry.is_subclass) entry.is_subclass = local_tensor(entry.param.get()) == nullptr;
      const at::Tensor* grad =
          entry.is_subclass ? python_gradient(entry.param.get()) : gradient_of(THPVariable_Unpack(entry.param.get()));
      if (grad == nullptr || !grad->defined()) {
        written_moved_ = written_moved_ || entry.last_param != nullptr;
        entry.last_param = nullptr;
        idle_.push_back(&entry);
        simple = simple && !entry.is_subclass;
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
      if (entry.written_by_others(*a.param->unsafeGetTensorImpl())) {
        if (!written) written = py::list();
        written.cast<py::list>().append(py::make_tuple(g, i));
      }
      simple = simple && !entry.is_dtensor && !entry.staged();
      if (too_large != kKeyCount && !computed_in_double(entry.combination)) {
        return py::make_tuple("too large", g, kKeyNames[too_large], i);
      }
      any_new_ |= entry.any_new;
      any_copies_ |= entry.is_copy;
      if (target != entry.target) {
        target = entry.target;
        if (py::object obstacle = place(group, g, entry.target, &table_group); !obstacle.is_none()) return obstacle;
      }
      if (entry.length != 0) {
        if (py::object obstacle = locate(a); !obstacle.is_none()) return obstacle;
        any_staged_ |= entry.staged();
        void** row = targets_[entry.target].packer.add_row(entry.length, table_group, entry.combination);
        for (std::size_t column = 0; column < columns; ++column) row[column] = nullptr;
        row[0] = a.param_data;
        row[entry.grad_column] = a.grad_data;
        for (int k = 0; k < entry.state_count; ++k) row[entry.states[k].column] = a.state_data[k];
      }
    }
  }
  if (written) return py::make_tuple("written", written);  // first: what is judged is for the call that follows at once
  if (to_judge) return py::make_tuple("judge", to_judge);
  std::vector<uint32_t> rows(targets_.size(), 0);
  for (Active& a : active_) {
    if (a.entry->length != 0) a.row = targets_[a.entry->target].packer.columns(rows[a.entry->target]++);
  }
  simple_ = simple && elsewhere_.empty() && !any_new_;
  return py::none();
}

}  // namespace fused_sgd
