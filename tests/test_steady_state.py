"""A steady-state step allocates nothing per tensor, in Python and below it, and tells autograd what it wrote."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from fused_sgd import FusedLARS, FusedSGD

from support import assert_same, copies, make_params, set_grads, snapshot

pytestmark = pytest.mark.usefixtures("device")


def steady(count: int, groups: bool = False) -> FusedSGD:
    params = make_params([(17,)] * count)
    set_grads(params, seed=0)
    optimizer = FusedSGD([{"params": [p]} for p in params] if groups else params, lr=0.1, momentum=0.9, fused=True)
    for _ in range(3):
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("groups", [False, True])
def test_no_python_object_per_tensor(groups: bool) -> None:
    def objects_made(count: int) -> tuple[int, int]:
        """Bytes at the peak and blocks kept, of the step with the fewest: a test runner's threads allocate too."""
        optimizer = steady(count, groups)
        steps = []
        gc.collect()
        gc.disable()
        tracemalloc.start()
        for _ in range(10):
            before = sys.getallocatedblocks()
            tracemalloc.reset_peak()
            start = tracemalloc.get_traced_memory()[0]
            optimizer.step()
            peak = tracemalloc.get_traced_memory()[1] - start
            steps.append((peak, sys.getallocatedblocks() - before))
        tracemalloc.stop()
        gc.enable()
        return min(peak for peak, _ in steps), min(kept for _, kept in steps)

    few, many = objects_made(2), objects_made(500)
    assert many[0] <= few[0] + 64, "Python memory grows with the number of tensors"
    assert many[1] <= few[1] + 8


COUNTER = r"""
#include <atomic>
#include <cstddef>
extern "C" void* __libc_malloc(std::size_t);
extern "C" void* __libc_calloc(std::size_t, std::size_t);
extern "C" void* __libc_realloc(void*, std::size_t);
static std::atomic<long> calls{0};
extern "C" long allocation_calls() { return calls; }
extern "C" void* malloc(std::size_t n) { ++calls; return __libc_malloc(n); }
extern "C" void* calloc(std::size_t n, std::size_t m) { ++calls; return __libc_calloc(n, m); }
extern "C" void* realloc(void* p, std::size_t n) { ++calls; return __libc_realloc(p, n); }
"""

COUNT = """
import ctypes, sys, torch
from fused_sgd import FusedSGD
calls = ctypes.CDLL(None).allocation_calls
calls.restype = ctypes.c_long
torch.set_num_threads(2)
for length in (17, 20000):  # short work, and work for both threads
    for count in (2, 300):
        params = [torch.randn(length).requires_grad_() for _ in range(count)]
        for p in params:
            p.grad = torch.randn(length)
        optimizer = FusedSGD(params, lr=0.1, momentum=0.9, fused=True)
        for _ in range(3):
            optimizer.step()
        steps = []
        for _ in range(5):
            before = calls()
            optimizer.step()
            steps.append(calls() - before)
        print(min(steps))
"""


@pytest.mark.cpu_only
def test_no_allocation_per_tensor(tmp_path: Path) -> None:
    """Every malloc of a step is counted, by a library put in front of libc's."""
    compiler = shutil.which("c++")
    if compiler is None or sys.platform != "linux":
        pytest.skip("counting allocations needs Linux and a C++ compiler")
    (tmp_path / "counter.cpp").write_text(COUNTER)
    library = tmp_path / "counter.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", tmp_path / "counter.cpp", "-o", library], check=True)
    result = subprocess.run(
        [sys.executable, "-c", COUNT], capture_output=True, text=True, cwd="/",
        env={**os.environ, "LD_PRELOAD": str(library)},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    small_few, small_many, large_few, large_many = map(int, result.stdout.split())
    assert small_many <= small_few
    assert large_many <= large_few


def test_steps_reuse_their_memory() -> None:
    optimizer = steady(100)
    pointers = [inner["momentum_buffer"].data_ptr() for inner in optimizer.state.values()]
    for _ in range(3):
        optimizer.step()
    assert pointers == [inner["momentum_buffer"].data_ptr() for inner in optimizer.state.values()]


def test_a_skipped_step_leaves_no_stale_gradient(isa: str) -> None:
    """A step that packed its tables anew and was skipped is not what the next one may compare itself with."""
    shapes = [(5000,), (3, 5)]
    params, expected = make_params(shapes), make_params(shapes)
    optimizers = [
        FusedSGD([{"params": [p]} for p in group], lr=0.1, momentum=0.9, skip_nonfinite=True, fused=fused)
        for group, fused in ((params, True), (expected, False))
    ]
    finite = [torch.randn_like(p) for p in params]
    infinite = [torch.full_like(p, torch.inf) for p in params]
    for grads in (finite, finite, infinite, finite):
        for optimizer, group in zip(optimizers, (params, expected), strict=True):
            if grads is infinite:
                optimizer.param_groups[1]["lr"] = 0.2  # another set of hyperparameters: the tables are packed anew
            for p, grad in zip(group, grads, strict=True):
                p.grad = grad
            optimizer.step()
        for mine, theirs in zip(params, expected, strict=True):
            assert torch.equal(mine, theirs)
    assert [optimizer.skipped_steps for optimizer in optimizers] == [1, 1]


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}, {"ema_decay": 0.9}], ids=str)
@pytest.mark.parametrize("shapes", [500 * [(160,)], [(1_500_000,), (3,)], [(0,)], [(0,), (5,)]], ids=["many", *"123"])
@pytest.mark.parametrize("make", [FusedSGD, FusedLARS])
def test_each_step_counts_one_version(make: Any, shapes: list[tuple[int, ...]], options: dict[str, Any]) -> None:
    params = make_params(shapes)
    optimizer = make(params, lr=0.1, momentum=0.9, weight_decay=0.01, fused=True, **options)
    set_grads(params, seed=0)
    optimizer.step()
    written = [tensor for p in params for tensor in (p, *optimizer.state[p].values())]
    for _ in range(3):
        before = [tensor._version for tensor in written]
        optimizer.step()
        assert [tensor._version for tensor in written] == [version + 1 for version in before]


