"""What a step's time means: one clock on a CPU, four on a GPU.

A clock makes of a step a function that runs it so many times and returns the seconds one of them took. Everything else
(rounds, order, quartiles) is the same whatever the clock.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from itertools import repeat
from typing import Protocol

from .gpu import Gpu

Step = Callable[[], object]
Timed = Callable[[int], float]
"""Runs so many steps and returns the seconds of one."""

_MAX_LEAD = 0.05  # seconds
_LEAD_TRIES = 4


class Clock(Protocol):
    """Makes timed functions."""

    name: str
    max_repeats: int
    """Steps in one sample at most."""

    def timed(self, sets: Sequence[Step]) -> Timed:
        """Times a step that is given once for each set of buffers; most clocks take the first."""


class WallClock:
    """The time until ``step()`` returns, which on a CPU is when its work is done."""

    name = "wall"
    max_repeats = 1_000_000

    def timed(self, sets: Sequence[Step]) -> Timed:
        """Steps run back to back."""
        step = sets[0]

        def seconds(repeats: int) -> float:
            begin = time.perf_counter_ns()
            for _ in repeat(None, repeats):
                step()
            return (time.perf_counter_ns() - begin) * 1e-9 / repeats

        return seconds


class HostClock:
    """On a GPU: the time until ``step()`` returns, with nothing queued before it."""

    name = "host"
    max_repeats = 100

    def __init__(self, gpu: Gpu, now: Callable[[], float] = time.perf_counter) -> None:
        self._gpu, self._now = gpu, now

    def timed(self, sets: Sequence[Step]) -> Timed:
        """Each step begins on an idle device."""
        step, gpu, now = sets[0], self._gpu, self._now

        def seconds(repeats: int) -> float:
            total = 0.0
            for _ in repeat(None, repeats):
                gpu.synchronize()
                begin = now()
                step()
                total += now() - begin
            gpu.synchronize()
            return total / repeats

        return seconds


class GpuWallClock:
    """On a GPU: the time until one step's work is done, from an idle device, the synchronisation included."""

    name = "wall"
    max_repeats = 100

    def __init__(self, gpu: Gpu, now: Callable[[], float] = time.perf_counter) -> None:
        self._gpu, self._now = gpu, now

    def timed(self, sets: Sequence[Step]) -> Timed:
        """Each step begins on an idle device and is waited for."""
        step, gpu, now = sets[0], self._gpu, self._now

        def seconds(repeats: int) -> float:
            total = 0.0
            for _ in repeat(None, repeats):
                gpu.synchronize()
                begin = now()
                step()
                gpu.synchronize()
                total += now() - begin
            return total / repeats

        return seconds


class DeviceClock:
    """The time on the device, with a cold L2 cache before each step."""

    name = "device"
    max_repeats = 20

    def __init__(self, gpu: Gpu, now: Callable[[], float] = time.perf_counter) -> None:
        self._gpu, self._now = gpu, now

    def timed(self, sets: Sequence[Step]) -> Timed:
        """Flush, start, step, end; the event pairs are added up."""
        span = DeviceSpan(self._gpu, sets[0], self._gpu.flush_l2, self._now)

        def seconds(repeats: int) -> float:
            return sum(span.seconds(1) for _ in range(repeats)) / repeats

        seconds.span = span  # type: ignore[attr-defined]  # host_bound() looks here
        return seconds


class GraphClock:
    """The time on the device of one replay of a CUDA graph that captured the step.

    A replay cannot flush the cache, so as many sets of buffers are stepped in turn as it takes to fill it three times.
    """

    name = "graph"
    max_repeats = 64  # a stream queues about a thousand launches before it makes the host wait

    def __init__(self, gpu: Gpu, now: Callable[[], float] = time.perf_counter) -> None:
        self._gpu, self._now = gpu, now

    def timed(self, sets: Sequence[Step]) -> Timed:
        """Captures the step once for each set and replays the graphs in turn."""
        replays = itertools.cycle([self._gpu.capture(step) for step in sets])
        span = DeviceSpan(self._gpu, lambda: next(replays)(), lambda: None, self._now)

        def seconds(repeats: int) -> float:
            return span.seconds(repeats) / repeats

        seconds.span = span  # type: ignore[attr-defined]
        return seconds


def host_bound(timed: Timed) -> bool:
    """Whether a device time contains waits for the host, which could not queue the work far enough ahead."""
    span = getattr(timed, "span", None)
    return isinstance(span, DeviceSpan) and span.host_bound


class DeviceSpan:
    """The time between two events with steps in between, all of them queued before the device comes to the first.

    Otherwise the device would wait for the host between two launches, and those waits would be counted. So the device
    is kept busy in front of the first event, for longer than the host needs to queue the rest; that this was so is
    checked by asking, when all is queued, whether the first event was still to come.
    """

    def __init__(self, gpu: Gpu, step: Step, before: Step, now: Callable[[], float] = time.perf_counter) -> None:
        self._gpu, self._step, self._before, self._now = gpu, step, before, now
        self._start, self._end = gpu.event(), gpu.event()
        self._lead = 0.0  # seconds a step that the device is kept busy
        self.host_bound = False

    def seconds(self, steps: int) -> float:
        """Of so many steps together."""
        if not self._lead:
            self._lead = min(2 * self._host_seconds() + 20e-6, _MAX_LEAD)
        seconds, ahead = self._try(steps)
        for _ in range(_LEAD_TRIES):
            if ahead or self.host_bound:
                return seconds
            self._lead = min(2 * self._lead, _MAX_LEAD)
            seconds, ahead = self._try(steps)
        self.host_bound = not ahead
        return seconds

    def _host_seconds(self) -> float:
        self._gpu.synchronize()
        begin = self._now()
        self._step()
        seconds = self._now() - begin
        self._gpu.synchronize()
        return seconds

    def _try(self, steps: int) -> tuple[float, bool]:
        self._before()
        self._gpu.keep_busy(min(steps * self._lead, _MAX_LEAD))
        self._start.record()
        for _ in repeat(None, steps):
            self._step()
        self._end.record()
        ahead = not self._start.query()
        self._gpu.synchronize()
        return self._start.elapsed_time(self._end) * 1e-3, ahead
