"""The clocks of a GPU on a simulated one: what they measure, and that they know when they cannot."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("rich")
from benchmark_support import benchmarks

clocks = benchmarks("clocks")
measuring = benchmarks("measure")

US = 1e-6
LAUNCH_HOST, KERNEL_WARM, KERNEL_COLD, FLUSH = 8 * US, 5 * US, 9 * US, 100 * US


class Mark:
    def __init__(self, gpu: SimulatedGpu) -> None:
        self.gpu, self.at = gpu, 0.0

    def record(self) -> None:
        self.at = max(self.gpu.now, self.gpu.free_at)

    def query(self) -> bool:
        return self.gpu.now >= self.at

    def elapsed_time(self, end: Mark) -> float:
        return (end.at - self.at) * 1e3


class SimulatedGpu:
    """Host and device clocks that advance by what is called; a queue in between."""

    l2_bytes = 50 << 20

    def __init__(self, queue_waits: bool = False) -> None:
        self.now = self.free_at = 0.0
        self.cold, self.captured, self.flushes = False, [], 0
        self.queue_waits = queue_waits  # the host waits for the device before each launch, as with a full queue

    def clock(self) -> float:
        return self.now

    def synchronize(self) -> None:
        self.now = max(self.now, self.free_at)

    def event(self) -> Mark:
        return Mark(self)

    def _run(self, seconds: float) -> None:
        self.free_at = max(self.now, self.free_at) + seconds

    def flush_l2(self) -> None:
        self.flushes += 1
        self.cold = True
        self._run(FLUSH)

    def keep_busy(self, seconds: float) -> None:
        self._run(seconds)

    def kernel(self) -> None:
        """A step: the host takes a while, and then the device does."""
        self.now += LAUNCH_HOST
        if self.queue_waits:
            self.synchronize()
        self._run(KERNEL_COLD if self.cold else KERNEL_WARM)
        self.cold = False

    def capture(self, step: Callable[[], object]) -> Callable[[], object]:
        number = len(self.captured)
        self.captured.append(0)

        def replay() -> None:
            self.captured[number] += 1
            self.kernel()

        return replay


def three_kernels(gpu: SimulatedGpu) -> Callable[[], None]:
    def step() -> None:
        for _ in range(3):
            gpu.kernel()

    return step


def test_device_time_is_cold_and_free_of_the_host() -> None:
    gpu = SimulatedGpu()
    timed = clocks.DeviceClock(gpu, gpu.clock).timed([three_kernels(gpu)])
    # The host needs 24 µs for what takes the device 19: without work in front, 24 and more would be measured.
    assert timed(4) == pytest.approx(KERNEL_COLD + 2 * KERNEL_WARM)
    assert gpu.flushes >= 4
    assert not clocks.host_bound(timed)


def test_a_device_time_that_waits_for_the_host_says_so() -> None:
    gpu = SimulatedGpu(queue_waits=True)
    timed = clocks.DeviceClock(gpu, gpu.clock).timed([three_kernels(gpu)])
    assert timed(1) > KERNEL_COLD + 2 * KERNEL_WARM
    assert clocks.host_bound(timed)


def test_graph_time_replays_the_sets_in_turn() -> None:
    gpu = SimulatedGpu()
    timed = clocks.GraphClock(gpu, gpu.clock).timed([lambda: None] * 3)
    assert timed(6) == pytest.approx(KERNEL_WARM)
    assert max(gpu.captured) - min(gpu.captured) <= 1
    assert sum(gpu.captured) >= 6
    assert not clocks.host_bound(timed)


def test_host_time_and_wall_time() -> None:
    gpu = SimulatedGpu()
    gpu.free_at = 1.0  # something older is still queued
    assert clocks.HostClock(gpu, gpu.clock).timed([three_kernels(gpu)])(5) == pytest.approx(3 * LAUNCH_HOST)
    wall = clocks.GpuWallClock(gpu, gpu.clock).timed([three_kernels(gpu)])(5)
    assert wall == pytest.approx(3 * LAUNCH_HOST + KERNEL_WARM)


def test_wall_time_on_a_cpu_counts_every_step() -> None:
    calls: list[int] = []
    timed = clocks.WallClock().timed([lambda: calls.append(1)])
    assert timed(7) > 0
    assert len(calls) == 7
    assert not clocks.host_bound(timed)


def test_warm_up_and_rounds() -> None:
    effort = measuring.Effort(min_rounds=3, max_rounds=3, seconds=10)
    asked: list[int] = []

    def timed(repeats: int) -> float:
        asked.append(repeats)
        return 1e-5

    class Clock:
        name, max_repeats = "test", 20

    repeats = measuring.warm_up(timed, Clock())
    assert repeats == 20  # a hundred would make a millisecond
    samples = measuring.measure({"a": timed, "b": lambda repeats: 3e-5}, {"a": repeats, "b": 1}, effort)
    assert asked[-6:] == [20] * 6  # an untimed sample before each
    assert samples["b"].ratio_to(samples["a"]).median == pytest.approx(3)


def test_buffer_sets_fill_the_cache_three_times_but_are_bounded() -> None:
    buffer_sets = benchmarks("runner").buffer_sets
    assert buffer_sets(50 << 20, 1 << 30) == 1
    assert buffer_sets(50 << 20, 60 << 20) == 3
    assert buffer_sets(50 << 20, 1000) == 16
    assert buffer_sets(0, 0) == 1


def test_what_is_counted_in_a_trace() -> None:
    footprint = benchmarks("footprint")
    trace: list[dict[str, Any]] = [
        {"cat": "kernel", "name": "sgd"},
        {"cat": "gpu_user_annotation", "name": "Optimizer.step#SGD.step"},
        {"cat": "cpu_op", "name": "aten::add_"},
        {"name": "[memory]", "ts": 3, "args": {"Bytes": -64}},
        {"name": "[memory]", "ts": 1, "args": {"Bytes": 64}},
        {"name": "[memory]", "ts": 2, "args": {"Bytes": 16}},
    ]
    assert footprint._count(trace, "kernel") == 1
    assert footprint.peak_bytes(trace) == 80
    assert footprint.peak_bytes([]) == 0
    shared = torch.zeros(10)
    assert footprint.state_bytes({"a": {"m": shared, "n": [shared[2:], torch.zeros(3)]}}) == 52


def test_footprint_of_real_steps() -> None:
    make = benchmarks("workload").make_workload
    peers, shapes = benchmarks("peers").PEERS, benchmarks("shapes").ShapeSet
    work = make(shapes("two", "", ((100,), (50, 4))), torch.float32)
    found = {}
    for name in ("ours", "loop"):
        contender = peers[name].set_up(work, 1e-6)
        contender.step()
        found[name] = benchmarks("footprint").footprint(contender, 300)
    assert found["ours"].operators == 0
    assert found["loop"].operators >= 6
    assert found["ours"].peak_extra_bytes == 0
    assert {it.state_bytes_per_parameter for it in found.values()} == {4}
    assert found["ours"].launches is None


def test_the_ceiling_on_a_gpu_compiles() -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    library = benchmarks("peers.flat_cuda").library("sm_90")
    for dtype in ("float32", "bfloat16"):
        function = getattr(library, f"flat_sgd_{dtype}")
        function.restype = ctypes.c_char_p
        numbers = (ctypes.c_int64(0), *(ctypes.c_float(0) for _ in range(3)))
        if not torch.cuda.is_available():  # it returns words, and does not crash
            assert function(ctypes.c_int(0), ctypes.c_int(1), None, None, None, *numbers, None)
