// The first pass, where a step must see every gradient before it writes: to clip by the global norm, to skip where a
// gradient is not finite, or for the trust ratios of LARS.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/utils/pybind.h>

#include <atomic>

#include "../cpu/walk.h"
#include "plan.h"
#include "threads.h"

namespace py = pybind11;

namespace fused_sgd {
namespace {

at::Tensor doubles(const double* data, int64_t count, c10::Device device) {
  return at::from_blob(const_cast<double*>(data), {count}, at::TensorOptions().dtype(at::kDouble).device(device));
}

}  // namespace

cuda::Norms Plan::norms_needed() const {
  for (const GroupEntry& group : groups_) {
    if ((group.reader.values().lars & kLars) != 0) return cuda::Norms::GradientsAndParameters;
  }
  return max_grad_norm_ != 0 || (skip_nonfinite_ && !found_inf_known_) ? cuda::Norms::Gradients : cuda::Norms::None;
}

// Whether each tensor's update needs its own norms alone.
bool Plan::norms_are_local() const { return max_grad_norm_ == 0 && !skip_nonfinite_; }

// Room for the sums of the CPU's table.
void Plan::start_sums() {
  const Table table = targets_[0].packer.table();
  const std::size_t chunks = table.chunk_count();
  if (grad_squares_.size() < chunks) grad_squares_.resize(chunks);
  const bool params = norms_ == cuda::Norms::GradientsAndParameters;
  if (params && param_squares_.size() < chunks) param_squares_.resize(chunks);
  if (row_squares_.size() < 2 * std::size_t{table.row_count}) row_squares_.resize(2 * std::size_t{table.row_count});
}

// Null where only gradients are measured.
double* Plan::param_squares() {
  return norms_ == cuda::Norms::GradientsAndParameters ? param_squares_.data() : nullptr;
}

// Sums the squares of all of the CPU's table.
void Plan::measure_on_cpu() {
  start_sums();
  const Table table = targets_[0].packer.table(targets_[0].scalars);
  const auto measure = cpu::instruction_set().measure;
  std::atomic<bool> nonfinite = false;
  in_parts(threads_for(walk_work()), [&](const Parts& parts) {
    const auto [begin, end] = parts.of(0u, table.chunk_count());
    if (measure(table, begin, end, grad_squares_.data(), param_squares())) nonfinite = true;
  });
  add_up_rows(table, 0, table.row_count, grad_squares_.data(), param_squares(), row_squares_.data());
  know_totals(table, nonfinite);
}

void Plan::know_totals(const Table& table, bool nonfinite) {
  totals_ = {add_up_total(table, row_squares_.data()), nonfinite ? 1.0 : 0.0};
  totals_known_ = true;
}

void Plan::measure_on_gpus() {
  on_gpus([&](Target& target) {
    target.launcher->measure(target.packer, target.scalars, has_grad_scale_ ? &grad_scale_ : nullptr, target.stream);
  });
  totals_known_ = true;
}

at::Tensor Plan::totals_of(const Target& target) const {
  const double* data = target.launcher == nullptr ? totals_.data() : target.launcher->totals();
  return doubles(data, 2, target.device);
}

at::Tensor Plan::row_squares_of(const Target& target) const {
  const double* data = target.launcher == nullptr ? row_squares_.data() : target.launcher->row_squares();
  return doubles(data, 2 * int64_t{target.packer.row_count()}, target.device);
}

// Adds up what the devices, the parameters that no kernel takes, and other processes found; all of them learn the sum.
// Where there is one device alone, there is nothing to do.
void Plan::combine(PyObject* reduce, PyObject* elsewhere) {
  const at::NoGradGuard no_grad;
  std::vector<const Target*> parts;
  for (const Target& target : targets_) {
    if (target.packer.row_count() != 0) parts.push_back(&target);
  }
  const bool alone = parts.size() == 1 && reduce == Py_None && elsewhere == Py_None;
  if (alone) return;
  const bool none = parts.empty();
  if (none) {
    totals_ = {};
    totals_known_ = true;
    parts.push_back(&targets_[0]);
  }
  const c10::Device device = parts.back()->device;  // a GPU, if there is one
  totals_device_ = none ? targets_.back().device : device;
  at::Tensor totals = at::zeros({2}, at::TensorOptions().dtype(at::kDouble).device(device));
  for (const Target* part : parts) totals.add_(totals_of(*part).to(device));
  if (elsewhere != Py_None) {
    const auto found = py::cast<at::Tensor>(py::handle(elsewhere));
    if (!totals_device_.is_cuda()) totals_device_ = found.device();
    totals.add_(found.to(device, at::kDouble));
  }
  if (reduce != Py_None) {
    // A process may hold no element of a tensor that others hold some of: then it has no row for it.
    std::vector<at::Tensor> sums = {totals};
    const bool rows = norms_ == cuda::Norms::GradientsAndParameters;
    TORCH_CHECK(!rows || (parts.size() == 1 && elsewhere == Py_None),
                "FusedLARS with shards in several processes needs all parameters on one device, and a kernel for each");
    std::vector<int64_t> with_row;
    if (rows) {
      for (std::size_t i = 0; i < active_.size(); ++i) {
        if (active_[i].row != nullptr) with_row.push_back(static_cast<int64_t>(i));
      }
    }
    const at::Tensor index = at::tensor(with_row, at::kLong).to(device);
    at::Tensor squares = at::zeros({static_cast<int64_t>(rows ? active_.size() : 0), 2}, totals.options());
    if (!with_row.empty()) squares.index_copy_(0, index, row_squares_of(*parts[0]).view({-1, 2}));
    const at::Tensor all = at::cat({totals, squares.flatten()});
    py::reinterpret_borrow<py::object>(reduce)(all);
    totals = all.narrow(0, 0, 2);
    if (!with_row.empty()) {
      row_squares_of(*parts[0]).copy_(all.narrow(0, 2, all.numel() - 2).view({-1, 2}).index_select(0, index).flatten());
    }
  }
  for (const Target* part : parts) totals_of(*part).copy_(totals);
}

// Waits for the GPU, if the total is there.
bool Plan::nonfinite_was_found() const {
  for (const Target& target : targets_) {
    if (target.launcher == nullptr && (target.packer.row_count() != 0 || !any_on_gpu())) return totals_[1] != 0;
    if (target.launcher != nullptr && target.packer.row_count() != 0) return totals_of(target)[1].item<double>() != 0;
  }
  return false;
}

py::object Plan::totals() const {
  if (!tells_totals_) return py::none();
  for (const Target& target : targets_) {
    if (target.launcher != nullptr && target.packer.row_count() != 0) return py::cast(totals_of(target).clone());
  }
  return py::cast(totals_of(targets_[0]).to(totals_device_, at::kDouble, /*non_blocking=*/false, /*copy=*/true));
}

py::list Plan::row_squares() const {
  py::list list;
  if (!tells_rows_) return list;
  std::vector<at::Tensor> squares;
  for (const Target& target : targets_) {
    squares.push_back(target.packer.row_count() == 0 ? at::Tensor() : row_squares_of(target).clone().view({-1, 2}));
  }
  std::vector<int64_t> rows(targets_.size(), 0);
  std::vector<py::dict> options;
  for (const GroupEntry& group : groups_) options.push_back(group.reader.trust_options());
  for (const Active& a : active_) {
    if (a.row == nullptr) continue;
    const auto [group, index] = a.entry->where;
    const std::size_t target = a.entry->target;
    const at::Tensor found = squares[target][rows[target]++];
    if ((groups_[group].reader.values().lars & kLars) == 0) continue;
    const auto param = py::reinterpret_borrow<py::object>(a.entry->param.get());
    list.append(py::make_tuple(group, index, param, found, max_grad_norm_, options[group]));
  }
  return list;
}

std::vector<at::Tensor> Plan::skipped_steps() const {
  std::vector<at::Tensor> counts;
  for (const Target& target : targets_) {
    if (target.launcher == nullptr || target.launcher->skipped_steps() == nullptr) continue;
    const auto options = at::TensorOptions().dtype(at::kLong).device(target.device);
    counts.push_back(at::from_blob(target.launcher->skipped_steps(), {}, options).clone());
  }
  return counts;
}

}  // namespace fused_sgd
