// The step itself, from a settled table to changed memory, and what comes after.
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <atomic>

#include "../cpu/walk.h"
#include "plan.h"
#include "python_tensors.h"
#include "threads.h"

namespace py = pybind11;

namespace fused_sgd {
namespace {

// What it takes to look up a tensor's row, in elements that could be done meanwhile.
constexpr int64_t kElementsARow = 64;
// From here on the GIL is released. Less work is done in a small part of the 5 ms for which Python itself lets a thread
// keep it, and holding on to every tensor, as must be done without it, would take longer than the work.
constexpr int64_t kReleaseElements = 1 << 20;
// Where a tensor's own norms decide its update, norms and update of so many elements are walked while they are in
// cache.
constexpr int64_t kBatchElements = 1 << 18;

// Chunks [begin, end) in pieces, the last first: that is where norms ended, and what they have read last may still be
// in cache.
void walk_backwards(const Table& table, uint32_t begin, uint32_t end) {
  constexpr uint32_t kPiece = 64;
  while (begin < end) {
    const uint32_t from = end - std::min(kPiece, end - begin);
    cpu::instruction_set().walk(table, from, end);
    end = from;
  }
}

}  // namespace

// Everything about the GPUs that can fail, before the first write.
void Plan::prepare_launches() {
  const at::NoGradGuard no_grad;
  on_gpus([&](Target& target) {
    target.stream = current_stream(target.device);
    const auto scalar = [&](const at::Tensor& given) {
      const bool as_it_is = !given.defined() || (given.device() == target.device && given.scalar_type() == at::kFloat);
      return as_it_is ? given : given.to(target.device, at::kFloat, /*non_blocking=*/true);
    };
    target.grad_scale = scalar(gpu_grad_scale_);
    target.found_inf = scalar(gpu_found_inf_);
    target.launcher->prepare(target.packer, target.stream, norms_);
    Scalars& scalars = target.scalars = Scalars{};
    if (target.grad_scale.defined()) scalars.grad_scale = target.grad_scale.const_data_ptr<float>();
    if (target.found_inf.defined()) scalars.found_inf = target.found_inf.const_data_ptr<float>();
    if (target.packer.counts_steps()) scalars.ticket = target.launcher->ticket();
    if (norms_ == cuda::Norms::None) return;
    scalars.totals = target.launcher->totals();
    scalars.row_squares = target.launcher->row_squares();
    scalars.max_grad_norm = max_grad_norm_;
    scalars.skip_nonfinite = skip_nonfinite_;
    scalars.skipped_steps = skip_nonfinite_ ? target.launcher->skipped_steps() : nullptr;
  });
}

void Plan::launch() {
  on_gpus([&](Target& target) {
    target.launcher->launch(target.packer, target.scalars, has_grad_scale_ ? &grad_scale_ : nullptr, target.stream);
    target.grad_scale = target.found_inf = at::Tensor();
  });
}

bool Plan::releases_gil() const { return targets_[0].packer.elements() >= kReleaseElements; }

// What walking the CPU's table is, for threads_for().
int64_t Plan::walk_work() const {
  const TablePacker& packer = targets_[0].packer;
  return packer.elements() + kElementsARow * packer.row_count();
}

// Parts of the CPU's table and, in a step that repeats the last one, of what is counted for autograd.
void Plan::walk_parts(const Table& table, const Parts& parts) const {
  const auto [begin, end] = parts.of(0u, table.chunk_count());
  if (norms_ == cuda::Norms::None) {
    cpu::instruction_set().walk(table, begin, end);
  } else {
    walk_backwards(table, begin, end);
  }
  if (repeats_) bump_watched(parts.of(std::size_t{0}, watched_.size()));
}

void Plan::walk_on_cpu() {
  if (norms_ == cuda::Norms::GradientsAndParameters && !totals_known_) return walk_in_batches();
  const Table table = targets_[0].packer.table(targets_[0].scalars);
  in_parts(threads_for(walk_work()), [&](const Parts& parts) { walk_parts(table, parts); });
}

// Where each tensor's own norms are all that its update waits for: norms and update of some tensors at a time, which
// are in cache.
void Plan::walk_in_batches() {
  start_sums();
  const TablePacker& packer = targets_[0].packer;
  Table table = packer.table(targets_[0].scalars);
  table.scalars.row_squares = row_squares_.data();
  const auto measure = cpu::instruction_set().measure;
  std::atomic<bool> nonfinite = false;
  const int64_t threads = threads_for(walk_work());
  Meeting meeting(threads);
  in_parts(threads, [&](const Parts& parts) {
    for (uint32_t first = 0, last; first < table.row_count; first = last) {
      int64_t elements = 0;
      for (last = first; last < table.row_count; ++last) {
        elements += table.row(last).length;
        if (last != first && elements > kBatchElements) break;
      }
      const auto [begin, end] = parts.of(table.chunk_begin(first), table.row(last - 1).chunk_end);
      if (measure(table, begin, end, grad_squares_.data(), param_squares())) nonfinite = true;
      meeting.wait(
          parts, [&] { add_up_rows(table, first, last, grad_squares_.data(), param_squares(), row_squares_.data()); });
      walk_backwards(table, begin, end);
    }
    if (repeats_) bump_watched(parts.of(std::size_t{0}, watched_.size()));
  });
  know_totals(table, nonfinite);
}

void Plan::walk() {
  if (!releases_gil()) return walk_on_cpu();
  // Meanwhile another Python thread may drop a gradient or clear the state. (The plan holds the parameters.)
  held_.clear();
  for (const Active& a : active_) {
    held_.push_back(*a.grad);
    for (int k = 0; k < a.entry->state_count; ++k) held_.push_back(*a.states[k]);
  }
  const py::gil_scoped_release no_gil;
  walk_on_cpu();
}

// After the walk: steps are counted where random bits depend on it, copies go home, autograd learns what was written
// (unless the walk has told it), and the plan remembers what it saw.
void Plan::commit() {
  const TablePacker& packer = targets_[0].packer;
  if (packer.counts_steps()) count_steps(packer.table(), 0, 1);
  if (!repeats_) {
    for (const Active& a : active_) {
      const at::Tensor& outer = THPVariable_Unpack(a.entry->param.get());
      a.param->unsafeGetTensorImpl()->bump_version();
      if (&outer != a.param) outer.unsafeGetTensorImpl()->bump_version();  // a DTensor around it
      for (int k = 0; k < a.entry->state_count; ++k) a.states[k]->unsafeGetTensorImpl()->bump_version();
    }
  }
  if (any_staged_) unstage();
  if (any_copies_) {
    for (const Active& a : active_)
      a.entry->version = a.param->unsafeGetTensorImpl()->version_counter().current_version();
  }
  if (repeats_) return;
  for (const Active& a : active_) {
    Entry& e = *a.entry;
    e.new_states.set(nullptr);
    e.any_new = false;
    e.last_param = a.param_data;
    e.last_grad = a.grad_data;
    for (int k = 0; k < e.state_count; ++k) e.states[k].last = a.state_data[k];
  }
  installed_.clear();
  written_moved_ = false;
  steady_ = simple_;
  if (steady_) watch_all();
}

}  // namespace fused_sgd
