"""Streams, devices and GradScaler: work goes to the current stream of each tensor's device."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from fused_sgd import FusedSGD
from torch import Tensor

from support import assert_same, copies, make_params, same_bits, set_grads

GPU = "cuda:0"
COUNTS = pytest.mark.parametrize("count", [3, 300, 1200, 5000])


def on(device: str, count: int, seed: int = 0) -> list[Tensor]:
    shapes = [(i % 70 + 1,) for i in range(count)]
    return [p.detach().to(device).requires_grad_() for p in make_params(shapes, seed=seed)]


@COUNTS
def test_streams_in_turn(count: int) -> None:
    """Every step on another stream, with other gradients: tables in device memory are written behind their last use."""
    params = on(GPU, count)
    expected = copies(params)
    mine = FusedSGD(params, lr=0.1, momentum=0.9, fused=True)
    theirs = torch.optim.SGD(expected, lr=0.1, momentum=0.9)
    streams = [torch.cuda.Stream() for _ in range(3)]
    kept = []
    for step in range(9):
        set_grads(params, expected, seed=step)
        kept.append([p.grad for p in params])  # their memory is not to be used again meanwhile
        theirs.step()
        stream = streams[step % 3]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            mine.step()
        torch.cuda.current_stream().wait_stream(stream)
    assert_same(mine, theirs, params, expected)


@COUNTS
def test_unordered_streams_with_other_parameters_each(count: int) -> None:
    """Two steps that share nothing but the optimizer's table, and run at once."""
    params = on(GPU, 2 * count)
    before = [p.detach().clone() for p in params]
    optimizer = FusedSGD(params, lr=0.5, fused=True)
    grads = [torch.randn_like(p) for p in params]
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()
    for stream, half in ((first, range(count)), (second, range(count, 2 * count))):
        for i, p in enumerate(params):
            p.grad = grads[i] if i in half else None
        with torch.cuda.stream(stream):
            torch.cuda._sleep(200_000_000 if stream == first else 1000)
            optimizer.step()
    torch.cuda.synchronize()
    for p, b, grad in zip(params, before, grads, strict=True):
        assert same_bits(p, torch.add(b, grad, alpha=-0.5))


def test_unordered_streams_that_round_stochastically_end() -> None:
    """Two steps at once count steps with one ticket: which of them counts first is open, that both end is not."""
    params = [torch.zeros(1 << 25, dtype=torch.bfloat16, device=GPU).requires_grad_() for _ in range(2)]
    optimizer = FusedSGD(params, lr=0.5, stochastic_rounding=True)
    grads = [torch.ones_like(p) for p in params]
    streams = [torch.cuda.Stream() for _ in params]
    torch.cuda.synchronize()
    steps = 20
    for _ in range(steps):
        for mine, stream in enumerate(streams):
            for i, p in enumerate(params):
                p.grad = grads[i] if i == mine else None
            with torch.cuda.stream(stream):
                optimizer.step()
    torch.cuda.synchronize()
    for p in params:
        assert bool((p == -0.5 * steps).all())  # exact, whatever the random bits


def test_the_current_stream_is_used() -> None:
    """A step is ordered behind what its stream did before, and other streams are not."""
    (p,) = on(GPU, 1)
    optimizer = FusedSGD([p], lr=1.0, fused=True)
    p.grad = torch.zeros_like(p)
    p.grad.fill_(0)
    optimizer.step()  # every kernel is loaded now, which may wait for the GPU
    before = p.detach().clone()
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(500_000_000)
        p.grad.fill_(1)
        optimizer.step()
    early = p.detach().clone()  # on the default stream, which waits for none of torch's
    torch.cuda.current_stream().synchronize()
    assert not stream.query(), "the host waited for the stream"
    stream.synchronize()
    assert same_bits(early, before), "the step overtook its stream"
    assert same_bits(p, before - 1)


