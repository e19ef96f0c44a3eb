"""What a step asks for besides time: launches, operators, memory. Counted in a trace of torch's profiler."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from .clocks import Step
from .peers import Contender

_OPERATORS, _KERNELS = "cpu_op", "kernel"  # categories of events in a trace
_COPIES = ("gpu_memcpy", "gpu_memset")
_MEMORY = "[memory]"


@dataclass(frozen=True)
class Footprint:
    """Of one step that is neither the first nor the last.

    Attributes:
        launches: kernels on the GPU; None on a CPU, or where the profiler saw none.
        copies: copies and fills on the GPU, of which the same holds.
        operators: calls of torch's operators, nested ones included: on a CPU, each is at least one pass over memory.
        peak_extra_bytes: the most that torch's allocator gave out at once beyond what was in use before the step.
        state_bytes_per_parameter: of the optimizer's state, by elements of parameters.
    """

    launches: int | None = None
    copies: int | None = None
    operators: int | None = None
    peak_extra_bytes: int | None = None
    state_bytes_per_parameter: float | None = None


def footprint(contender: Contender, elements: int) -> Footprint:
    """Of a contender that has stepped before; nothing is known of one in another process."""
    if contender.timed is not None:
        return Footprint()
    state = None
    if contender.optimizer is not None and elements:
        state = state_bytes(contender.optimizer.state) / elements
    if contender.params and contender.params[0].is_cuda:
        _trace(contender.step, on_gpu=True)  # the first trace of a process misses events while the profiler starts
        events = _trace(contender.step, on_gpu=True)
        launches, copies = _count(events, _KERNELS), sum(_count(events, kind) for kind in _COPIES)
        seen = launches + copies > 0
        return Footprint(
            launches=launches if seen else None,
            copies=copies if seen else None,
            operators=_count(events, _OPERATORS),
            peak_extra_bytes=_peak_on_gpu(contender.step),
            state_bytes_per_parameter=state,
        )
    events = _trace(contender.step, on_gpu=False)
    return Footprint(
        operators=_count(events, _OPERATORS),
        peak_extra_bytes=peak_bytes(events),
        state_bytes_per_parameter=state,
    )


def _trace(step: Step, on_gpu: bool) -> list[dict[str, Any]]:
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    if on_gpu:
        torch.cuda.synchronize()  # nothing older is to be in the trace
    with _quiet_stderr(), profile(activities=activities, profile_memory=not on_gpu) as profiler:
        step()
        if on_gpu:
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory(prefix="fused-sgd-benchmark-") as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        events: list[dict[str, Any]] = json.loads(file.read_text(errors="replace"))["traceEvents"]
    return events


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """The profiler writes notes there, past Python."""
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:  # noqa: PTH123  # as a file descriptor
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _count(events: Iterable[Mapping[str, Any]], category: str) -> int:
    return sum(event.get("cat") == category for event in events)


def peak_bytes(events: Iterable[Mapping[str, Any]]) -> int:
    """The highest sum of what was allocated and freed so far, or 0."""
    memory = sorted((event for event in events if event.get("name") == _MEMORY), key=lambda event: float(event["ts"]))
    now = peak = 0
    for event in memory:
        now += int(event["args"]["Bytes"])
        peak = max(peak, now)
    return peak


def _peak_on_gpu(step: Step) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def state_bytes(state: Any) -> int:
    """Of all tensors found in it, each storage counted once."""
    storages: dict[int, int] = {}
    _collect(state, storages, set())
    return sum(storages.values())


def _collect(value: Any, storages: dict[int, int], seen: set[int]) -> None:
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        storage = value.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    elif isinstance(value, Mapping):
        for item in value.values():
            _collect(item, storages, seen)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _collect(item, storages, seen)
    elif hasattr(value, "__dict__") and not isinstance(value, type):  # a library's own kind of tensor
        _collect(vars(value), storages, seen)
