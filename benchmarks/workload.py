"""What every peer starts from: the random parameters and gradients of one shape set in one dtype."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from shapes import Shape, ShapeSet
from torch import Tensor

# As most people train ResNets. Timed steps take a tiny lr instead, so that thousands of them leave the values ordinary.
MOMENTUM = 0.9
WEIGHT_DECAY = 1e-4
LR = 0.1
TIMED_LR = 1e-6


@dataclass(frozen=True)
class Workload:
    """Parameters and their gradients, which are never written: peers take copies of the one and share the other."""

    shape_set: ShapeSet
    params: list[Tensor]
    grads: list[Tensor]

    @property
    def dtype(self) -> torch.dtype:
        """Of all parameters and gradients."""
        return self.params[0].dtype

    @property
    def floor_bytes(self) -> int:
        """What a step must move at least: parameter, gradient and momentum read, parameter and momentum written."""
        return 5 * self.dtype.itemsize * self.shape_set.elements

    def fresh_params(self) -> list[Tensor]:
        """Copies of the parameters at the same offsets, with the shared gradients."""
        copies = []
        for index, (param, grad) in enumerate(zip(self.params, self.grads, strict=True)):
            copy = _empty(tuple(param.shape), self.shape_set.offset(index), self.dtype)
            copy.copy_(param)
            copy.requires_grad_().grad = grad
            copies.append(copy)
        return copies

    def fresh_groups(self, params: Sequence[Tensor]) -> list[dict[str, object]]:
        """The param groups to give an optimizer."""
        if self.shape_set.group_per_tensor:
            return [{"params": [param]} for param in params]
        return [{"params": list(params)}]


def make_workload(shape_set: ShapeSet, dtype: torch.dtype, seed: int = 0) -> Workload:
    """Draws parameters and gradients from the normal distribution."""
    generator = torch.Generator().manual_seed(seed)
    params: list[Tensor] = []
    grads: list[Tensor] = []
    for index, shape in enumerate(shape_set.shapes):
        for tensors in (params, grads):
            tensor = _empty(shape, shape_set.offset(index), dtype)
            tensors.append(tensor.normal_(generator=generator))
    return Workload(shape_set, params, grads)


def _empty(shape: Shape, offset: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(offset + prod(shape), dtype=dtype)[offset:].view(shape)