@pytest.mark.parametrize("fused", [None, True])
def test_gradscaler_with_an_overflow_on_the_first_step(fused: bool | None) -> None:
    params = on(GPU, 5)
    expected = copies(params)
    mine = FusedSGD(params, lr=0.1, momentum=0.9, fused=fused)
    theirs = torch.optim.SGD(expected, lr=0.1, momentum=0.9, foreach=False)
    scalers = [torch.amp.GradScaler("cuda", init_scale=1024.0, growth_interval=2) for _ in range(2)]
    for step in range(8):
        factor = float("inf") if step in (0, 1, 4) else 1.0
        for scaler, optimizer, tensors in zip(scalers, (mine, theirs), (params, expected), strict=True):
            optimizer.zero_grad()
            scaler.scale(sum((p * p).sum() * factor for p in tensors)).backward()
            scaler.step(optimizer)
            scaler.update()
        assert scalers[0].get_scale() == scalers[1].get_scale()
        assert all(map(same_bits, params, expected)), f"at step {step}"
    for p, q in zip(params, expected, strict=True):
        assert same_bits(mine.state[p]["momentum_buffer"], theirs.state[q]["momentum_buffer"])


@pytest.mark.filterwarnings("ignore:.*[Ss]ynchronization debug mode")
def test_a_scaled_step_does_not_synchronise() -> None:
    params = on(GPU, 5)
    optimizer = FusedSGD(params, lr=0.1, momentum=0.9, fused=True)
    scaler = torch.amp.GradScaler("cuda")
    for step in range(3):
        optimizer.zero_grad()
        scaler.scale(sum((p * p).sum() for p in params)).backward()
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            scaler.step(optimizer)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        scaler.update()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="it needs two GPUs")
@COUNTS
def test_two_devices_in_one_optimizer(count: int) -> None:
    """With a learning rate and a gradient scale that stand on the first."""
    params = [*on(GPU, count), *on("cuda:1", count, seed=1)]
    expected = copies(params)
    lr = torch.tensor(0.1, device=GPU)
    mine = FusedSGD(params, lr=lr, momentum=0.9, fused=True)
    theirs = torch.optim.SGD(expected, lr=lr.item(), momentum=0.9, foreach=False)
    for current in (0, 1, 0):
        set_grads(params, expected, seed=current)
        for p in params:
            p.grad.mul_(4)
        mine.grad_scale = torch.tensor(4.0, device=GPU)
        with torch.cuda.device(current):
            mine.step()
            assert torch.cuda.current_device() == current
        theirs.step()
        assert_same(mine, theirs, params, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="it needs two GPUs")
def test_another_device_than_the_current_one() -> None:
    params = on("cuda:1", 3)
    expected = copies(params)
    mine = FusedSGD(params, lr=0.1, momentum=0.9, fused=True)
    theirs = torch.optim.SGD(expected, lr=0.1, momentum=0.9, foreach=False)
    for step in range(3):
        set_grads(params, expected, seed=step)
        mine.step()
        theirs.step()
    assert_same(mine, theirs, params, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="it needs two GPUs")
def test_a_process_that_uses_one_device_starts_no_context_on_another() -> None:
    script = """
import torch
from fused_sgd import FusedSGD
params = [torch.ones(i % 9 + 1, device="cuda:1", requires_grad=True) for i in range(1200)]
for p in params:
    p.grad = torch.ones_like(p)
optimizer = FusedSGD(params, lr=0.1, momentum=0.9, max_grad_norm=1.0, fused=True)
for _ in range(2):
    optimizer.step()
del optimizer
torch.cuda.synchronize(1)
assert torch._C._cuda_hasPrimaryContext(1)
assert not torch._C._cuda_hasPrimaryContext(0)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_cpu_and_gpu_in_one_optimizer() -> None:
    params = [*on(GPU, 3), *on("cpu", 3, seed=1)]
    expected = copies(params)
    mine = FusedSGD(params, lr=0.1, momentum=0.9, fused=True)
    theirs = torch.optim.SGD(expected, lr=0.1, momentum=0.9, foreach=False)
    for step in range(3):
        set_grads(params, expected, seed=step)
        mine.step()
        theirs.step()
    assert_same(mine, theirs, params, expected)
