"""New state tensors, which have accumulated nothing."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from fused_sgd._judge import Group, average_dtype, local
from fused_sgd._native import C
from fused_sgd.reference import fill_unset
from torch import Tensor


def new_momentum_buffer(param: Tensor, options: Group) -> Tensor:
    """A momentum buffer, in the parameter's dtype and strides: all -0.0, or unset where that would not do.

    With -0.0 the formula of later steps gives what the first step must (b = d, to the bit: +0.0 would lose the sign of
    a zero), unless there is dampening or an unusual momentum. Either way a buffer whose first step never came is right.
    """
    ordinary = options["dampening"] == 0 and 0 < options["momentum"] < math.inf

    def make() -> Tensor:
        buffer = torch.empty_like(param, requires_grad=False)
        memory = local(buffer)
        if ordinary:
            (torch.view_as_real(memory.resolve_conj()) if memory.is_complex() else memory).fill_(-0.0)
        else:
            fill_unset(memory)
        return buffer

    return _outside_capture(param.device, make)


def new_average(param: Tensor) -> Tensor:
    """A moving average of the parameter, unset: its first applied step copies."""

    def make() -> Tensor:
        average = torch.empty_like(param, dtype=average_dtype(param.dtype), requires_grad=False)
        fill_unset(local(average))
        return average

    return _outside_capture(param.device, make)


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
