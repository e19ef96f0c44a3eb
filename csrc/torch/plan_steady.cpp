// The steady step: is all as the last step left it, but for the gradients' addresses and the values of hyperparameters?
// Then the tables hold, and nothing else of the plan is looked at. No line of Python runs here. Where the walk is all
// that follows, the threads that look go on with it.
#include <torch/csrc/autograd/python_variable.h>

#include <atomic>

#include "plan.h"
#include "python_tensors.h"
#include "threads.h"

namespace fused_sgd {
namespace {

// What a step touches was last touched a step ago, and the caches have forgotten it. So it is called for some tensors
// before its turn: by pointers of the last step, of which a stale one costs a wasted load and no more.
constexpr std::size_t kAhead = 6;
constexpr int kLine = 64;  // bytes
// What it takes to look at a parameter, its gradient and its state, in elements that could be done meanwhile.
constexpr int64_t kElementsALook = 128;

template <class T>
FSGD_INLINE void prefetch(const T* object, int bytes) {
  for (int at = 0; at < bytes; at += kLine) __builtin_prefetch(reinterpret_cast<const char*>(object) + at);
}

}  // namespace

FSGD_INLINE void Plan::Watched::call() const {
  prefetch(impl, sizeof(c10::TensorImpl));
  prefetch(storage, kLine + 1);
}

// Its version's count stands behind a pointer in the tensor. Adding to it is atomic and waits for all loads before it,
// so neither may have to come from afar.
FSGD_INLINE void Plan::Watched::call_version() const { prefetch(&impl->version_counter(), 1); }
FSGD_INLINE void Plan::Watched::call_version_count() const {
  static_assert(sizeof(c10::VariableVersion) == sizeof(void*));
  prefetch(*reinterpret_cast<char* const*>(&impl->version_counter()), 1);
}

// Whether the tensor, which is written, is as the last step found it, in the same memory.
FSGD_INLINE bool Plan::Watched::holds(const c10::TensorImpl* now) const {
  if (now != impl || !print->matches(*now)) return false;
  if (data == nullptr) return true;
  return !is_lazy_copy(*now->unsafe_storage().unsafeGetStorageImpl()) && print->locate(*now, true) == data;
}

// After a step whose tables may hold for the next one.
void Plan::watch_all() {
  watched_.clear();
  watched_states_.clear();
  const auto watch = [](const at::Tensor& tensor, const Fingerprint* print, char* data) {
    const c10::TensorImpl* impl = tensor.unsafeGetTensorImpl();
    return Watched{impl, impl->unsafe_storage().unsafeGetStorageImpl(), print, data};
  };
  for (const Active& a : active_) {
    Entry& e = *a.entry;
    WatchedEntry& w = watched_.emplace_back();
    w.param_object = e.param.get();
    w.param = watch(*a.param, e.param_print, a.row == nullptr ? nullptr : a.param_data);
    w.grad = watch(*a.grad, e.grad_print, a.row == nullptr ? nullptr : a.grad_data);
    w.grad_slot = a.grad;
    w.grad_pointer = a.row == nullptr ? nullptr : a.row + e.grad_column;
    w.state = e.state.get();
    w.state_version = e.state_version;
    w.device_index = e.target == 0 ? -1 : targets_[e.target].device.index();
    w.first_state = static_cast<uint32_t>(watched_states_.size());
    w.state_count = e.state_count;
    w.is_copy = e.is_copy;
    for (int k = 0; k < e.state_count; ++k) {
      const Watched tensor = watch(*a.states[k], e.states[k].print, a.row == nullptr ? nullptr : a.state_data[k]);
      watched_states_.push_back({e.states[k].object, tensor});
    }
  }
}

// The groups' new values into the tables. False if they no longer share rows as they did.
bool Plan::replace_groups() {
  for (Target& target : targets_) target.packer.restart_groups();
  for (GroupEntry& group : groups_) {
    const Group& values = group.reader.values();
    if (group.reader.has_addresses() || group.momentum != (values.momentum != 0)) return false;
    if (group.reader.too_large() != kKeyCount) return false;
    for (const auto& [target, number] : group.placed) {
      if (targets_[target].packer.add_group(values) != number) return false;
    }
  }
  return true;
}

// Whether what is_steady() does not look at is as it was, so that the tables of the last step may be this one's too.
// The groups' new values are put into them, perhaps into some only: if not, scan() must follow.
bool Plan::may_be_steady() {
  if (written_moved_ || !states_known_ || (values_changed_ && !replace_groups())) return false;
  for (const Entry* entry : idle_) {
    const at::Tensor* grad = gradient_of(THPVariable_Unpack(entry->param.get()));
    if (grad != nullptr && grad->defined()) return false;
  }
  return true;
}

// After may_be_steady(): whether all tensors are as they were, but for the gradients' addresses, which are put into the
// tables. Whatever else differs is left to scan().
//
// The calling thread keeps the GIL, and others only read fields of Python's objects.
bool Plan::is_steady() {
  const auto count = static_cast<int64_t>(watched_.size());
  std::atomic<bool> all_hold = true;
  in_parts(threads_for(kElementsALook * count), [&](const Parts& parts) {
    if (!are_steady(parts.of(std::size_t{0}, watched_.size()))) all_hold = false;
  });
  if (!all_hold) return false;
  any_new_ = grads_moved_ = false;
  return steady_ = repeats_ = true;
}

// Whether between is_steady() and commit() there is only a walk on the CPU, with the GIL. Then walk_if_steady() may
// take the place of both.
bool Plan::only_walks() const {
  const bool nothing_on_gpu = !gpu_grad_scale_.defined() && !gpu_found_inf_.defined() && !any_on_gpu();
  return nothing_on_gpu && norms_needed() == cuda::Norms::None && !releases_gil();
}

// is_steady() and walk() by the same threads, which meet in between: starting them twice takes as long as looking at a
// hundred tensors. If it is false nothing was walked, and scan() must follow.
bool Plan::walk_if_steady() {
  const Table table = targets_[0].packer.table(targets_[0].scalars);
  const int64_t threads = threads_for(kElementsALook * static_cast<int64_t>(watched_.size()) + walk_work());
  std::atomic<bool> all_hold = true;
  Meeting meeting(threads);
  any_new_ = grads_moved_ = false;
  repeats_ = true;  // for walk_parts(); scan() takes it back
  in_parts(threads, [&](const Parts& parts) {
    try {
      if (!are_steady(parts.of(std::size_t{0}, watched_.size()))) all_hold = false;
    } catch (...) {
      all_hold = false;
      meeting.come(parts);
      throw;
    }
    meeting.wait(parts);
    if (all_hold) walk_parts(table, parts);
  });
  return steady_ = all_hold;
}

// is_steady() for some of watched_. (Flattened: a call to one of torch's small functions costs more than what it does.)
__attribute__((flatten)) bool Plan::are_steady(std::pair<std::size_t, std::size_t> range) {
  const auto [begin, end] = range;
  for (std::size_t i = begin; i < end; ++i) {
    if (i + kAhead < end) {
      const WatchedEntry& next = watched_[i + kAhead];
      prefetch(next.param_object, kLine);
      prefetch(next.grad_slot, kLine);
      next.param.call();
      next.grad.call();
      prefetch(next.state, kLine);
      for (uint32_t k = 0; k < next.state_count; ++k) {
        const WatchedState& state = watched_states_[next.first_state + k];
        prefetch(state.object, kLine);
        state.tensor.call();
      }
    }
    WatchedEntry& w = watched_[i];
    const at::Tensor& param = THPVariable_Unpack(w.param_object);
    const c10::TensorImpl* impl = param.unsafeGetTensorImpl();
    if (!w.param.holds(impl)) return false;
    if (w.is_copy && active_[i].entry->written_by_others(*impl)) return false;

    const at::Tensor* grad = gradient_of(param);
    if (grad == nullptr || !grad->defined()) return false;
    const c10::TensorImpl* grad_impl = grad->unsafeGetTensorImpl();
    if (!w.grad.print->matches(*grad_impl)) return false;
    if (grad != w.grad_slot) active_[i].grad = w.grad_slot = grad;

    const WatchedState* states = watched_states_.data() + w.first_state;
    if (w.state_count != 0 && !w.state_version.is_of(w.state)) return false;
    for (int k = 0; k < w.state_count; ++k) {
      if (!THPVariable_CheckExact(states[k].object)) return false;
      const c10::TensorImpl* now = THPVariable_Unpack(states[k].object).unsafeGetTensorImpl();
      if (!states[k].tensor.holds(now)) return false;
      if (w.device_index >= 0 && now->device().index() != w.device_index) return false;
    }

    if (w.grad_pointer == nullptr) continue;
    if (w.device_index >= 0) {
      // Fingerprints tell a GPU from a CPU, not one GPU from another.
      if (impl->device().index() != w.device_index || grad_impl->device().index() != w.device_index) return false;
    }
    char* data = w.grad.print->locate(*grad_impl, false);
    if (data == nullptr) return false;
    if (data != w.grad.data) {
      if (!written_.clear_of(data, data + w.grad.print->required_bytes)) return false;
      w.grad.data = data;
      w.grad.impl = grad_impl;
      w.grad.storage = grad_impl->unsafe_storage().unsafeGetStorageImpl();
      *w.grad_pointer = data;
    }
  }
  return true;
}

// Autograd learns what such a step wrote, into some of watched_.
void Plan::bump_watched(std::pair<std::size_t, std::size_t> range) const {
  const auto [begin, end] = range;
  const auto bump = [](const Watched& tensor) { const_cast<c10::TensorImpl*>(tensor.impl)->bump_version(); };
  const auto each = [&](std::size_t i, auto run) {
    run(watched_[i].param);
    for (uint32_t k = 0; k < watched_[i].state_count; ++k) run(watched_states_[watched_[i].first_state + k].tensor);
  };
  for (std::size_t i = begin; i < end; ++i) {
    if (i + 2 * kAhead < end) each(i + 2 * kAhead, [](const Watched& tensor) { tensor.call_version(); });
    if (i + kAhead < end) each(i + kAhead, [](const Watched& tensor) { tensor.call_version_count(); });
    each(i, bump);
  }
}

}  // namespace fused_sgd
