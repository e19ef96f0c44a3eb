"""Compiles flat_loop.cpp for this machine and calls it on tensors."""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("flat_loop.cpp")
FLAGS = ("-std=c++20", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")


def compiler() -> str:
    """The C++ compiler's command."""
    return os.environ.get("CXX", "c++")


@functools.cache
def _library() -> ctypes.CDLL:
    # Compiled for each run, which takes a second: a kept one could be stale, or another user's.
    with tempfile.TemporaryDirectory(prefix="fused-sgd-benchmark-") as folder:
        library = Path(folder) / "flat_loop.so"
        command = [compiler(), *FLAGS, str(SOURCE), "-o", str(library)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except FileNotFoundError as error:
            raise RuntimeError(f"the flat loop needs a C++ compiler, and there is no {compiler()}; set CXX") from error
        except subprocess.CalledProcessError as error:
            raise RuntimeError(f"{' '.join(command)} failed:\n{error.stderr.strip()}") from error
        # Its libgomp.so.1 is found among the loaded ones: torch's, so that both run on the same threads.
        return ctypes.CDLL(str(library))


def flat_loop(
    param: Tensor, grad: Tensor, momentum_buffer: Tensor, *, lr: float, momentum: float, weight_decay: float
) -> Callable[[], None]:
    """One step of SGD on flat tensors, in place, on as many threads as torch uses when it is called."""
    tensors = (param, grad, momentum_buffer)
    for tensor in tensors:
        assert tensor.is_contiguous()
        assert (tensor.device.type, tensor.dtype, tensor.shape) == ("cpu", param.dtype, (param.numel(),))
    function = getattr(_library(), f"flat_sgd_{str(param.dtype).removeprefix('torch.')}")
    function.restype = None
    # Made once: the loop is to take the time, not the conversion of its arguments.
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
    values = [ctypes.c_float(value) for value in (lr, momentum, weight_decay)]
    arguments = (*pointers, ctypes.c_int64(param.numel()), *values)

    def step(_alive: tuple[Tensor, ...] = tensors) -> None:  # the pointers alone would not keep the tensors
        function(*arguments, torch.get_num_threads())

    return step
