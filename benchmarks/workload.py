"""What every peer starts from: the random parameters and gradients of one shape set in one dtype."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod

import torch
from torch import Tensor

from .shapes import Shape, ShapeSet

# As most people train ResNets. Timed steps take a tiny lr instead, so that thousands of them leave the values ordinary.
MOMENTUM = 0.9
WEIGHT_DECAY = 1e-4
LR = 0.1
TIMED_LR = 1e-6


@dataclass(frozen=True)
class Workload:
    """Parameters and their gradients, which are never written: peers take copies of the one and share the other.

    A peer that writes gradients is given copies of those too (``own_grads``).
    """

    shape_set: ShapeSet
    params: list[Tensor]
    grads: list[Tensor]
    own_grads: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """Of all parameters and gradients."""
        return self.params[0].dtype

    @property
    def device(self) -> torch.device:
        """Of all parameters and gradients."""
        return self.params[0].device

    @property
    def floor_bytes(self) -> int:
        """What a step must move at least: parameter, gradient and momentum read, parameter and momentum written."""
        return 5 * self.dtype.itemsize * self.shape_set.elements

    def with_own_grads(self) -> Workload:
        """The same, for a peer that writes its gradients."""
        return replace(self, own_grads=True)

    def fresh_params(self) -> list[Tensor]:
        """Copies of the parameters at the same offsets, with the shared gradients or copies of them."""
        copies = []
        for index, (param, grad) in enumerate(zip(self.params, self.grads, strict=True)):
            copy = self._copy(param, index)
            copy.requires_grad_().grad = self._copy(grad, index) if self.own_grads else grad
            copies.append(copy)
        return copies

    def fresh_groups(self, params: Sequence[Tensor]) -> list[dict[str, object]]:
        """The param groups to give an optimizer."""
        count, groups = len(params), self.shape_set.param_groups
        bounds = [group * count // groups for group in range(groups + 1)]
        return [{"params": list(params[a:b])} for a, b in pairwise(bounds)]

    def _copy(self, tensor: Tensor, index: int) -> Tensor:
        return _empty(tuple(tensor.shape), self.shape_set.offset(index), self.dtype, self.device).copy_(tensor)


def make_workload(shape_set: ShapeSet, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Workload:
    """Draws parameters and gradients from the normal distribution."""
    generator = torch.Generator(device).manual_seed(seed)
    params: list[Tensor] = []
    grads: list[Tensor] = []
    for index, shape in enumerate(shape_set.shapes):
        for tensors in (params, grads):
            tensor = _empty(shape, shape_set.offset(index), dtype, torch.device(device))
            tensors.append(tensor.normal_(generator=generator))
    return Workload(shape_set, params, grads)


def _empty(shape: Shape, offset: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(offset + prod(shape), dtype=dtype, device=device)[offset:].view(shape)
