"""optax, in a process of its own: its runtime would fight torch's for the cores, and reads its own clock."""

from __future__ import annotations

import importlib.util
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..workload import MOMENTUM, WEIGHT_DECAY, Workload
from .base import CannotRun, Contender, Peer

WORKER = Path(__file__).with_name("optax_worker.py")


class Worker:
    """The other process. Messages are pickled, one answer to each: the worker is ours, and so is the pipe."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )

    def ask(self, what: str, *arguments: Any) -> Any:
        """Raises ``RuntimeError`` with the worker's error, or when it has died."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            pickle.dump((what, *arguments), self._process.stdin)
            self._process.stdin.flush()
            ok, answer = pickle.load(self._process.stdout)
        except (OSError, EOFError) as error:
            raise RuntimeError(f"optax's process has died with status {self._process.poll()}") from error
        if not ok:
            raise RuntimeError(answer)
        return answer

    def close(self) -> None:
        """Ends it; it may be called again."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


def _optax(workload: Workload, lr: float) -> Contender:
    for module in ("jax", "optax"):
        if importlib.util.find_spec(module) is None:
            raise CannotRun(f"No module named '{module}'")
    if workload.device.type != "cpu":
        raise CannotRun("measured on the CPU only")
    worker = Worker()
    try:
        arrays = ([_as_numpy(t) for t in workload.params], [_as_numpy(t) for t in workload.grads])
        worker.ask("set_up", workload.dtype == torch.bfloat16, *arrays, lr, MOMENTUM, WEIGHT_DECAY)
        del arrays
    except BaseException:
        worker.close()
        raise

    def results() -> list[Tensor]:
        return [_as_tensor(array, workload.dtype) for array in worker.ask("results")]

    def timed(repeats: int) -> float:
        seconds: float = worker.ask("step", repeats, torch.get_num_threads())
        return seconds

    return Contender(lambda: timed(1), [], results=results, timed=timed, close=worker.close)


def _as_numpy(tensor: Tensor) -> Any:
    # numpy knows no bfloat16: its bits travel.
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _as_tensor(array: Any, dtype: torch.dtype) -> Tensor:
    tensor = torch.from_numpy(array.copy())
    return tensor.view(dtype) if dtype == torch.bfloat16 else tensor


OPTAX = Peer("optax", _optax, compiles=True)
