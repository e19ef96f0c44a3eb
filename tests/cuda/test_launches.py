"""One launch a step, whatever is in the table; no synchronisation; and nothing of torch's in between."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from fused_sgd import FusedSGD
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*[Ss]ynchronization debug mode"),  # a prototype, it says
    pytest.mark.filterwarnings("ignore:.*[Pp]rofiler"),
]
GPU = "cuda:0"
KERNEL = "sgd_step"


def on_device(work: Callable[[], Any]) -> list[str]:
    """Names of everything that the GPU did: kernels, copies and fills."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    return [
        event.name
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA
        and not event.is_user_annotation
        and not event.name.startswith(("Optimizer.", "ProfilerStep"))
    ]


@contextmanager
def without_synchronisation() -> Iterator[None]:
    """Torch's own calls that wait raise; and the GPU is kept busy, so that other waiting shows."""
    torch.cuda.synchronize()
    busy = torch.cuda.Event()
    torch.cuda._sleep(2_000_000_000)  # cycles: a second or so
    busy.record()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
        assert not busy.query(), "the host waited for the GPU"
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()


def tensors(count: int, dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> list[Tensor]:
    params = [torch.randn(i % 50 + 1, device=GPU).to(dtypes[i % len(dtypes)]).requires_grad_() for i in range(count)]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


MIXED = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
# How a table travels: in 8 KB of arguments, in 32 KB of them, in device memory.
COUNTS = pytest.mark.parametrize("count", [2, 400, 1200, 5000])


@COUNTS
@pytest.mark.parametrize("dtypes", [MIXED[:1], MIXED[:2], MIXED], ids=["float32", "two", "four"])
@pytest.mark.parametrize("many_groups", [False, True])
def test_exactly_one_launch(count: int, dtypes: tuple[torch.dtype, ...], many_groups: bool) -> None:
    params = tensors(count, dtypes)
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "fused": True}
    groups = [{"params": params[i : i + 5], "lr": 0.1 / (i + 1)} for i in range(0, count, 5)]
    optimizer = FusedSGD(groups if many_groups else params, **options)
    for _ in range(2):
        optimizer.step()
    for _ in range(2):
        (name,) = on_device(optimizer.step)
        assert KERNEL in name


@COUNTS
def test_one_launch_when_gradients_move(count: int) -> None:
    """As after zero_grad(). A table in device memory is written anew, which is copies and no launch."""
    params = tensors(count)
    optimizer = FusedSGD(params, lr=0.1, momentum=0.9, fused=True)
    optimizer.step()
    kept = [p.grad for p in params]
    for p in params:
        p.grad = torch.randn_like(p)
    names = on_device(optimizer.step)
    assert [name for name in names if "Memcpy" not in name] == [name for name in names if KERNEL in name]
    assert sum(KERNEL in name for name in names) == 1
    del kept


def test_a_tensor_learning_rate_and_a_scaler_add_no_launch() -> None:
    params = tensors(100)
    lr = torch.tensor(0.1, device=GPU)
    optimizer = FusedSGD(params, lr=lr, momentum=0.9, fused=True)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0, device=GPU), torch.tensor(0.0, device=GPU)
    optimizer.step()
    assert len(on_device(optimizer.step)) == 1


@COUNTS
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_no_synchronisation(count: int, tensor_lr: bool) -> None:
    lr = torch.tensor(0.1, device=GPU) if tensor_lr else 0.1
    optimizer = FusedSGD(tensors(count), lr=lr, momentum=0.9, fused=True)
    optimizer.step()
    with without_synchronisation():
        optimizer.step()


@COUNTS
def test_no_synchronisation_when_gradients_move_or_a_number_changes(count: int) -> None:
    params = tensors(count)
    optimizer = FusedSGD(params, lr=0.1, momentum=0.9, fused=True)
    optimizer.step()
    fresh = [torch.randn_like(p) for p in params]
    with without_synchronisation():
        for p, grad in zip(params, fresh, strict=True):
            p.grad = grad
        optimizer.step()
        optimizer.param_groups[0]["lr"] = 0.05
        optimizer.step()


def test_no_synchronisation_at_the_first_step() -> None:
    FusedSGD(tensors(50), lr=0.1, momentum=0.9, fused=True).step()  # loads the kernels and leaves its memory behind
    optimizer = FusedSGD(tensors(50), lr=0.1, momentum=0.9, fused=True)
    with without_synchronisation():
        optimizer.step()


def test_no_allocation_in_a_steady_step() -> None:
    optimizer = FusedSGD(tensors(1200, MIXED), lr=0.1, momentum=0.9, fused=True)
    for _ in range(2):
        optimizer.step()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    optimizer.step()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
