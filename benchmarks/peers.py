"""The peers: what is timed beside FusedSGD, and how each is set up on a workload."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from flat_loop import flat_loop
from torch import Tensor
from torch.optim.optimizer import Optimizer
from workload import MOMENTUM, WEIGHT_DECAY, Workload


@dataclass(frozen=True)
class Contender:
    """A peer set up on a workload: its step, and what the step has written so far."""

    step: Callable[[], object]
    params: list[Tensor]
    momentum_buffers: Callable[[], list[Tensor]]


class Nothing(Optimizer):
    """The floor: what torch's own wrapper around ``step()`` takes when there is nothing in it."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Does nothing."""


def _ours(workload: Workload, lr: float) -> Contender:
    from fused_sgd import FusedSGD  # here, so that a broken installation is a row that says why

    return _optimizer(FusedSGD, workload, lr, fused=True)


def _torch(**path: bool) -> Callable[[Workload, float], Contender]:
    return lambda workload, lr: _optimizer(torch.optim.SGD, workload, lr, **path)


def _optimizer(kind: Callable[..., Optimizer], workload: Workload, lr: float, **path: bool) -> Contender:
    params = workload.fresh_params()
    groups = workload.fresh_groups(params)
    optimizer = kind(groups, lr=lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, **path)
    return Contender(optimizer.step, params, lambda: [optimizer.state[param]["momentum_buffer"] for param in params])


def _nothing(workload: Workload, lr: float) -> Contender:
    # It reads no memory, so it needs no copies: views of the parameters will do.
    params = [param.view_as(param).requires_grad_() for param in workload.params]
    for param, grad in zip(params, workload.grads, strict=True):
        param.grad = grad
    return Contender(Nothing(workload.fresh_groups(params)).step, params, list)


def _flat(workload: Workload, lr: float) -> Contender:
    param = torch.cat([param.flatten() for param in workload.params])
    grad = torch.cat([grad.flatten() for grad in workload.grads])
    buffer = torch.zeros_like(param)
    step = flat_loop(param, grad, buffer, lr=lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    sizes = [param.numel() for param in workload.params]
    shapes = [param.shape for param in workload.params]

    def tensors(flat: Tensor) -> list[Tensor]:
        return [part.view(shape) for part, shape in zip(torch.split(flat, sizes), shapes, strict=True)]

    return Contender(step, tensors(param), lambda: tensors(buffer))


SET_UP: dict[str, Callable[[Workload, float], Contender]] = {
    "ours": _ours,
    "fused": _torch(fused=True),
    "foreach": _torch(foreach=True),
    "loop": _torch(foreach=False),
    "nothing": _nothing,
    "flat": _flat,
}
"""By peer name: sets the peer up on a workload with a learning rate."""
