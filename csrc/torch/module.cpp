// The Python module fused_sgd._C: the plan, and what the package tells about itself.
#include <ATen/record_function.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include "../cpu/walk.h"
#include "plan.h"

namespace py = pybind11;

namespace fused_sgd {
namespace {

// The plan holds parameters, and parameters' hooks hold models, which may hold the optimizer. Python's garbage
// collector finds such a circle only if it can look inside.
py::custom_type_setup plan_takes_part_in_gc() {
  return py::custom_type_setup([](PyHeapTypeObject* heap_type) {
    PyTypeObject* type = &heap_type->ht_type;
    type->tp_flags |= Py_TPFLAGS_HAVE_GC;
    type->tp_traverse = [](PyObject* self, visitproc visit, void* arg) {
      Py_VISIT(Py_TYPE(self));
      if (!py::detail::is_holder_constructed(self)) return 0;
      return py::cast<Plan&>(py::handle(self)).traverse(visit, arg);
    };
    type->tp_clear = [](PyObject* self) {
      if (py::detail::is_holder_constructed(self)) py::cast<Plan&>(py::handle(self)).forget();
      return 0;
    };
  });
}

// step(plan, param_groups, state, grad_scale, found_inf, reduce, elsewhere). By hand, since pybind11's argument
// handling would take as long as a step over a dozen tensors.
PyObject* step(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK(count == 7 && PyList_Check(args[1]) && PyDict_Check(args[2]),
              "optimizer.param_groups must be a list and optimizer.state a dict");
  Plan& plan = py::cast<Plan&>(py::handle(args[0]));
  return plan.step(args[1], args[2], args[3], args[4], args[5], args[6]).release().ptr();
  END_HANDLE_TH_ERRORS
}

PyMethodDef step_method = {"step", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&step)), METH_FASTCALL,
                           nullptr};

// Whether a profiler, or anything else that observes torch's functions, is active in this thread.
PyObject* is_recording(PyObject*, PyObject*) { return PyBool_FromLong(at::hasCallbacks()); }

PyMethodDef is_recording_method = {"is_recording", &is_recording, METH_NOARGS, nullptr};

// The columns of a table's row in which the momentum buffer and the average stand.
py::tuple state_columns(int line) {
  const Combination& c = kCombinations[line];
  return py::make_tuple(c.momentum_column(), c.ema_column());
}

// A strided tensor in memory of a CPU or GPU with nothing unusual about it but, perhaps, lazy conjugation or negation.
bool is_plain(const at::Tensor& tensor) {
  const c10::TensorImpl& impl = *tensor.unsafeGetTensorImpl();
  const auto allowed =
      c10::DispatchKeySet({c10::DispatchKey::CPU, c10::DispatchKey::AutogradCPU, c10::DispatchKey::AutocastCPU,
                           c10::DispatchKey::CUDA, c10::DispatchKey::AutogradCUDA, c10::DispatchKey::AutocastCUDA,
                           c10::DispatchKey::ADInplaceOrView, c10::DispatchKey::Conjugate, c10::DispatchKey::Negative});
  return impl.layout() == at::kStrided && impl.has_storage() && (impl.key_set().raw_repr() & ~allowed.raw_repr()) == 0;
}

// Whether the kernel would reach a tensor of a parameter's through a copy.
bool is_staged(const at::Tensor& param, const at::Tensor& tensor) { return needs_staging(tensor, walk_strides(param)); }

// Asked of the device itself and of no other, since the answer starts a context. A torch that does not see the device
// (a CPU build, no driver) cannot select it, and cuda::obstacle() says what is amiss.
std::string cuda_obstacle(c10::DeviceIndex index) {
  c10::OptionalDeviceGuard guard;
  if (c10::impl::hasDeviceGuardImpl(c10::kCUDA) && index < c10::impl::getDeviceGuardImpl(c10::kCUDA)->deviceCount()) {
    guard.reset_device(c10::Device(c10::kCUDA, index));
  }
  return cuda::obstacle(index);
}

}  // namespace
}  // namespace fused_sgd

PYBIND11_MODULE(_C, m) {
  using namespace fused_sgd;
  m.doc() = "Compiled part of fused_sgd. Private: use the Python package.";

  py::class_<Plan>(m, "Plan", plan_takes_part_in_gc())
      .def(py::init<>())
      .def("admit", &Plan::admit)
      .def("refreshed", &Plan::refreshed)
      .def("watch", &Plan::watch)
      .def("totals", &Plan::totals)
      .def("row_squares", &Plan::row_squares)
      .def("skipped_steps", &Plan::skipped_steps)
      .def("forget_norms", &Plan::forget_norms)
      .def("calls", &Plan::calls)
      .def("forget_state", &Plan::forget_state)
      .def("forget", &Plan::forget);

  m.add_object("step", py::reinterpret_steal<py::object>(PyCFunction_New(&step_method, nullptr)));
  m.add_object("is_recording", py::reinterpret_steal<py::object>(PyCFunction_New(&is_recording_method, nullptr)));
  m.def("combination", &find_combination, "The kernels' number for formats of parameter, gradient, momentum, or -1.");
  m.def("state_columns", &state_columns, "Where a combination's momentum buffer and average stand in a table's row.");
  m.def("is_plain", &is_plain, "Whether the kernel can walk this tensor's memory.");
  m.def("is_staged", &is_staged, "Whether the kernel reaches a tensor of a parameter's through a copy.");
  m.def("overlaps_itself", &overlaps_itself, "Whether two elements of a tensor share memory.");

  m.def("cuda_architectures", &cuda::architectures, "Compute capabilities the kernels were built for; may be empty.");
  m.def("cuda_obstacle", &cuda_obstacle, "Why no kernel can run on this GPU, or an empty string.");
  m.def("relax_capture_mode", &cuda::relax_capture_mode, "Lets this thread allocate and wait while it captures.");
  m.def("restore_capture_mode", &cuda::restore_capture_mode, "Gives back what relax_capture_mode() returned.");

  m.def("instruction_sets", [] {
    py::list sets;
    for (const cpu::InstructionSet& set : cpu::instruction_sets()) {
      sets.append(py::make_tuple(set.name, set.runs_here(), set.fast_fma));
    }
    return sets;
  });
  m.def("instruction_set", [] { return cpu::instruction_set().name; });
  m.def("select_instruction_set", &cpu::select_instruction_set);
}
