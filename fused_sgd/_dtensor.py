"""DTensors and the memory they stand for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def dtensor(tensor: Tensor) -> Any:
    """The tensor as a DTensor, or None."""
    if type(tensor).__name__ != "DTensor":
        return None
    from torch.distributed.tensor import DTensor

    return tensor if type(tensor) is DTensor else None


def local(tensor: Tensor) -> Tensor:
    """The memory a tensor stands for: its local shard for a DTensor, else itself."""
    sharded = dtensor(tensor)
    return tensor if sharded is None else sharded._local_tensor


def placed_like(param: Tensor, memory: Tensor, shape: torch.Size | None = None) -> Tensor:
    """A tensor whose local part is ``memory``, placed as the parameter is; of the parameter's shape or another."""
    sharded = dtensor(param)
    if sharded is None:
        return memory
    from torch.distributed.tensor import DTensor

    whole = param if shape is None else torch.empty(shape, device="meta")
    placed: Tensor = DTensor.from_local(
        memory,
        sharded.device_mesh,
        sharded.placements,
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )
    return placed
