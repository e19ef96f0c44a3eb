"""Whether a peer computes SGD at all: a peer that computes nothing is fast, and no baseline.

In bfloat16, torch 2.13's fused SGD leaves whole vectors of a CPU tensor as they were.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .peers import PEERS, CannotRun, Contender, Peer
from .shapes import ShapeSet
from .workload import LR, MOMENTUM, WEIGHT_DECAY, Workload, make_workload

STEPS = 2  # the first step of a parameter is a special case
MAX_ELEMENTS = 40_009  # of a tensor: enough for several threads, and for a tail behind the last whole vector

# Relative to the larger of 1 and the value. bfloat16 peers may round each intermediate result to 8 bits.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Check:
    """``status`` is ok, wrong (its result), failed (with an error) or skipped (it cannot run here).

    ``error`` is the largest one against float64.
    """

    status: str
    reason: str | None = None
    error: float | None = None
    writes_gradients: bool = False


def check(peers: Iterable[Peer], shape_set: ShapeSet, dtype: torch.dtype, device: str = "cpu") -> dict[str, Check]:
    """Steps small copies of the shapes with every peer, and compares with float64."""
    workload = make_workload(shape_set.capped(MAX_ELEMENTS), dtype, device, seed=1).with_own_grads()
    expected = {decoupled: sgd_in_float64(workload, decoupled) for decoupled in (False, True)}
    return {peer.name: check_peer(peer, workload, expected[peer.decoupled]) for peer in peers}


def check_peer(peer: Peer, workload: Workload, expected: list[Tensor]) -> Check:
    """Of one peer, against the parameters and then the momentum buffers that it should have after the steps."""
    try:
        contender = peer.set_up(workload, LR)
    except (CannotRun, ImportError) as why:
        return Check("skipped", str(why))
    except Exception as exception:  # whatever it is, the others can still be measured
        return Check("failed", f"{type(exception).__name__}: {exception}")
    try:
        return _compare(peer, contender, workload, expected)
    except Exception as exception:
        return Check("failed", f"{type(exception).__name__}: {exception}")
    finally:
        contender.close()


def _compare(peer: Peer, contender: Contender, workload: Workload, expected: list[Tensor]) -> Check:
    grads = [(param.grad, grad) for param, grad in zip(contender.params, workload.grads, strict=False)]
    writes = False
    for _ in range(STEPS):
        contender.step()
        for own, grad in grads:
            if own is not None and peer.computes:
                writes = writes or not torch.equal(own, grad)
                own.copy_(grad)  # as a backward pass would
    if not peer.computes:
        return Check("ok")
    results = contender.results() if contender.results else [*contender.params, *contender.momentum_buffers()]
    error = largest_error(results, expected)
    tolerance = TOLERANCE[workload.dtype]
    if not error <= tolerance:  # so that NaN is wrong as well
        reason = f"error {error:.2g} after {STEPS} steps, {tolerance:.0e} allowed"
        return Check("wrong", reason, error if math.isfinite(error) else None, writes)
    return Check("ok", error=error, writes_gradients=writes)


def sgd_in_float64(workload: Workload, decoupled: bool) -> list[Tensor]:
    """All parameters and then all momentum buffers, after the steps."""
    params: list[Tensor] = []
    buffers: list[Tensor] = []
    for param, grad in zip(workload.params, workload.grads, strict=True):
        p, g = param.double(), grad.double()
        b = torch.zeros_like(p)
        for _ in range(STEPS):
            if decoupled:
                p = p * (1 - LR * WEIGHT_DECAY)
                b = MOMENTUM * b + g
            else:
                b = MOMENTUM * b + (g + WEIGHT_DECAY * p)
            p = p - LR * b
        params.append(p)
        buffers.append(b)
    return [*params, *buffers]


def largest_error(results: list[Tensor], expected: list[Tensor]) -> float:
    """Relative to the larger of 1 and the value. Of what is expected, the last may be missing."""
    # Peers whose momentum cannot be compared give parameters alone.
    errors = [
        ((a.detach().double() - b).abs() / b.abs().clamp(min=1)).amax() for a, b in zip(results, expected, strict=False)
    ]
    return torch.stack(errors).amax().item()


def check_once(peers: Iterable[str], dtype: torch.dtype, device: str = "cpu") -> dict[str, Check]:
    """A check on one small set of shapes, for what is not about shapes."""
    shapes = ShapeSet("small", "a few odd sizes", ((7,), (33, 65), (4097,)))
    return check([PEERS[name] for name in peers], shapes, dtype, device)
