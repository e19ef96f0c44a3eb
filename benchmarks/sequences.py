"""What is done around a step, in two ways: torch's sequence of passes, and one step of FusedSGD or FusedLARS.

Gradients are written by torch's way and, under GradScaler, checked and rewritten on both: each way has its own.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .clocks import Step
from .peers.lars import torch_lars
from .workload import MOMENTUM, WEIGHT_DECAY, Workload

MAX_GRAD_NORM = 1.0
EMA_DECAY = 0.999

_HYPERPARAMETERS = {"momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY}


@dataclass(frozen=True)
class Sequence:
    """One way to do a task, set up on a workload."""

    step: Step
    params: list[Tensor]
    results: Callable[[], list[Tensor]]
    optimizer: Optimizer


@dataclass(frozen=True)
class Task:
    """What is to be done, and by which passes over memory.

    Attributes:
        floor_bytes_per_element: read and written, in float32, by one FusedSGD step and what GradScaler does before it.
        launches: of ours, on a GPU, without GradScaler's.
    """

    name: str
    description: str
    floor_bytes_per_element: int
    torch: Callable[[Workload, float, float], Sequence]  # of learning rate and loss scale
    ours: Callable[[Workload, float, float], Sequence]
    torch_is: Callable[[], str] = lambda: f"torch {torch.__version__}"
    scaled: bool = False  # GradScaler waits for the GPU: no graph can hold it
    launches: int = 2


def _torch_sequence(workload: Workload, lr: float, scale: float, *, scaled: bool, ema: bool) -> Sequence:
    params = workload.fresh_params()
    optimizer = torch.optim.SGD(params, lr=lr, fused=True, **_HYPERPARAMETERS)
    scaler = _scaler(workload, scale) if scaled else None
    average = _average(params) if ema else None

    def step() -> None:
        if scaler is not None:
            scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(params, MAX_GRAD_NORM, foreach=True)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        if average is not None:
            average()

    def averages() -> list[Tensor]:
        return [] if average is None else average.averages

    return Sequence(
        step, params, lambda: [*params, *_state(optimizer, params, "momentum_buffer"), *averages()], optimizer
    )


def _our_sequence(workload: Workload, lr: float, scale: float, *, scaled: bool, ema: bool) -> Sequence:
    from fused_sgd import FusedSGD

    params = workload.fresh_params()
    around = {"max_grad_norm": MAX_GRAD_NORM, "ema_decay": EMA_DECAY if ema else None}
    optimizer = FusedSGD(params, lr=lr, fused=True, **around, **_HYPERPARAMETERS)  # type: ignore[arg-type]
    scaler = _scaler(workload, scale) if scaled else None

    def step() -> None:
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()

    keys = ("momentum_buffer", "ema") if ema else ("momentum_buffer",)
    return Sequence(
        step, params, lambda: [*params, *(t for key in keys for t in _state(optimizer, params, key))], optimizer
    )


def _scaler(workload: Workload, scale: float) -> torch.amp.GradScaler:
    """Its scale stays what it is; the call of ``scale()`` that a training loop makes is made here."""
    scaler = torch.amp.GradScaler(workload.device.type, init_scale=scale, growth_interval=1 << 30)
    scaler.scale(torch.zeros((), device=workload.device))
    return scaler


class _average:  # noqa: N801  # a function with something to show
    """Torch's own AveragedModel of the parameters, with the multi-tensor form of the average."""

    def __init__(self, params: list[Tensor]) -> None:
        self._model = nn.ParameterList([nn.Parameter(param.detach()) for param in params])  # the same memory
        self._averaged = AveragedModel(self._model, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY))
        self.averages: list[Tensor] = list(self._averaged.parameters())

    def __call__(self) -> None:
        self._averaged.update_parameters(self._model)


def _state(optimizer: Optimizer, params: list[Tensor], key: str) -> list[Tensor]:
    return [optimizer.state[param][key] for param in params]


def _lars(make: Callable[..., Optimizer]) -> Callable[[Workload, float, float], Sequence]:
    def set_up(workload: Workload, lr: float, scale: float) -> Sequence:
        params = workload.fresh_params()
        # The usual split: biases and norms without weight decay, and so without a trust ratio.
        groups: list[dict[str, Any]] = [
            {"params": [param for param in params if (param.dim() > 1) == adapts], "weight_decay": decay}
            for adapts, decay in ((True, WEIGHT_DECAY), (False, 0.0))
        ]
        if len(params) == 1:
            groups = [{"params": params, "weight_decay": WEIGHT_DECAY}]
        optimizer = make([group for group in groups if group["params"]], lr=lr, **_HYPERPARAMETERS)
        return Sequence(
            lambda: optimizer.step(),
            params,
            lambda: [*params, *_state(optimizer, params, "momentum_buffer")],
            optimizer,
        )

    return set_up


def _our_lars(groups: Any, **hyperparameters: float) -> Optimizer:
    from fused_sgd import FusedLARS

    return FusedLARS(groups, fused=True, **hyperparameters)


def _torch_lars(groups: Any, **hyperparameters: float) -> Optimizer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch_lars()[1](groups, **hyperparameters)


def _task(name: str, description: str, floor: int, *, scaled: bool, ema: bool) -> Task:
    def torchs(workload: Workload, lr: float, scale: float) -> Sequence:
        return _torch_sequence(workload, lr, scale, scaled=scaled, ema=ema)

    def ours(workload: Workload, lr: float, scale: float) -> Sequence:
        return _our_sequence(workload, lr, scale, scaled=scaled, ema=ema)

    return Task(name, description, floor, torchs, ours, scaled=scaled)


TASKS = {
    task.name: task
    for task in (
        # Parameter, gradient, momentum and average read, all but the gradient written: 28. The norm reads the gradient
        # once more: 32. GradScaler's own pass, which both ways have, reads and writes it: 40.
        _task("full", "GradScaler, clipping, step, average", 40, scaled=True, ema=True),
        _task("without-scaler", "clipping, step, average", 32, scaled=False, ema=True),
        _task("clip-step", "clipping, step", 24, scaled=False, ema=False),
        Task("lars", "LARS", 28, _lars(_torch_lars), _lars(_our_lars), lambda: torch_lars()[0]),
    )
}
