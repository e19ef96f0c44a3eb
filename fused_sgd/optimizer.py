"""FusedSGD: the optimizer class."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, overload

import torch
from fused_sgd._explain import Explanation, explain
from fused_sgd._hyperparameters import (
    check_defaults,
    check_duplicates,
    check_grad_scale,
    check_numbers,
    check_one_element,
    check_path,
)
from fused_sgd._judge import Group, gradient, judge, local, momentum_buffer, place
from fused_sgd._native import C
from fused_sgd._state import State
from fused_sgd.reference import sgd_update, unscaled
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT
from torch.optim.sgd import sgd as torch_sgd

if C is not None:
    _step = C.step
else:

    def _step(*arguments: Any) -> tuple[str]:
        return ("no plan",)


# What decides HOW a group is stepped belongs to the running optimizer, not to a checkpoint.
_PATH_KEYS = ("fused", "foreach", "differentiable")


class FusedSGD(Optimizer):
    r"""Stochastic gradient descent, with the bits of :class:`torch.optim.SGD` and one pass for the whole model.

    A replacement for :class:`torch.optim.SGD`: same arguments, same defaults, same state. In float32 and float64 the
    results are equal to the bit; in bfloat16 and float16 they are computed in float32 and rounded once. See
    :func:`fused_sgd.reference.sgd_update` for the formula and its source.

    Args:
        params: parameters, named parameters, or dicts that define param groups.
        lr: learning rate; a 1-element tensor is read at every step.
        momentum: momentum factor.
        dampening: part of the gradient kept out of the momentum buffer, from a parameter's second step on.
        weight_decay: L2 penalty; may be a 1-element tensor.
        nesterov: whether to use Nesterov momentum; needs ``momentum > 0`` and ``dampening == 0``.
        maximize: whether to maximize the objective.
        foreach: ``True`` for torch's own foreach implementation.
        differentiable: whether autograd may run through the step; takes the reference path.
        fused: ``None`` for the kernel wherever it applies and the reference elsewhere, decided per parameter;
            ``True`` for the kernel or an error; ``False`` for the reference. With ``True``, a
            :class:`torch.amp.GradScaler` leaves unscaling and skipping to the step.

    Raises:
        ValueError: a hyperparameter is out of range or NaN, or a parameter is given twice.
        RuntimeError: options that exclude each other, or ``fused=True`` without the compiled module.

    Gradients are never written. ``explain()`` tells which path each parameter takes and why.

    Example:
        >>> optimizer = FusedSGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> optimizer.zero_grad()
        >>> loss_fn(model(input), target).backward()
        >>> optimizer.step()
    """

    # Torch's own classes carry these two only while GradScaler runs a step; so do instances of this one.
    grad_scale: Tensor | float | None
    found_inf: Tensor | None

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        defaults: dict[str, Any] = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
        }
        check_defaults(defaults)
        self._plan = None if C is None else C.Plan()
        super().__init__(params, defaults)
        self.state = State(self._plan, self.state)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a param group, like :meth:`torch.optim.Optimizer.add_param_group`.

        Raises:
            ValueError: also when a parameter is given twice, of which torch only warns, and for NaN.
            RuntimeError: options that exclude each other.
        """
        if isinstance(param_group, dict) and "params" in param_group:
            params = param_group["params"]
            if not isinstance(params, (Tensor, set)):
                params = param_group["params"] = list(params)
                number = len(self.param_groups)
                check_duplicates([entry[1] if isinstance(entry, tuple) else entry for entry in params], number)
            check_numbers({**self.defaults, **param_group}, f" (param group {len(self.param_groups)})")
            check_path({**self.defaults, **param_group})
        super().add_param_group(param_group)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Performs one step.

        Every parameter that has a gradient is checked before the first one is written: after an error, parameters and
        state are as they were.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            What ``closure`` returned, or ``None``.

        Raises:
            RuntimeError: a parameter that cannot be stepped (shapes, devices or dtypes that do not fit, shared memory),
                or one that ``fused=True`` has no kernel for. The message names the parameter.
            ValueError: a hyperparameter is NaN.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        attributes = self.__dict__
        if "found_inf" in attributes or "grad_scale" in attributes:
            self._step_scaled(attributes)
        elif (rest := _step(self._plan, self.param_groups, self.state, None, None)) is not None:
            self._settle(rest, None, None)
        return loss

    def explain(self) -> Explanation:
        """Which path each parameter takes, in which storage format, and why.

        Returns:
            Rows of ``(group, device, dtype, path, reason, parameters, names)``, to be read or printed. Rows of
            parameters that have no gradient yet are provisional, and say so.
        """
        return explain(self.param_groups, self.state)

    # --- Mixed precision ----------------------------------------------------------------------------------------------

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # GradScaler asks this. If True it leaves unscaling to step(), which not every trainer expects (Lightning then
        # refuses to clip), so it is True only where the kernel was asked for, as in torch.
        return bool(self.defaults["fused"])

    # --- The step -----------------------------------------------------------------------------------------------------

    def _step_scaled(self, attributes: dict[str, Any]) -> None:
        """A step under GradScaler, or with a grad_scale that the user set."""
        scaler_is_stepping = "found_inf" in attributes
        try:
            scale, found_inf = attributes.get("grad_scale"), attributes.get("found_inf")
            if _on_gpu(found_inf):
                check_one_element("found_inf", found_inf)
            elif _overflowed(found_inf):
                return
            else:
                found_inf = None
            if _on_gpu(scale):
                check_one_element("grad_scale", scale)
            else:
                scale = check_grad_scale(scale)
            rest = _step(self._plan, self.param_groups, self.state, scale, found_inf)
            if rest is not None:
                self._settle(rest, scale, found_inf)
        except BaseException:
            # GradScaler deletes them after a step that returns. Left behind, they would scale the next one twice.
            if scaler_is_stepping:
                attributes.pop("grad_scale", None)
                attributes.pop("found_inf", None)
            raise

    def _settle(self, rest: tuple[Any, ...], grad_scale: Tensor | float | None, found_inf: Tensor | None) -> None:
        """Does what the plan could not: judges, raises, or steps the parameters that no kernel takes."""

        def again() -> tuple[Any, ...] | None:
            answered: tuple[Any, ...] | None = _step(self._plan, self.param_groups, self.state, grad_scale, found_inf)
            return answered

        answer: tuple[Any, ...] | None = rest
        if rest[0] == "state":  # someone put another dict there
            self.state = State(self._plan, self.state)
            answer = again()
        if answer is not None and answer[0] == "judge":
            self._admit(answer[1])
            answer = again()
        if answer is not None and answer[0] in ("scalars", "mode", "no plan"):
            # Not everything is stepped where these stand, so the host must know them; that waits for the GPU.
            if _overflowed(found_inf):
                return
            grad_scale, found_inf = check_grad_scale(grad_scale), None
            answer = again()
        if answer is None:
            return
        if answer[0] == "elsewhere":
            self._step_elsewhere(answer[1], grad_scale)
        elif answer[0] in ("mode", "no plan"):
            if answer[0] == "mode" and any(group["fused"] for group in self.param_groups):
                raise RuntimeError("`fused=True` cannot be honoured under an active TorchDispatchMode; use fused=None")
            self._step_elsewhere(self._judge_all(), grad_scale)
        else:
            self._refuse(*answer)

    def _refuse(self, what: str, *details: Any) -> NoReturn:
        """Raises the error for what the plan found."""
        groups = self.param_groups
        if what == "invalid":
            group, _ = details
            check_numbers(groups[group], f" (param group {group})")
        elif what == "too large":
            group, key, index = details
            raise RuntimeError(
                f"{place(groups, group, index)}: {key} ({groups[group][key]}) cannot be converted to type float without"
                " overflow"
            )
        elif what == "freed":
            group, index, role = details
            raise RuntimeError(
                f"{place(groups, group, index)}: the storage of its {role} is smaller than the tensor; it was freed or"
                " resized after the tensor was made"
            )
        elif what == "capture":
            group, index = details
            raise RuntimeError(
                f"{place(groups, group, index)}: its first step with dampening is another than those that follow, and a"
                " CUDA graph would repeat it; run one step before the capture"
            )
        elif what == "overlap":
            (group, index, role), (other_group, other_index, other_role) = details
            advice = "Give the optimizer each tensor once, and tied weights as one parameter"
            if "gradient" in (role, other_role):
                advice = "Clone the gradient"
            raise RuntimeError(
                f"the {role} of {place(groups, group, index)} shares memory with the {other_role} of"
                f" {place(groups, other_group, other_index)}; a step cannot write one without changing the other."
                f" {advice}"
            )
        raise AssertionError(f"the plan did not settle: {what} {details}")

    def _admit(self, entries: list[tuple[int, int]]) -> None:
        """Judges parameters for the plan; all of them before the plan hears of any."""
        admissions = []
        for group, index in entries:
            options = self.param_groups[group]
            kernel = judge(self.param_groups, group, index, self.state).path == "kernel"
            param = options["params"][index]
            first = kernel and options["momentum"] != 0 and momentum_buffer(self.state, param) is None
            admissions.append((group, index, kernel, _new_momentum_buffer(param) if first else None))
        assert self._plan is not None
        for admission in admissions:
            self._plan.admit(*admission)

    def _judge_all(self) -> list[tuple[int, int]]:
        """Judges every parameter that has a gradient; for steps without a plan."""
        entries = []
        seen: set[Tensor] = set()
        for group, options in enumerate(self.param_groups):
            check_numbers(options, f" (param group {group})")
            for index, param in enumerate(options["params"]):
                if param in seen:
                    raise RuntimeError(f"{place(self.param_groups, group, index)} is in the optimizer twice")
                seen.add(param)
                if param.grad is not None:
                    judge(self.param_groups, group, index, self.state)
                    entries.append((group, index))
        return entries

    def _step_elsewhere(self, entries: list[tuple[int, int]], grad_scale: Tensor | float | None) -> None:
        """Steps parameters by the reference, or by torch's foreach implementation where the group asks for it."""
        for group, options in enumerate(self.param_groups):
            params = [options["params"][index] for number, index in entries if number == group]
            with torch.set_grad_enabled(bool(options["differentiable"])):
                step = self._step_torch if options["foreach"] else self._step_reference
                step(options, params, grad_scale)

    def _step_reference(self, options: Group, params: list[Tensor], grad_scale: Tensor | float | None) -> None:
        for param in params:
            if gradient(param).layout != torch.strided or param.layout != torch.strided:
                self._step_torch(options, [param], grad_scale)
                continue
            buffer = sgd_update(
                param,
                gradient(param),
                momentum_buffer(self.state, param),
                grad_scale=grad_scale,
                **{key: options[key] for key in _HYPERPARAMETERS},
            )
            if options["momentum"] != 0:
                self.state[param]["momentum_buffer"] = buffer

    def _step_torch(self, options: Group, params: list[Tensor], grad_scale: Tensor | float | None) -> None:
        """Torch's own functions: foreach where the group asks for it, else the loop, for sparse tensors."""
        if not params:
            return
        grads = [gradient(param) for param in params]
        if grad_scale is not None:
            grads = [unscaled(grad, grad_scale) for grad in grads]
        buffers = [momentum_buffer(self.state, param) for param in params]
        torch_sgd(
            params,
            grads,
            buffers,
            has_sparse_grad=any(grad.is_sparse for grad in grads),
            foreach=bool(options["foreach"]),
            fused=False,
            **{key: options[key] for key in _HYPERPARAMETERS},
        )
        if options["momentum"] != 0:
            for param, buffer in zip(params, buffers, strict=True):
                self.state[param]["momentum_buffer"] = buffer

    # --- Copies and checkpoints ---------------------------------------------------------------------------------------

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Called for a copy or a pickle (with defaults), and by load_state_dict (without).
        running = [] if "defaults" in state else self.param_groups
        super().__setstate__(state)
        for number, group in enumerate(self.param_groups):
            kept = running[number] if running else self.defaults
            for key in self.defaults:
                if key in _PATH_KEYS and running:
                    group[key] = kept[key]
                else:
                    group.setdefault(key, kept[key])
        self._plan = None if C is None else C.Plan()
        self.state = State(self._plan, self.state)


