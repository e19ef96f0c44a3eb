"""Copies and checkpoints: what torch would cast, copy or misunderstand on the way."""

from __future__ import annotations

from typing import Any

import torch
from fused_sgd.reference import is_unset
from torch import Tensor

# What decides HOW a group is stepped belongs to the running optimizer, not to a checkpoint.
STORAGE_KEYS = ("momentum_dtype", "master_weights", "stochastic_rounding")
PATH_KEYS = ("fused", "foreach", "differentiable", "ema_decay", *STORAGE_KEYS)
# Those that torch.optim.SGD does not have, and what they are when they are off: a checkpoint then goes without them.
OFF = {
    "momentum_dtype": None,
    "master_weights": None,
    "stochastic_rounding": False,
    "ema_decay": None,
}

# State that keeps the dtype it was saved in. torch casts to the parameter's: an average would lose bits, codes their
# meaning. (What the options ask for is settled afterwards, by _precision.convert().)
_KEPT = ("momentum_buffer", "momentum_codes", "momentum_scale", "master", "remainder", "rounding", "ema")


class _AsSaved:
    """A state tensor on its way through torch's load_state_dict(), which casts tensors and leaves other objects."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def as_saved(state_dict: dict[str, Any]) -> dict[str, Any]:
    """A copy of a state dict in which the tensors that are not to be cast are wrapped."""
    state = {
        number: {
            key: _AsSaved(value) if key in _KEPT and isinstance(value, Tensor) else value for key, value in kept.items()
        }
        if isinstance(kept, dict)
        else kept
        for number, kept in state_dict["state"].items()
    }
    return {**state_dict, "state": state}


def unpack(state: dict[Any, Any]) -> None:
    """Unwraps, in place, what :func:`as_saved` wrapped, and brings it to the parameter's device.

    Entries of something that is no parameter of the optimizer stay as they are, as in torch.
    """
    for param, kept in state.items():
        if not isinstance(kept, dict):
            continue
        for key, value in kept.items():
            if isinstance(value, _AsSaved):
                kept[key] = value.tensor.to(param.device) if isinstance(param, Tensor) else value.tensor


def without_unset_momentum(kept: Any) -> Any:
    """A parameter's state without a momentum in which nothing was accumulated; waits for the GPU.

    torch takes a buffer that is missing for a first step, and the NaN of one that is unset for a number. Buffers are
    unset as a whole, so one element tells.
    """
    if not isinstance(kept, dict):
        return kept
    for tells, keys in (
        ("momentum_buffer", ("momentum_buffer",)),
        ("momentum_scale", ("momentum_codes", "momentum_scale")),
    ):
        tensor = kept.get(tells)
        if type(tensor) is not Tensor or tensor.layout != torch.strided or not tensor.numel():
            continue
        if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.itemsize == 1:
            continue
        if bool(is_unset(tensor[(0,) * tensor.dim()])):
            kept = {key: value for key, value in kept.items() if key not in keys}
    return kept


class Shared:
    """Something that copies of an optimizer share, as no process group can be copied."""

    def __init__(self, it: Any) -> None:
        self.it = it

    def __deepcopy__(self, memo: dict[int, Any]) -> Shared:
        return self
