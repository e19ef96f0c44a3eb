"""New state tensors, which have accumulated nothing."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from fused_sgd._dtensor import local, placed_like
from fused_sgd._judge import average_dtype
from fused_sgd._native import C
from fused_sgd._precision import Group, scale_shape, storage
from fused_sgd._storage import int8_unset
from fused_sgd.reference import fill_unset
from torch import Tensor


def new_state(key: str, param: Tensor, groups: list[Group], group: int) -> Tensor:
    """What a parameter's state has under a key in the beginning.

    Args:
        key: one of ``state_tensors()``.
        param: the parameter.
        groups: the optimizer's param groups.
        group: the number of the parameter's.
    """
    return _outside_capture(param.device, lambda: _new_state(key, param, groups, group))


def _new_state(key: str, param: Tensor, groups: list[Group], group: int) -> Tensor:
    if key == "momentum_buffer":
        return _new_momentum_buffer(param, groups[group])
    if key == "ema":
        return _unset(param, average_dtype(param.dtype))
    if key == "master":
        return param.detach().to(torch.float32)
    if key == "remainder":
        return torch.zeros_like(param, dtype=torch.int16, requires_grad=False)
    if key == "rounding":  # seed, number of the parameter, steps; see csrc/core/stochastic.h
        return torch.tensor([0, _number(param, groups, group), 0, 0], dtype=torch.int64, device=param.device)
    memory = local(param)
    codes, scale = int8_unset(memory.shape, device=memory.device)
    return placed_like(param, codes) if key == "momentum_codes" else placed_like(param, scale, scale_shape(param))


def _number(param: Tensor, groups: list[Group], group: int) -> int:
    """A parameter's number in the optimizer, counted over its groups."""
    before = sum(len(earlier["params"]) for earlier in groups[:group])
    return before + next(index for index, one in enumerate(groups[group]["params"]) if one is param)


def _new_momentum_buffer(param: Tensor, options: Group) -> Tensor:
    """A momentum buffer in the parameter's strides: all -0.0, or unset where that would not do.

    With -0.0 the formula of later steps gives what the first step must (b = d, to the bit: +0.0 would lose the sign of
    a zero), unless there is dampening or an unusual momentum. Either way a buffer whose first step never came is right.
    """
    dtype = storage(options, param).momentum_dtype
    if options["dampening"] != 0 or not 0 < options["momentum"] < math.inf:
        return _unset(param, dtype)
    buffer = torch.empty_like(param, dtype=dtype, requires_grad=False)
    memory = local(buffer)
    (torch.view_as_real(memory.resolve_conj()) if memory.is_complex() else memory).fill_(-0.0)
    return buffer


def _unset(param: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor like the parameter, in which nothing was accumulated: its first applied step copies."""
    tensor = torch.empty_like(param, dtype=dtype, requires_grad=False)
    fill_unset(local(tensor))
    return tensor


def _outside_capture(device: torch.device, make: Callable[[], Tensor]) -> Tensor:
    """Makes a tensor now, in ordinary memory, even while a CUDA graph is captured, of which that is to be no part.

    A graph that filled a new buffer would fill it again at each replay, and memory from the graph's own pool may be
    written by what the graph did earlier.
    """
    with torch.inference_mode(False), torch.no_grad():
        if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
            return make()
        assert C is not None
        mode = C.relax_capture_mode()
        try:
            stream = _stream_outside_capture(device)
            with torch.cuda.stream(stream):
                tensor = make()
            stream.synchronize()
        finally:
            C.restore_capture_mode(mode)
        # To torch's allocator the memory is the side stream's. Where it is used, that must know, or it would give freed
        # memory to the side stream while a step still runs: here, and where most replays are. (Keeping note of this is
        # all that happens now; events are recorded when the memory is freed.)
        for user in (torch.cuda.current_stream(device), torch.cuda.default_stream(device)):
            local(tensor).record_stream(user)
        return tensor


_side_streams: dict[torch.device, torch.cuda.Stream] = {}


def _stream_outside_capture(device: torch.device) -> torch.cuda.Stream:
    """A stream that is not captured; the same one each time, since its memory is of use to no other stream.

    torch hands out 32 streams a device in turn, and the one that is captured may be among them.
    """
    for _ in range(64):
        stream = _side_streams.get(device)
        if stream is not None:
            with torch.cuda.stream(stream):
                if not torch.cuda.is_current_stream_capturing():
                    return stream
        _side_streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    raise RuntimeError(f"every stream of {device} is being captured")
