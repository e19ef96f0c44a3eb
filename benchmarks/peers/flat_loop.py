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

from .base import CannotRun

SOURCE = Path(__file__).with_name("flat_loop.cpp")
FLAGS = ("-std=c++20", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")


def compiler() -> str:
    """The C++ compiler's command."""
    return os.environ.get("CXX", "c++")


def build(command: list[str], source: Path, variable: str) -> ctypes.CDLL:
    """Compiles one file into a library and loads it.

    For each run anew, which takes seconds: a kept one could be stale, or another user's.

    Args:
        command: the compiler and its flags.
        source: the file.
        variable: the environment variable that names another compiler.

    Raises:
        CannotRun: there is no compiler, or it fails.
    """
    with tempfile.TemporaryDirectory(prefix="fused-sgd-benchmark-") as folder:
        library = Path(folder) / f"{source.stem}.so"
        whole = [*command, str(source), "-o", str(library)]
        try:
            subprocess.run(whole, check=True, capture_output=True, text=True)
        except FileNotFoundError as error:
            raise CannotRun(f"{source.name} needs a compiler, and there is no {command[0]}; set {variable}") from error
        except subprocess.CalledProcessError as error:
            raise CannotRun(f"{' '.join(whole)} failed:\n{error.stderr.strip()}") from error
        return ctypes.CDLL(str(library))


@functools.cache
def _library() -> ctypes.CDLL:
    # Its libgomp.so.1 is found among the loaded ones: torch's, so that both run on the same threads.
    return build([compiler(), *FLAGS], SOURCE, "CXX")


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
