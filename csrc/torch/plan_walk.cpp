// The second half of a step: from a settled table to changed memory.
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/python_variable.h>

#include "../cpu/walk.h"
#include "plan.h"
#include "python_tensors.h"

namespace py = pybind11;

namespace fused_sgd {
namespace {

// Below this much work a second thread costs more than it gives. A tensor counts for the elements that could be done
// while its row is looked up.
constexpr int64_t kSerialElements = 32768;
constexpr int64_t kElementsARow = 64;
// From here on the GIL is released. Less work is done in a small part of the 5 ms for which Python itself lets a thread
// keep it, and holding on to every tensor, as must be done without it, would take longer than the work.
constexpr int64_t kReleaseElements = 1 << 20;

py::tuple overlap(const std::pair<Range, Range>& conflict) {
  const auto side = [](const Range& r) { return py::make_tuple(r.owner.group, r.owner.index, role_name(r.role)); };
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
  std::vector<uint32_t> rows(targets_.size(), 0);
  for (const Active& a : active_) {
    const Entry& e = *a.entry;
    if (e.length == 0) continue;
    void** columns = targets_[e.target].packer.columns(rows[e.target]++);
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
  installed_.clear();
  installed_.reserve(active_.size());
  for (const Active& a : active_) {
    Entry& entry = *a.entry;
    PyObject* buffer = entry.new_buffer.get();
    if (!entry.first_step || buffer == nullptr) continue;
    if (PyObject* inner = entry.state.get(); inner != nullptr) {
      if (PyDict_SetItem(inner, momentum_key(), buffer) != 0) throw py::error_already_set();
    } else {
      const py::dict fresh;
      if (PyDict_SetItem(fresh.ptr(), momentum_key(), buffer) != 0) throw py::error_already_set();
      if (PyDict_SetItem(state, entry.param.get(), fresh.ptr()) != 0) throw py::error_already_set();
      entry.state.set(fresh.ptr());
    }
    installed_.push_back(&entry);
  }
}

// After an error. (The one that is being handled stays as it is.)
void Plan::remove_new_buffers(PyObject* state) {
  if (!any_new_buffer_) return;
  const py::error_scope keep;
  for (Entry* entry : installed_) {
    if (PyDict_DelItem(entry->state.get(), momentum_key()) != 0) PyErr_Clear();
    const bool empty = PyDict_GET_SIZE(entry->state.get()) == 0;
    if (empty && PyDict_DelItem(state, entry->param.get()) != 0) PyErr_Clear();
  }
  installed_.clear();
  forget_when_done_ = true;
}

// Everything about the GPUs that can fail, before the first write.
void Plan::prepare_launches() {
  const at::NoGradGuard no_grad;
  for (Target& target : targets_) {
    if (target.launcher == nullptr || target.packer.row_count() == 0) continue;
    target.stream = current_stream(target.device);
    const auto scalar = [&](const at::Tensor& given) {
      const bool as_it_is = !given.defined() || (given.device() == target.device && given.scalar_type() == at::kFloat);
      return as_it_is ? given : given.to(target.device, at::kFloat, /*non_blocking=*/true);
    };
    target.grad_scale = scalar(gpu_grad_scale_);
    target.found_inf = scalar(gpu_found_inf_);
    target.launcher->prepare(target.packer, target.stream);
  }
}

void Plan::launch() {
  for (Target& target : targets_) {
    if (target.launcher == nullptr || target.packer.row_count() == 0) continue;
    cuda::Scalars scalars;
    if (target.grad_scale.defined()) scalars.grad_scale = target.grad_scale.const_data_ptr<float>();
    if (target.found_inf.defined()) scalars.found_inf = target.found_inf.const_data_ptr<float>();
    scalars.grad_scale_value = grad_scale_;
    scalars.has_grad_scale_value = has_grad_scale_;
    target.launcher->launch(target.packer, scalars, target.stream);
    target.grad_scale = target.found_inf = at::Tensor();
  }
}

void Plan::walk() {
  const TablePacker& packer = targets_[0].packer;
  const Table table = packer.table(has_grad_scale_ ? &grad_scale_ : nullptr);
  const cpu::Walk walk = cpu::instruction_set().walk;
  const uint32_t chunks = table.chunk_count();
  const int64_t work = packer.elements() + kElementsARow * table.row_count;
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
  const py::gil_scoped_release no_gil;
  run();
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
  }
  if (!written_moved_ && !grads_moved_ && !any_new_buffer_) return;
  for (const Active& a : active_) {
    a.entry->new_buffer.set(nullptr);
    a.entry->first_step = false;
    a.entry->last_param = a.param_data;
    a.entry->last_grad = a.grad_data;
    a.entry->last_momentum = a.momentum_data;
  }
  written_moved_ = false;
}

}  // namespace fused_sgd