_HYPERPARAMETERS = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")


def _new_momentum_buffer(param: Tensor) -> Tensor:
    """A momentum buffer that has accumulated nothing: all -0.0.

    With it, the formula of later steps gives what the first step must (b = d, to the bit: +0.0 would lose the sign of a
    zero), so a buffer whose first step never came is still right.
    """
    with torch.inference_mode(False), torch.no_grad(), _outside_capture(param.device):
        buffer = torch.empty_like(param, requires_grad=False)
        memory = local(buffer)
        (torch.view_as_real(memory.resolve_conj()) if memory.is_complex() else memory).fill_(-0.0)
    return buffer


@contextlib.contextmanager
def _outside_capture(device: torch.device) -> Iterator[None]:
    """Lets work be done now, in ordinary memory, even while a CUDA graph is captured, of which it is to be no part.

    A graph that filled a new buffer would fill it again at each replay, and memory from the graph's own pool may be
    written by what the graph did earlier.
    """
    if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        yield
        return
    assert C is not None
    mode = C.relax_capture_mode()
    try:
        stream = _stream_outside_capture(device)
        with torch.cuda.stream(stream):
            yield
        stream.synchronize()
    finally:
        C.restore_capture_mode(mode)


_side_streams: dict[torch.device, torch.cuda.Stream] = {}


def _stream_outside_capture(device: torch.device) -> torch.cuda.Stream:
    """A stream that is not captured; the same one each time, since its memory is of use to no other stream.

    torch hands out 32 streams a device in turn, and the one that is captured may be among them.
    """
    for _ in range(64):
        stream = _side_streams.get(device)
        if stream is not None:
            with torch.cuda.stream(stream):
                if not torch.cuda.is_current_stream_capturing():
                    return stream
        _side_streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    raise RuntimeError(f"every stream of {device} is being captured")


def _on_gpu(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_cuda


def _overflowed(found_inf: Any) -> bool:
    """Whether the step is to be skipped. GradScaler sums over devices: anything but 0 means an overflow."""
    return found_inf is not None and float(found_inf) != 0
