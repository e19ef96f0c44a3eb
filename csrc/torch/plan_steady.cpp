// The steady step: is all as the last step left it, but for the gradients' addresses and the values of hyperparameters?
// Then the tables hold, and nothing else of the plan is looked at. No line of Python runs here.
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/python_variable.h>

#include <atomic>

#include "plan.h"
#include "python_tensors.h"

namespace fused_sgd {
namespace {

// What a step touches was last touched a step ago, and the caches have forgotten it. So it is called for some tensors
// before its turn: by pointers of the last step, of which a stale one costs a wasted load and no more.
constexpr std::size_t kAhead = 6;
constexpr int kLine = 64;  // bytes
// Below so many parameters, a second thread costs more than it gives.
constexpr int64_t kSerialTensors = 256;

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

// Whether the tensor is as the last step found it, in the same memory.
FSGD_INLINE bool Plan::Watched::holds(const c10::TensorImpl* now, bool writable) const {
  return now == impl && print->matches(*now) && (data == nullptr || print->locate(*now, writable) == data);
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

// Whether the tables of the last step are this one's too, but for values and the gradients' addresses, which are
// brought up to date. Whatever else differs is left to scan().
bool Plan::is_steady() {
  if (written_moved_ || !states_known_ || (values_changed_ && !replace_groups())) return false;
  for (const Entry* entry : idle_) {
    const at::Tensor* grad = gradient_of(THPVariable_Unpack(entry->param.get()));
    if (grad != nullptr && grad->defined()) return false;
  }
  // On several threads where there are many. The calling one keeps the GIL, and the others only read fields of Python's
  // objects; where dicts must be looked into, it does all.
  const auto count = static_cast<int64_t>(watched_.size());
  std::atomic<bool> all_hold = true;
  const auto look = [&](int64_t begin, int64_t end) {
    if (!are_steady(static_cast<std::size_t>(begin), static_cast<std::size_t>(end))) all_hold = false;
  };
  if (DictVersion::kExists && count >= kSerialTensors && at::get_num_threads() > 1) {
    at::parallel_for(0, count, kSerialTensors / 2, look);
  } else {
    look(0, count);
  }
  if (!all_hold) return false;
  any_new_ = grads_moved_ = false;
  return steady_ = repeats_ = true;
}

// The same for some of watched_. (Flattened: a call to one of torch's small functions costs more than what it does.)
__attribute__((flatten)) bool Plan::are_steady(std::size_t begin, std::size_t end) {
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
    if (!w.param.holds(impl, true)) return false;
    if (w.is_copy && active_[i].entry->written_by_others(*impl)) return false;

    const at::Tensor* grad = gradient_of(param);
    if (grad == nullptr || !grad->defined()) return false;
    const c10::TensorImpl* grad_impl = grad->unsafeGetTensorImpl();
    if (!w.grad.print->matches(*grad_impl)) return false;
    if (grad != w.grad_slot) active_[i].grad = w.grad_slot = grad;

    const WatchedState* states = watched_states_.data() + w.first_state;
    if (w.state_count != 0 && !w.state_version.is_of(w.state)) {
      if (DictVersion::kExists) return false;
      const Entry& entry = *active_[i].entry;
      for (int k = 0; k < w.state_count; ++k) {
        if (PyDict_GetItemWithError(w.state, entry.states[k].key) == states[k].object) continue;
        PyErr_Clear();
        return false;
      }
    }
    for (int k = 0; k < w.state_count; ++k) {
      if (!THPVariable_CheckExact(states[k].object)) return false;
      const c10::TensorImpl* now = THPVariable_Unpack(states[k].object).unsafeGetTensorImpl();
      if (!states[k].tensor.holds(now, true)) return false;
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
void Plan::bump_watched(std::size_t begin, std::size_t end) const {
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