@pytest.mark.cpu_only
@pytest.mark.parametrize("changed", [0, 150, 299], ids="parameter {}".format)
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_look_at_everything_before_any_of_them_writes(threads: int, changed: int) -> None:
    """Each looks at its part of the plan; what one of them finds keeps the others from walking."""
    torch.set_num_threads(threads)
    params = make_params(300 * [(200,)])
    expected = copies(params)
    mine, theirs = (
        FusedSGD(group, lr=0.1, momentum=0.9, ema_decay=0.9, fused=fused)
        for group, fused in ((params, True), (expected, False))
    )
    for step in range(7):
        set_grads(params, expected, seed=step)
        if step == 3:
            params[changed].data, expected[changed].data = (group[changed].detach() + 1 for group in (params, expected))
        if step in (4, 5):
            params[changed].grad = expected[changed].grad = None
        mine.step()
        theirs.step()
        assert_same(mine, theirs, params, expected, f"at step {step}")
    params[changed].grad = params[changed].detach()
    unchanged = snapshot(mine)
    with pytest.raises(RuntimeError, match="shares memory"):
        mine.step()
    unchanged()


@pytest.mark.cpu_only
@pytest.mark.parametrize("failing", [0, 150, 299], ids="parameter {}".format)
def test_a_thread_that_fails_keeps_the_others_from_walking(failing: int) -> None:
    torch.set_num_threads(2)
    params = make_params(300 * [(200,)])
    optimizer = FusedSGD(params, lr=0.1, fused=True)
    set_grads(params, seed=0)
    for _ in range(3):
        optimizer.step()
    others = params[:failing] + params[failing + 1 :]
    before = [p.detach().clone() for p in others]
    torch._C._set_throw_on_mutable_data_ptr(params[failing])  # type: ignore[attr-defined]
    for _ in range(2):
        with pytest.raises(RuntimeError):
            optimizer.step()
        assert all(map(torch.equal, before, others))


@pytest.mark.cpu_only
def test_a_lazy_copy_that_two_threads_would_write() -> None:
    """Copying is left to one thread; the clone keeps its values."""
    torch.set_num_threads(2)
    memory = torch.ones(40_000)
    params = [part.requires_grad_() for part in memory.split(20_000)]
    set_grads(params, seed=0)
    optimizer = FusedSGD(params, lr=0.1, fused=True)
    for _ in range(3):
        optimizer.step()
    before = memory.clone()
    clone = torch._lazy_clone(memory)
    optimizer.step()
    for part, was, p in zip(clone.split(20_000), before.split(20_000), params, strict=True):
        assert p.grad is not None
        assert torch.equal(part, was)
        torch.testing.assert_close(p.detach(), was - 0.1 * p.grad)


THREADS = """
import torch
from fused_sgd import FusedLARS, FusedSGD
torch.set_num_threads(4)
for make in (FusedSGD, FusedLARS):
    optimizers = []
    for fused in (True, False):
        params = [torch.full((5000,), float(i)).requires_grad_() for i in range(200)]
        for p in params:
            p.grad = torch.ones_like(p)
        optimizers.append((make(params, lr=0.1, momentum=0.9, weight_decay=0.1, fused=fused), params))
    for _ in range(20):
        for optimizer, _ in optimizers:
            optimizer.step()
    assert all(map(torch.equal, *(params for _, params in optimizers)))
"""


@pytest.mark.cpu_only
@pytest.mark.parametrize("limit", ["OMP_THREAD_LIMIT=1", "OMP_THREAD_LIMIT=3", "OMP_DYNAMIC=true"])
def test_fewer_threads_than_torch_was_told(limit: str) -> None:
    """They wait for each other, but not for threads that do not exist."""
    name, value = limit.split("=")
    environment = {**os.environ, name: value}
    command = [sys.executable, "-c", THREADS]
    result = subprocess.run(command, capture_output=True, text=True, cwd="/", timeout=300, env=environment)
    assert result.returncode == 0, result.stderr
