"""Compiles flat_cuda.cu with nvcc and calls it on tensors. The library needs neither torch nor the network."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .flat_loop import build

SOURCE = Path(__file__).with_name("flat_cuda.cu")
FLAGS = ("-std=c++17", "-O3", "-shared", "-Xcompiler", "-fPIC", "-cudart", "static")
_PACKS = (1, 2, 4)
_TRIAL_BYTES = 256 << 20  # of one array
_TRIALS = 5


def nvcc() -> str:
    """The CUDA compiler's command."""
    return os.environ.get("NVCC", "nvcc")


def library(architecture: str) -> ctypes.CDLL:
    """The compiled file, for an architecture such as ``sm_90``."""
    return build([nvcc(), *FLAGS, f"-arch={architecture}"], SOURCE, "NVCC")


@functools.cache
def _library() -> ctypes.CDLL:
    major, minor = torch.cuda.get_device_capability()
    return library(f"sm_{major}{minor}")


def flat_cuda(
    param: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor,
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    packs: int | None = None,
) -> Callable[[], None]:
    """One step of SGD on flat CUDA tensors, in place, on the stream that is current when it is called.

    A thread has ``packs`` times 16 bytes of each array in flight; None for the number that is fastest on this device.
    """
    for tensor in (param, grad, momentum_buffer):
        assert tensor.is_contiguous()
        assert tensor.is_cuda
        assert tensor.data_ptr() % 16 == 0
        assert (tensor.dtype, tensor.shape) == (param.dtype, (param.numel(),))
    function = getattr(_library(), f"flat_sgd_{str(param.dtype).removeprefix('torch.')}")
    function.restype = ctypes.c_char_p
    arguments = (
        ctypes.c_int(param.device.index),
        ctypes.c_int(packs or best_packs(param.dtype)),
        *(ctypes.c_void_p(tensor.data_ptr()) for tensor in (param, grad, momentum_buffer)),
        ctypes.c_int64(param.numel()),
        *(ctypes.c_float(value) for value in (lr, momentum, weight_decay)),
    )

    def step(_alive: tuple[Tensor, ...] = (param, grad, momentum_buffer)) -> None:  # pointers keep no tensor alive
        error = function(*arguments, ctypes.c_void_p(torch.cuda.current_stream().cuda_stream))
        if error is not None:
            raise RuntimeError(f"flat_cuda: {error.decode()}")

    return step


@functools.cache
def best_packs(dtype: torch.dtype) -> int:
    """How many packs a thread should have in flight: a ceiling must not be low for want of trying."""
    arrays = [torch.zeros(_TRIAL_BYTES // dtype.itemsize, dtype=dtype, device="cuda") for _ in range(3)]
    times = {}
    for packs in _PACKS:
        step = flat_cuda(*arrays, lr=1e-6, momentum=0.9, weight_decay=1e-4, packs=packs)
        step()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        for _ in range(_TRIALS):
            step()
        end.record()
        end.synchronize()
        times[packs] = start.elapsed_time(end)
    return min(times, key=lambda packs: times[packs])
