"""Helpers of the tests of the reference: a step of it, the options that torch has, and what rounding explains."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from fused_sgd.reference import (
    accumulation_dtype,
    sgd_update,
)
from torch import Tensor

SHAPES = [(1,), (7,), (32,), (1021,), (4097,), (3, 5), (0,), ()]
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# A few roundings, in the dtype that an update is computed in, of the size that the model gives.
ROUNDING = {torch.float32: 2**-21, torch.float64: 2**-50}
# Half a unit in the last place, and half of the smallest subnormal, for storing in a narrower one.
STORING = {
    torch.float32: (0.0, 2**-149),
    torch.float64: (0.0, 2**-1074),
    torch.bfloat16: (2**-8, 2**-134),
    torch.float16: (2**-11, 2**-25),
}

OPTIONS = [
    {"momentum": momentum, "nesterov": nesterov, "dampening": dampening, "weight_decay": decay, "maximize": maximize}
    for momentum, nesterov, dampening, decay, maximize in itertools.product(
        (0, 0.9), (False, True), (0, 0.3), (0, 0.01), (False, True)
    )
    if not nesterov or (momentum and not dampening)
]


def option_id(options: dict[str, Any]) -> str:
    return "-".join(f"{key}={value}" for key, value in options.items() if value) or "plain"


def step_all(
    params: list[Tensor], buffers: list[Tensor | None], each: list[dict[str, Any]] | None = None, **options: Any
) -> None:
    """A step of the reference on every parameter; ``each`` adds options of one parameter."""
    with torch.no_grad():
        for index, p in enumerate(params):
            assert p.grad is not None
            own = each[index] if each else {}
            buffers[index] = sgd_update(p, p.grad, buffers[index], **options, **own)


def assert_close(got: Tensor, want: Tensor, size: Tensor, what: str = "") -> None:
    """Equal to the model's result but for rounding; an infinity where that is beyond what the dtype holds."""
    relative, absolute = STORING[got.dtype]
    rounding = ROUNDING[accumulation_dtype(got.dtype)]
    allowed = relative * want.abs() + rounding * size + absolute + torch.finfo(accumulation_dtype(got.dtype)).tiny
    excess = (got.detach().double() - want).abs() - allowed
    overflows = (want.abs() + allowed > torch.finfo(got.dtype).max) & (got == want.sign() * math.inf)
    assert ((excess <= 0) | overflows).all(), f"{what}: {excess.max().item()} beyond what rounding explains"
