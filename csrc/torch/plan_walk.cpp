// The step itself, from a settled table to changed memory, and what comes after.
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>

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
// Where a tensor's own norms decide its update, norms and update of so many elements are walked while they are in
// cache.
constexpr int64_t kBatchElements = 1 << 18;
// Where gradients were measured just before, what was measured last may still be in cache, and is walked first: in
// pieces of so many chunks, from the last to the first.
constexpr uint32_t kPieceChunks = 64;

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

// Runs run(begin, end) over chunks [begin, end), on as many threads as `work` elements are worth; and then, on each,
// run (part, parts) of what there is to do afterwards.
void Plan::over_chunks(uint32_t begin, uint32_t end, int64_t work, c10::function_ref<void(uint32_t, uint32_t)> run,
                       c10::function_ref<void(std::size_t, std::size_t)> afterwards) {
  const int64_t chunks = int64_t{end} - begin;
  const int64_t threads = std::clamp<int64_t>(2 * work / kSerialElements, 1, at::get_num_threads());
  if (work < kSerialElements || threads == 1) {
    run(begin, end);
    return afterwards(0, 1);
  }
  const auto share = [&](int64_t thread) { return begin + static_cast<uint32_t>(chunks * thread / threads); };
  at::parallel_for(0, threads, 1, [&](int64_t from, int64_t to) {
    run(share(from), share(to));
    for (; from < to; ++from) afterwards(static_cast<std::size_t>(from), static_cast<std::size_t>(threads));
  });
}

void Plan::walk() {
  Target& target = targets_[0];
  const uint32_t rows = target.packer.row_count();
  const bool measures = norms_ == cuda::Norms::GradientsAndParameters && !totals_known_;
  const auto bump = [&](std::size_t part, std::size_t parts) {
    if (repeats_) bump_watched(watched_.size() * part / parts, watched_.size() * (part + 1) / parts);
  };
  if (rows == 0) {
    if (measures) measure_on_cpu(0, 0);
    return bump(0, 1);
  }
  const cpu::Walk walk = cpu::instruction_set().walk;
  const auto run = [&] {
    const Table table = target.packer.table(target.scalars);
    const auto walk_rows = [&](uint32_t first, uint32_t last, int64_t elements, auto afterwards) {
      const uint32_t begin = table.chunk_begin(first), end = table.row(last - 1).chunk_end;
      Table with_norms = table;
      with_norms.scalars.row_squares = row_squares_.data();
      const auto backwards = [&](uint32_t from, uint32_t to) {
        const uint32_t piece = norms_ == cuda::Norms::None ? to - from : kPieceChunks;
        for (uint32_t begin; from < to; to = begin) {
          begin = to - std::min(piece, to - from);
          walk(with_norms, begin, to);
        }
      };
      over_chunks(begin, end, elements + kElementsARow * (last - first), backwards, afterwards);
    };
    if (!measures) return walk_rows(0, rows, target.packer.elements(), bump);
    for (uint32_t first = 0, last; first < rows; first = last) {
      int64_t elements = 0;
      for (last = first; last < rows && (last == first || elements + table.row(last).length <= kBatchElements);
           ++last) {
        elements += table.row(last).length;
      }
      measure_on_cpu(first, last);
      walk_rows(first, last, elements, [](std::size_t, std::size_t) {});
    }
    bump(0, 1);
  };
  const auto count = [&] {
    if (target.packer.counts_steps()) count_steps(target.packer.table(), 0, 1);
  };
  if (target.packer.elements() < kReleaseElements) {
    run();
    return count();
  }

  // Meanwhile another Python thread may drop a gradient or clear the state. (The plan holds the parameters.)
  held_.clear();
  for (const Active& a : active_) {
    held_.push_back(*a.grad);
    for (int k = 0; k < a.entry->state_count; ++k) held_.push_back(*a.states[k]);
  }
  const py::gil_scoped_release no_gil;
  run();
  count();
}

// After the walk: copies go home, autograd learns what was written (unless walk() has told it), and the plan remembers
// what it saw.
void Plan::commit() {
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
