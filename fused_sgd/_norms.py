"""Norms over processes, and over parameters that no kernel takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from fused_sgd._dtensor import dtensor, local
from fused_sgd._precision import Group
from fused_sgd.reference import any_nonfinite, global_norm
from torch import Tensor

Reduce = Callable[[Tensor], None]


class TrustRatio(NamedTuple):
    """What the last step found of one parameter; 0-dim float64 tensors on its device."""

    group: int
    parameter: int  # its index in the group
    param_norm: Tensor  # L2, before the step
    grad_norm: Tensor  # L2, after unscaling and clipping
    ratio: Tensor  # what the gradient with its penalty was multiplied by, without the learning rate
    name: str | None  # where the optimizer was given named parameters


class Found(NamedTuple):
    """What a step found that was not, or not in all, the plan's."""

    calls: int | None  # the plan's count of calls then: as long as it is the same, the step was the last one
    totals: Tensor | None  # as squares() returns them; None where the plan has them, or nobody
    ratios: list[TrustRatio]


def make_reduce(groups: list[Group], process_group: Any) -> Reduce | None:
    """What adds up a tensor over the processes that hold parts of the parameters, in place; None where each has all.

    Args:
        groups: the optimizer's param groups. DTensors tell by themselves which processes hold their shards.
        process_group: where parameters are plain tensors and each a shard, the processes that hold the others.
    """
    if process_group is not None:

        def reduce_over_group(sums: Tensor) -> None:
            torch.distributed.all_reduce(sums, group=process_group)

        return reduce_over_group
    places = {_shards(param) for group in groups for param in group["params"]}
    if places <= {None}:
        return None

    def reduce_over_mesh(sums: Tensor) -> None:
        if len(places) != 1:
            raise RuntimeError(
                "there is no global norm of parameters that are sharded in different ways, or of which only some are"
                " sharded; give such parameters optimizers of their own"
            )
        (place,) = places
        assert place is not None
        mesh, dims = place
        for dim in dims:
            torch.distributed.all_reduce(sums, group=mesh.get_group(dim))

    return reduce_over_mesh


def _shards(param: Tensor) -> tuple[Any, tuple[int, ...]] | None:
    """The mesh of a DTensor and its dimensions that shard it; None where every process has all of it."""
    sharded = dtensor(param)
    if sharded is None:
        return None
    dims = tuple(dim for dim, placement in enumerate(sharded.placements) if placement.is_shard())
    return (sharded.device_mesh, dims) if dims else None


def squares(grads: Iterable[Tensor], grad_scale: float | Tensor | None) -> Tensor:
    """The sum of squares of the local parts of gradients, and 1 if one is not finite: float64, of shape (2,)."""
    parts = [local(grad) for grad in grads]
    nonfinite = any_nonfinite(parts)
    square = global_norm(parts, grad_scale).square()
    return torch.stack([square, nonfinite.to(square)])
