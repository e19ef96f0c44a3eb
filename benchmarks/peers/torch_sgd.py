"""FusedSGD, what torch itself has, and the floor: an optimizer whose step is empty."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.optim.optimizer import Optimizer

from ..workload import MOMENTUM, WEIGHT_DECAY, Workload
from .base import Contender, Peer, optimizer_peer


def _fused_sgd(groups: Any, **hyperparameters: float) -> Optimizer:
    from fused_sgd import FusedSGD  # here, so that a broken installation is a row that says why

    return FusedSGD(groups, fused=True, **hyperparameters)


class Nothing(Optimizer):
    """What torch's own wrapper around ``step()`` takes when there is nothing in it."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Does nothing."""


def _nothing(workload: Workload, lr: float) -> Contender:
    # It reads no memory, so it needs no copies: views of the parameters will do.
    params = [param.view_as(param).requires_grad_() for param in workload.params]
    for param, grad in zip(params, workload.grads, strict=True):
        param.grad = grad
    return Contender(Nothing(workload.fresh_groups(params)).step, params)


def _compiled(workload: Workload, lr: float) -> Contender:
    params = workload.fresh_params()
    optimizer = _sgd(workload.fresh_groups(params), lr, foreach=True)
    # Of another workload, the same function would be compiled again, and after eight times no more.
    torch._dynamo.reset()
    step: Callable[[], object] = torch.compile(lambda: optimizer.step(), fullgraph=False)
    return Contender(step, params, lambda: [optimizer.state[param]["momentum_buffer"] for param in params], optimizer)


def _sgd(groups: Any, lr: float, **path: bool) -> Optimizer:
    return torch.optim.SGD(groups, lr=lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, **path)


OURS = optimizer_peer("ours", _fused_sgd, role="ours")
FUSED = optimizer_peer("fused", partial(torch.optim.SGD, fused=True))
FOREACH = optimizer_peer("foreach", partial(torch.optim.SGD, foreach=True))
LOOP = optimizer_peer("loop", partial(torch.optim.SGD, foreach=False))
COMPILED = Peer("compiled", _compiled, compiles=True)
NOTHING = Peer("nothing", _nothing, role="floor", computes=False)
