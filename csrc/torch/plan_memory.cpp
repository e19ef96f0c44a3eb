// Memory that is shared, copied, or put into the state.
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/python_variable.h>

#include "plan.h"
#include "python_tensors.h"

namespace py = pybind11;

namespace fused_sgd {
namespace {

py::tuple overlap(const std::pair<Range, Range>& conflict) {
  const auto side = [](const Range& r) {
    return py::make_tuple(r.owner.group, r.owner.index, role_name(r.role, r.key));
  };
  return py::make_tuple("overlap", side(conflict.first), side(conflict.second));
}

}  // namespace

// Whether memory that the step writes is shared with anything else it touches. Called when something moved; when only
// gradients did, a few comparisons each settle it.
py::object Plan::check_overlap() {
  written_moved_ = written_moved_ || !elsewhere_.empty();
  if (written_moved_) {
    written_.clear();
    for (const Where& where : elsewhere_) {  // Python writes these; as far as their memory can be seen, it counts
      if (const at::Tensor* param = memory_of(local_tensor(groups_[where.group].entries[where.index].param.get()))) {
        written_.add(make_range(*param, static_cast<const char*>(param->const_data_ptr()), extent(*param),
                                Role::Parameter, where));
      }
    }
    for (const Active& a : active_) {
      if (a.param_data == nullptr) continue;
      const Entry& e = *a.entry;
      written_.add(make_range(*a.param, a.param_data, e.param_print->required_bytes, Role::Parameter, e.where));
      for (int k = 0; k < e.state_count; ++k) {
        const StateTensor& state = e.states[k];
        written_.add(
            make_range(*a.states[k], a.state_data[k], state.print->required_bytes, Role::State, e.where, state.key));
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
  for (const Where& where : elsewhere_) {
    const at::Tensor* param = memory_of(local_tensor(groups_[where.group].entries[where.index].param.get()));
    const at::Tensor* grad = param == nullptr ? nullptr : memory_of(gradient_of(*param));
    if (grad == nullptr) continue;
    const auto* data = static_cast<const char*>(grad->const_data_ptr());
    if (written_.clear_of(data, data + extent(*grad))) continue;
    if (const auto conflict = written_.overlapping(make_range(*grad, data, extent(*grad), Role::Gradient, where))) {
      return overlap(*conflict);
    }
  }
  return py::none();
}

// Tensors in other strides than the walk's are walked through a copy: their rows' pointers become the copies'.
void Plan::stage() {
  copies_.clear();
  for (const Active& a : active_) {
    const Entry& e = *a.entry;
    if (a.row == nullptr || !e.staged()) continue;
    const auto strides = walk_strides(*a.param);
    const auto through_copy = [&](bool needed, const at::Tensor* tensor, void*& data) {
      if (!needed) return;
      copies_.push_back(staged(*tensor, strides));
      data = copies_.back().mutable_data_ptr();
    };
    through_copy(e.stage_grad, a.grad, a.row[e.grad_column]);
    through_copy(e.stage_param, a.param, a.row[0]);
    for (int k = 0; k < e.state_count; ++k) {
      through_copy(e.states[k].stage, a.states[k], a.row[e.states[k].column]);
    }
  }
}

// The copies go home.
void Plan::unstage() {
  const at::NoGradGuard no_grad;
  auto copy = copies_.begin();
  for (const Active& a : active_) {
    const Entry& e = *a.entry;
    if (a.row == nullptr) continue;
    if (e.stage_grad) ++copy;
    if (e.stage_param) at::Tensor(*a.param).copy_(*copy++);
    for (int k = 0; k < e.state_count; ++k) {
      if (e.states[k].stage) at::Tensor(*a.states[k]).copy_(*copy++);
    }
  }
}

// New state tensors become visible, all of them or none. The outer dict is written behind State's back: what it would
// report to this plan, this plan knows.
void Plan::install_new_states(PyObject* state) {
  installed_.clear();
  for (const Active& a : active_) {
    Entry& entry = *a.entry;
    if (!entry.any_new) continue;
    for (int k = 0; k < entry.state_count; ++k) {
      PyObject* key = entry.states[k].key;
      PyObject* tensor = PyDict_GetItemWithError(entry.new_states.get(), key);
      if (tensor == nullptr || tensor != entry.states[k].object) continue;
      if (PyObject* inner = entry.state.get(); inner != nullptr) {
        if (PyDict_SetItem(inner, key, tensor) != 0) throw py::error_already_set();
      } else {
        const py::dict fresh;
        if (PyDict_SetItem(fresh.ptr(), key, tensor) != 0) throw py::error_already_set();
        if (PyDict_SetItem(state, entry.param.get(), fresh.ptr()) != 0) throw py::error_already_set();
        entry.state.set(fresh.ptr());
      }
      installed_.emplace_back(&entry, key);
    }
  }
}

// After an error. (The one that is being handled stays as it is.)
void Plan::remove_new_states(PyObject* state) {
  if (installed_.empty()) return;
  const py::error_scope keep;
  for (const auto& [entry, key] : installed_) {
    if (PyDict_DelItem(entry->state.get(), key) != 0) PyErr_Clear();
    const bool empty = PyDict_GET_SIZE(entry->state.get()) == 0;
    if (empty && PyDict_DelItem(state, entry->param.get()) != 0) PyErr_Clear();
  }
  installed_.clear();
  forget_when_done_ = true;
}

}  // namespace fused_sgd
