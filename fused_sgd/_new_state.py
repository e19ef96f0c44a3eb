"""New state tensors, which have accumulated nothing."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

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
    with torch.inference_mode(False), torch.no_grad(), _outside_capture(param.device):
        buffer = torch.empty_like(param, requires_grad=False)
        memory = local(buffer)
        if ordinary:
            (torch.view_as_real(memory.resolve_conj()) if memory.is_complex() else memory).fill_(-0.0)
        else:
            fill_unset(memory)
    return buffer


def new_average(param: Tensor) -> Tensor:
    """A moving average of the parameter, unset: its first applied step copies."""
    with torch.inference_mode(False), torch.no_grad(), _outside_capture(param.device):
        average = torch.empty_like(param, dtype=average_dtype(param.dtype), requires_grad=False)
        fill_unset(local(average))
    return average


@contextlib.contextmanager
def _outside_capture(device: torch.device) -> Iterator[None]:
    """Lets work be done now, in ordinary memory, even while a CUDA graph is captured, of which it is to be no part.

    A graph that filled a new buffer would fill it again at each replay, and memory from the graph's own pool may be
    written by what the graph did earlier.
    """
    if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        yield
        return
    assert C is not None
    mode = C.relax_capture_mode()
    try:
        stream = _stream_outside_capture(device)
        with torch.cuda.stream(stream):
            yield
        stream.synchronize()
    finally:
        C.restore_capture_mode(mode)


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
