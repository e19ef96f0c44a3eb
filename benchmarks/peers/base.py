"""What a peer is, and what it becomes when it is set up on a workload."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim.optimizer import Optimizer

from ..clocks import Step, Timed
from ..workload import MOMENTUM, WEIGHT_DECAY, Workload


class CannotRun(Exception):  # noqa: N818  # not an error: a row that says why
    """A peer cannot be set up here; the message says why."""


@dataclass(frozen=True)
class Contender:
    """A peer set up on a workload: its step, and what the step has written so far."""

    step: Step
    params: list[Tensor]
    momentum_buffers: Callable[[], list[Tensor]] = list  # empty where they cannot be compared
    optimizer: Optimizer | None = None
    results: Callable[[], list[Tensor]] | None = None  # instead of params, where they lie elsewhere
    timed: Timed | None = None  # a peer in another process reads its own clock
    close: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Peer:
    """What is timed beside FusedSGD.

    Attributes:
        name: what the command line and the reports call it.
        set_up: makes a contender of a workload and a learning rate; raises ``CannotRun`` or ``ImportError``.
        make: makes the optimizer of param groups and a learning rate, where there is one to put into a training loop.
        role: peer, ours, floor or ceiling. A ceiling's figures are what the others' are held against.
        decoupled: whether weight decay is that of SGDW, which the check then expects.
        compiles: whether setting it up takes time in proportion to the number of tensors, a minute for ResNet-50.
        computes: whether its result is that of SGD, and is checked.
    """

    name: str
    set_up: Callable[[Workload, float], Contender]
    make: Callable[[Any, float], Optimizer] | None = None
    role: str = "peer"
    decoupled: bool = False
    compiles: bool = False
    computes: bool = True


def optimizer_peer(
    name: str, make: Callable[..., Optimizer], momentum_key: str | None = "momentum_buffer", **options: Any
) -> Peer:
    """The peer of an ordinary optimizer class.

    Args:
        name: of the peer.
        make: called with param groups, ``lr``, ``momentum`` and ``weight_decay``; imports its library itself.
        momentum_key: the momentum buffer's key in the optimizer's state; None where it cannot be compared.
        **options: further attributes of the peer.
    """

    def make_with_hyperparameters(groups: Any, lr: float) -> Optimizer:
        return make(groups, lr=lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)

    def set_up(workload: Workload, lr: float) -> Contender:
        params = workload.fresh_params()
        optimizer = make_with_hyperparameters(workload.fresh_groups(params), lr)

        def momentum_buffers() -> list[Tensor]:
            return [optimizer.state[param][momentum_key] for param in params] if momentum_key else []

        return Contender(lambda: optimizer.step(), params, momentum_buffers, optimizer)

    return Peer(name, set_up, make_with_hyperparameters, **options)
