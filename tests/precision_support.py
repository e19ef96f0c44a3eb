"""Helpers of the tests of precision options: the modes, and independent models of them."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fused_sgd import FusedSGD
from torch import Tensor

from support import Params, bits, same_bits, set_grads

SHAPES = [(33,), (3, 64), (129, 65), (2, 3, 64), (), (0,), (0, 64), (70, 128)]
FUSED = pytest.mark.parametrize("fused", [True, False], ids=["kernel", "reference"])
# Master weights and a dtype of parameters that they are for.
MASTERS: list[tuple[Any, torch.dtype]] = [
    ("split", torch.bfloat16),
    (torch.float32, torch.bfloat16),
    ("float32", torch.float16),
]
MODES: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "bf16 momentum": (torch.float32, {"momentum_dtype": torch.bfloat16}),
    "int8": (torch.float32, {"momentum_dtype": torch.int8}),
    "fp32 momentum": (torch.bfloat16, {"momentum_dtype": torch.float32}),
    "split": (torch.bfloat16, {"master_weights": "split"}),
    "split int8": (torch.bfloat16, {"master_weights": "split", "momentum_dtype": torch.int8}),
    "master": (torch.float16, {"master_weights": torch.float32}),
    "stochastic": (torch.bfloat16, {"stochastic_rounding": True}),
    "stochastic int8": (torch.float16, {"stochastic_rounding": True, "momentum_dtype": torch.int8}),
}
EACH_MODE = pytest.mark.parametrize("mode", MODES)


def everything(optimizer: FusedSGD, params: Params) -> list[Tensor]:
    return [bits(t).clone() for p in params for t in (p, *optimizer.state.get(p, {}).values())]


def assert_alike(a: FusedSGD, params: Params, b: FusedSGD, others: Params) -> None:
    """Parameters and the whole state equal to the bit."""
    for index, (p, q) in enumerate(zip(params, others, strict=True)):
        assert same_bits(p, q), f"parameter {index}"
        mine, theirs = a.state[p], b.state[q]
        assert mine.keys() == theirs.keys()
        for key in mine:
            assert same_bits(mine[key], theirs[key]), f"{key} of parameter {index}"


def rounded_split(x: Tensor) -> Tensor:
    """Float32 to the nearest bfloat16, ties away from zero: of two neighbours the nearer one, measured in float64."""
    inner = (x.view(torch.int32) & -0x10000).view(torch.float32)
    outer = ((x.view(torch.int32) & -0x10000) + 0x10000).view(torch.float32)
    is_inner = (x.double() - inner.double()).abs() < (outer.double() - x.double()).abs()
    return torch.where(is_inner, inner, outer).bfloat16()


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A float32 master as the narrow parameter beside it."""
    return rounded_split(x.detach()) if dtype == torch.bfloat16 else x.detach().to(dtype)


class Model:
    """A torch.optim.SGD in float32 beside narrow parameters, which is given their gradients."""

    def __init__(
        self,
        params: Params,
        narrow: Callable[[Tensor], Tensor] | None = None,
        buffers: torch.dtype = torch.float32,
        **options: Any,
    ) -> None:
        self.wide = [p.detach().float().clone().requires_grad_() for p in params]
        self.sgd = torch.optim.SGD(self.wide, **options, foreach=False)
        self.narrow, self.buffers = narrow, buffers

    def buffer(self, index: int) -> Tensor | None:
        return self.sgd.state.get(self.wide[index], {}).get("momentum_buffer")

    def step(self, params: Params) -> None:
        for p, q in zip(params, self.wide, strict=True):
            q.grad = None if p.grad is None else p.grad.float()
        self.sgd.step()
        with torch.no_grad():
            for index, q in enumerate(self.wide):
                if self.narrow is not None:
                    q.copy_(self.narrow(q).float())
                buffer = self.buffer(index)
                if buffer is not None:
                    buffer.copy_(buffer.to(self.buffers).float())


def saved_and_loaded(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def train(optimizer: FusedSGD, params: Params, steps: range) -> None:
    for step in steps:
        set_grads(params, seed=step)
        optimizer.step()
