"""The few calls to a GPU that the clocks are made of. The tests put a simulated one in their place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

_FLUSH_L2_TIMES = 4  # how many times the L2 cache the flush buffer is
_MIN_FLUSH_BYTES = 256 << 20
_CALIBRATION_CYCLES = 20_000_000


class Event(Protocol):
    """A mark in the device's stream, like ``torch.cuda.Event``."""

    def record(self) -> None:
        """Puts the mark behind what is queued."""

    def query(self) -> bool:
        """Whether the device has come to it."""

    def elapsed_time(self, end: Any) -> float:
        """Milliseconds to another mark."""


class Gpu(Protocol):
    """One device and its current stream."""

    l2_bytes: int

    def synchronize(self) -> None:
        """Waits for everything queued."""

    def event(self) -> Event:
        """A new mark."""

    def flush_l2(self) -> None:
        """Queues work after which nothing older is in the L2 cache."""

    def keep_busy(self, seconds: float) -> None:
        """Queues work that takes about so long and touches no memory."""

    def capture(self, step: Callable[[], object]) -> Callable[[], object]:
        """A function that replays a CUDA graph of the step."""


class CudaGpu:
    """The current CUDA device."""

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        self.l2_bytes: int = properties.L2_cache_size
        # One buffer, made once: memory that came and went between samples would move what is measured.
        bytes_ = max(_FLUSH_L2_TIMES * self.l2_bytes, _MIN_FLUSH_BYTES)
        self._flush = torch.ones(bytes_ // 4, dtype=torch.float32, device="cuda")
        self._sum = torch.empty((), dtype=torch.float32, device="cuda")
        self._pool = torch.cuda.graph_pool_handle()  # type: ignore[no-untyped-call]
        self._cycles_per_second = self._calibrate()

    def synchronize(self) -> None:
        """Waits for everything queued."""
        torch.cuda.synchronize()

    def event(self) -> Event:
        """A new mark."""
        return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call,no-any-return]

    def flush_l2(self) -> None:
        """Reads a buffer several times the cache. Writing it would leave lines for the timed step to write back."""
        torch.sum(self._flush, dim=0, out=self._sum)

    def keep_busy(self, seconds: float) -> None:
        """Spins one thread."""
        torch.cuda._sleep(max(1, int(seconds * self._cycles_per_second)))

    def capture(self, step: Callable[[], object]) -> Callable[[], object]:
        """Captures after two steps on a side stream, as torch asks for; all graphs share one pool of memory."""
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(current)
        with torch.cuda.stream(side):
            step()
            step()
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool):  # type: ignore[no-untyped-call]
                step()
        except BaseException:
            # What a broken capture left in the pool is not to fail the next peer's.
            self._pool = torch.cuda.graph_pool_handle()  # type: ignore[no-untyped-call]
            raise
        return graph.replay

    def _calibrate(self) -> float:
        start, end = self.event(), self.event()
        torch.cuda._sleep(_CALIBRATION_CYCLES)  # the first one also loads the kernel and raises the clock
        start.record()
        torch.cuda._sleep(_CALIBRATION_CYCLES)
        end.record()
        self.synchronize()
        return _CALIBRATION_CYCLES / (start.elapsed_time(end) * 1e-3)
