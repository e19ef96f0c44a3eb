"""When the GPU fails: the error names the device and the cause, and what can stay as it was does."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from fused_sgd import FusedSGD

GPU = "cuda:0"


@contextmanager
def no_memory_left() -> Iterator[None]:
    """Takes the GPU's memory behind torch's back, to the last piece that the driver gives."""
    driver = ctypes.CDLL("libcuda.so.1")
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    taken = []
    size = 1 << 36
    while size >= 1 << 12:
        pointer = ctypes.c_uint64()
        if driver.cuMemAlloc_v2(ctypes.byref(pointer), ctypes.c_size_t(size)) == 0:
            taken.append(pointer)
        else:
            size //= 2
    try:
        yield
    finally:
        for pointer in taken:
            driver.cuMemFree_v2(pointer)


@pytest.mark.exclusive
def test_no_memory_for_a_table_leaves_the_optimizer_as_it_was() -> None:
    """The table of 60,000 tensors takes more than what is left over from other allocations."""
    memory, gradients = torch.zeros(60_000, 4, device=GPU), torch.ones(60_000, 4, device=GPU)
    params = [row.requires_grad_() for row in memory.unbind()]
    for p, grad in zip(params, gradients.unbind(), strict=True):
        p.grad = grad
    optimizer = FusedSGD(params, lr=0.5, fused=True)
    versions = [p._version for p in params[:10]]
    with no_memory_left(), pytest.raises(RuntimeError, match=r"cudaErrorMemoryAllocation|out of memory"):
        optimizer.step()
    assert not optimizer.state
    assert (memory == 0).all()
    assert [p._version for p in params[:10]] == versions
    optimizer.step()
    assert (memory == -0.5).all()


@pytest.mark.exclusive
def test_memory_that_torch_only_keeps_is_given_back_for_a_table() -> None:
    memory, gradients = torch.zeros(60_000, 4, device=GPU), torch.ones(60_000, 4, device=GPU)
    params = [row.requires_grad_() for row in memory.unbind()]
    for p, grad in zip(params, gradients.unbind(), strict=True):
        p.grad = grad
    optimizer = FusedSGD(params, lr=0.5, fused=True)
    freed = torch.empty(1 << 26, dtype=torch.uint8, device=GPU)
    with no_memory_left():
        del freed  # into torch's cache, not to the driver
        optimizer.step()
    assert (memory == -0.5).all()


@pytest.mark.exclusive
def test_no_memory_for_momentum_buffers_leaves_the_optimizer_as_it_was() -> None:
    params = [torch.zeros(1 << 24, device=GPU).requires_grad_() for _ in range(3)]  # each fills what torch asked for
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = FusedSGD(params, lr=0.5, momentum=0.9, fused=True)
    with no_memory_left(), pytest.raises(torch.OutOfMemoryError):
        optimizer.step()
    assert not optimizer.state
    optimizer.step()
    assert all((p == -0.5).all() for p in params)


BROKEN = """
import torch
from fused_sgd import FusedSGD

p = torch.ones(5, device="cuda:0").requires_grad_()
p.grad = torch.ones_like(p)
optimizer = FusedSGD([p], lr=0.1, fused=True)
optimizer.step()
torch._assert_async(torch.zeros(1, dtype=torch.bool, device="cuda:0"))
try:
    torch.cuda.synchronize()
except RuntimeError:
    pass
try:
    optimizer.step()
except RuntimeError as error:
    print(error)
"""


def test_a_failing_launch_names_the_device_and_the_cause() -> None:
    """On a GPU that a failed assertion has stopped, in a process of its own."""
    result = subprocess.run([sys.executable, "-c", BROKEN], capture_output=True, text=True, cwd="/", timeout=300)
    said = result.stdout.splitlines()[-1] if result.stdout else result.stderr
    assert said.startswith("fused_sgd, cuda:0: "), said
    assert " failed: cudaError" in said, said


def test_other_gpus_get_no_context() -> None:
    """Looking at one GPU must not start another: each takes half a gigabyte there, for every process."""
    last = torch.cuda.device_count() - 1
    if last == 0:
        pytest.skip("it needs two GPUs")
    code = f"""
import torch
from fused_sgd import FusedSGD
p = torch.ones(5, device="cuda:{last}").requires_grad_()
p.grad = torch.ones_like(p)
FusedSGD([p], lr=0.1, momentum=0.9, fused=True).step()
torch.cuda.synchronize({last})
print([torch._C._cuda_hasPrimaryContext(i) for i in range({last})])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", timeout=300)
    assert result.stdout.strip() == str([False] * last), result.stdout + result.stderr
