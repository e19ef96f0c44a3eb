"""FusedSGD: the optimizer class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

import torch
from fused_sgd._checkpoint import OFF, PATH_KEYS, STORAGE_KEYS, Shared, as_saved, unpack, without_unset_momentum
from fused_sgd._explain import Explanation, explain
from fused_sgd._hooks import with_hooks
from fused_sgd._hyperparameters import (
    check_defaults,
    check_duplicates,
    check_grad_scale,
    check_numbers,
    check_one_element,
    check_path,
    check_same,
)
from fused_sgd._native import C
from fused_sgd._norms import make_reduce
from fused_sgd._settling import overflowed, plan_step
from fused_sgd._state import State
from fused_sgd._weights import Weights
from torch import Tensor
from torch.optim.optimizer import ParamsT


class FusedSGD(Weights):
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
        decoupled_weight_decay: SGDW: the parameter is multiplied by ``1 - lr * weight_decay`` before the step, and the
            gradient has no penalty.
        max_grad_norm: clips the gradients by their global L2 norm, over all groups and devices and after unscaling, as
            :func:`torch.nn.utils.clip_grad_norm_` does, but inside the step: gradients are not written.
        skip_nonfinite: whether a step is skipped, whole, when an element of a gradient is infinite or NaN. Under a
            :class:`torch.amp.GradScaler` its own look is believed, and no other pass is made.
        momentum_dtype: what the momentum buffer is kept in: ``torch.float32``, ``torch.bfloat16``, ``torch.float16``,
            or ``torch.int8`` for 8-bit codes with a float32 scale for each 64 of them. ``None`` for the parameter's
            dtype, or float32 where there are master weights. Parameters whose rows (along dimension 0) are not whole
            blocks keep a wide buffer beside int8; :meth:`explain` names them.
        master_weights: of bfloat16 and float16 parameters: ``torch.float32`` for a float32 master, of which the
            parameter is a rounded copy; ``"split"``, for bfloat16, for a 16-bit remainder, which together with the
            parameter is the exact float32 value. Both train to the same bits. Other parameters need none.
        stochastic_rounding: whether bfloat16 and float16 parameters are rounded up or down at random, with the
            probabilities that make the result right on average. The random numbers depend on the parameter's number
            and its count of steps alone: runs repeat, and replicas stay equal.
        ema_decay: keeps an exponential moving average of the parameters (of their masters, where there are any) in
            their state, as ``ema``: float32, or float64 for float64 parameters. See :meth:`swap_ema`.
        norm_process_group: where parameters are plain tensors and each a shard, the processes over which norms and
            the decision to skip are taken. (DTensors need none.)

    ``max_grad_norm`` and ``skip_nonfinite`` hold for the whole optimizer. Each of them, like ``fused=True``, makes a
    :class:`torch.amp.GradScaler` leave unscaling to the step, since norms are of unscaled gradients.

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
        decoupled_weight_decay: bool = False,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        momentum_dtype: torch.dtype | None = None,
        master_weights: torch.dtype | str | None = None,
        stochastic_rounding: bool = False,
        ema_decay: float | None = None,
        norm_process_group: Any = None,
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
            "decoupled_weight_decay": decoupled_weight_decay,
            "max_grad_norm": max_grad_norm,
            "skip_nonfinite": skip_nonfinite,
            "momentum_dtype": momentum_dtype,
            "master_weights": master_weights,
            "stochastic_rounding": stochastic_rounding,
            "ema_decay": ema_decay,
        }
        self._start(params, defaults, norm_process_group)

    def _start(self, params: ParamsT, defaults: dict[str, Any], norm_process_group: Any) -> None:
        """The constructor, for subclasses with other arguments."""
        check_defaults(defaults)
        self._plan = None if C is None else C.Plan()
        self.norm_process_group = norm_process_group
        self._skipped = 0
        self._found = None
        self._holds_averages = False
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
            if "trust_coeff" in param_group and "trust_coeff" not in self.defaults:
                raise ValueError(f"`trust_coeff` is an option of FusedLARS (param group {len(self.param_groups)})")
            check_numbers({**self.defaults, **param_group}, f" (param group {len(self.param_groups)})")
            check_path({**self.defaults, **param_group})
            check_same([*self.param_groups, {**self.defaults, **param_group}])
        super().add_param_group(param_group)
        self._reduce = make_reduce(self.param_groups, self.norm_process_group)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @with_hooks
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
        if self._holds_averages:
            self._refuse_averages("step()")
        loss = None
        try:
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            attributes = self.__dict__
            if "found_inf" in attributes or "grad_scale" in attributes:
                self._step_scaled(attributes)
            else:
                rest = plan_step(self._plan, self.param_groups, self.state, None, None, self._reduce, None)
                if rest is not None:
                    self._settle(rest, None, None)
        except BaseException:
            self._forget_norms()
            raise
        return loss

    def explain(self) -> Explanation:
        """Which path each parameter takes, in which storage format, and why.

        Returns:
            Rows of ``(group, device, dtype, path, reason, parameters, names)``, to be read or printed. Rows of
            parameters that have no gradient yet are provisional, and say so. Where a step would refuse a
            parameter, its gradient or the options for it, the path is ``"none"`` and the reason the error's.
        """
        return explain(self.param_groups, self.state)

    # --- Mixed precision ----------------------------------------------------------------------------------------------

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # GradScaler asks this. If True it leaves unscaling to step(), which not every trainer expects (Lightning then
        # refuses to clip), so it is True only where the kernel was asked for, as in torch, or norms need it.
        defaults = self.defaults
        return bool(defaults["fused"] or defaults["max_grad_norm"] is not None or defaults["skip_nonfinite"])

    # --- The step -----------------------------------------------------------------------------------------------------

    def _step_scaled(self, attributes: dict[str, Any]) -> None:
        """A step under GradScaler, or with a grad_scale that the user set."""
        scaler_is_stepping = "found_inf" in attributes
        try:
            scale, found_inf = attributes.get("grad_scale"), attributes.get("found_inf")
            check_one_element("found_inf", found_inf)
            if not _on_gpu(found_inf):
                if overflowed(found_inf):
                    self._forget_norms()
                    return
                found_inf = None if found_inf is None else 0.0
            if _on_gpu(scale):
                check_one_element("grad_scale", scale)
            else:
                scale = check_grad_scale(scale)
            rest = plan_step(self._plan, self.param_groups, self.state, scale, found_inf, self._reduce, None)
            if rest is not None:
                self._settle(rest, scale, found_inf)
        except BaseException:
            # GradScaler deletes them after a step that returns. Left behind, they would scale the next one twice.
            if scaler_is_stepping:
                attributes.pop("grad_scale", None)
                attributes.pop("found_inf", None)
            raise

    # --- What a step found --------------------------------------------------------------------------------------------

    @property
    def grad_norm(self) -> Tensor | None:
        """The global L2 norm of the gradients of the last step, after unscaling and before clipping.

        A fresh 0-dim float64 tensor on the parameters' device, so that asking does not wait for it. ``None`` where no
        norm was computed: none was needed, the step failed, or a GradScaler had found an overflow already. After
        ``load_state_dict()`` there was no last step.
        """
        totals = self._find_totals()
        return None if totals is None else totals[0].sqrt()

    @property
    def skipped_steps(self) -> int:
        """How many steps ``skip_nonfinite`` skipped, and no GradScaler; asking waits for the GPU.

        Not part of a checkpoint.
        """
        on_gpus = [] if self._plan is None else self._plan.skipped_steps()
        return self._skipped + sum(int(count) for count in on_gpus)

    # --- Copies and checkpoints ---------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Like :meth:`torch.optim.Optimizer.state_dict`, without unset momentum and unused options of precision."""
        self._refuse_averages("state_dict()")
        state: dict[str, Any] = super().state_dict()
        groups = state["param_groups"]
        for key, off in OFF.items():
            if all(key not in group or group[key] is off or group[key] == off for group in groups):
                for group in groups:
                    group.pop(key, None)
        for group in groups:
            for number in group["params"]:
                if number in state["state"]:
                    state["state"][number] = without_unset_momentum(state["state"][number])
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Like :meth:`torch.optim.Optimizer.load_state_dict`, but for options that decide how a step is done.

        Those stay this optimizer's own: ``fused``, ``foreach``, ``differentiable``, ``momentum_dtype``,
        ``master_weights``, ``stochastic_rounding`` and ``ema_decay``. What was saved in another format than they ask
        for is converted, and a warning says what: momentum now, master weights with the next step, when the model must
        have been loaded, too. What another optimizer has cast on the way is dropped, with a warning.

        Raises:
            ValueError: the checkpoint is of another model; or it has decoupled weight decay, and this is FusedLARS.
            RuntimeError: inside :meth:`swap_ema`.
        """
        self._refuse_averages("load_state_dict()")

        def prepare(_: Any, state: dict[str, Any]) -> dict[str, Any]:
            if "trust_coeff" in self.defaults and any(
                group.get("decoupled_weight_decay") for group in state["param_groups"]
            ):
                raise ValueError(
                    "the checkpoint has `decoupled_weight_decay`, which a trust ratio excludes: load it into a FusedSGD"
                )
            return as_saved(state)

        handle = self.register_load_state_dict_pre_hook(prepare)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def __getstate__(self) -> dict[str, Any]:
        self._refuse_averages("a copy")
        state: dict[str, Any] = super().__getstate__()
        return {**state, "_skipped": self.skipped_steps, "norm_process_group": Shared(self.norm_process_group)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Called for a copy or a pickle (with defaults), and by load_state_dict (without).
        running = [] if "defaults" in state else self.param_groups
        super().__setstate__(state)
        for key in STORAGE_KEYS:
            self.defaults.setdefault(key, OFF[key])  # a pickle may be older than they are
        for number, group in enumerate(self.param_groups):
            if "trust_coeff" not in self.defaults:
                group.pop("trust_coeff", None)  # of a FusedLARS; this one stays what it is
            kept = running[number] if running else self.defaults
            for key in self.defaults:
                if key in PATH_KEYS and running:
                    group[key] = kept[key]
                else:
                    group.setdefault(key, kept[key])
        unpack(self.state)
        if running:
            self._convert_all()
        if not running:
            self.norm_process_group = self.norm_process_group.it
            self._plan = None if C is None else C.Plan()
            self._holds_averages = False
        elif self._plan is not None:
            self._plan.forget()  # but not what a CUDA graph may have kept of it
        self._forget_norms()
        self._reduce = make_reduce(self.param_groups, self.norm_process_group)
        self.state = State(self._plan, self.state)


def _on_gpu(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_cuda
