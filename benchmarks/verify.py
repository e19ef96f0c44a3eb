"""Whether a peer computes SGD at all: a peer that computes nothing is fast, and no baseline.

In bfloat16, torch 2.13's fused SGD leaves whole vectors of a CPU tensor as they were.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from peers import SET_UP
from shapes import ShapeSet
from torch import Tensor
from workload import LR, MOMENTUM, WEIGHT_DECAY, Workload, make_workload

STEPS = 2  # the first step of a parameter is a special case
MAX_ELEMENTS = 100_003  # of a tensor: enough for several threads, and for a tail behind the last whole vector

# Relative to the larger of 1 and the value. bfloat16 peers may round each intermediate result to 8 bits.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Check:
    """``status`` is ok, wrong (its result) or failed (to run); ``error`` is the largest one against float64."""

    status: str
    reason: str | None = None
    error: float | None = None


def check(peers: Iterable[str], shape_set: ShapeSet, dtype: torch.dtype) -> dict[str, Check]:
    """Steps small copies of the shapes with every peer, and compares with float64."""
    workload = make_workload(shape_set.capped(MAX_ELEMENTS), dtype, seed=1)
    expected = _sgd_in_float64(workload)
    return {peer: _check(peer, workload, expected) for peer in peers}


def _check(peer: str, workload: Workload, expected: list[Tensor]) -> Check:
    grads = [grad.clone() for grad in workload.grads]
    try:
        contender = SET_UP[peer](workload, LR)
        for _ in range(STEPS):
            contender.step()
    except Exception as exception:  # whatever it is, the others can still be measured
        return Check("failed", f"{type(exception).__name__}: {exception}")
    if not all(torch.equal(a, b) for a, b in zip(grads, workload.grads, strict=True)):
        raise RuntimeError(f"{peer} writes the gradients, which all peers share; nothing can be said of the others")
    if peer == "nothing":
        return Check("ok")
    error = _largest_error([*contender.params, *contender.momentum_buffers()], expected)
    tolerance = TOLERANCE[workload.dtype]
    if not error <= tolerance:  # so that NaN is wrong as well
        reason = f"error {error:.2g} after {STEPS} steps, {tolerance:.0e} allowed"
        return Check("wrong", reason, error if math.isfinite(error) else None)
    return Check("ok", error=error)


def _sgd_in_float64(workload: Workload) -> list[Tensor]:
    """All parameters and then all momentum buffers, after the steps."""
    params: list[Tensor] = []
    buffers: list[Tensor] = []
    for param, grad in zip(workload.params, workload.grads, strict=True):
        p, g = param.double(), grad.double()
        b = torch.zeros_like(p)
        for _ in range(STEPS):
            b = MOMENTUM * b + (g + WEIGHT_DECAY * p)
            p = p - LR * b
        params.append(p)
        buffers.append(b)
    return [*params, *buffers]


def _largest_error(results: list[Tensor], expected: list[Tensor]) -> float:
    errors = [
        ((a.detach().double() - b).abs() / b.abs().clamp(min=1)).amax() for a, b in zip(results, expected, strict=True)
    ]
    return torch.stack(errors).amax().item()
