"""Captured steps: at the first step and later, with everything that may stand in tensors changed between replays."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from fused_sgd import FusedSGD, _new_state
from torch import Tensor

from support import assert_same, copies, make_params, same_bits

GPU = "cuda:0"
# In 8 KB of arguments, in 32 KB of them, in device memory.
COUNTS = pytest.mark.parametrize("count", [3, 300, 1200])


def fixed(count: int, seed: int = 0) -> list[Tensor]:
    """Parameters whose gradients keep their memory."""
    params = [
        p.detach().to(GPU).requires_grad_() for p in make_params([(i % 90 + 1,) for i in range(count)], seed=seed)
    ]
    for p in params:
        p.grad = torch.zeros_like(p)
    return params


def fill_gradients(*param_lists: list[Tensor], seed: int, factor: float = 1) -> None:
    """The same values for all lists; those of the first are multiplied."""
    generator = torch.Generator(GPU).manual_seed(seed)
    for params in zip(*param_lists, strict=True):
        grad = torch.randn(params[0].shape, generator=generator, device=GPU)
        for index, p in enumerate(params):
            p.grad.copy_(grad * factor if index == 0 else grad)


def captured(optimizer: FusedSGD) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    return graph


@COUNTS
@pytest.mark.parametrize("eager_steps", [0, 2])
@pytest.mark.parametrize("nesterov", [False, True])
def test_replays_equal_steps(count: int, eager_steps: int, nesterov: bool) -> None:
    params, expected = fixed(count), fixed(count)
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": nesterov}
    mine = FusedSGD(params, **options, fused=True)
    theirs = torch.optim.SGD(expected, **options, foreach=False)
    for step in range(eager_steps):
        fill_gradients(params, expected, seed=step)
        mine.step()
        theirs.step()
    before = [p.detach().clone() for p in params]
    graph = captured(mine)
    assert all(map(same_bits, params, before)), "a capture changes nothing"
    for step in range(eager_steps, eager_steps + 4):
        fill_gradients(params, expected, seed=step)
        graph.replay()
        theirs.step()
        assert_same(mine, theirs, params, expected, f"at step {step}")


FIRST_STEP = """
import torch
from fused_sgd import FusedSGD
kinds = {kinds}
params = [torch.ones(100, device="cuda", dtype=kind, requires_grad=True) for kind in kinds]
for p in params:
    p.grad = torch.ones_like(p)
optimizer = FusedSGD(params, lr=0.5, momentum=0.9, fused=True, {options})
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    optimizer.step()
assert all((p == 1).all() for p in params)
graph.replay()
assert all((p == 0.5).all() for p in params), params
"""


@pytest.mark.parametrize("kinds", ["[torch.float32]", "[torch.float32, torch.float16]"])
@pytest.mark.parametrize("options", ["", "max_grad_norm=1e9", "ema_decay=0.9"])
def test_the_first_step_of_a_process_can_be_captured(kinds: str, options: str) -> None:
    """Nothing is left to be loaded by a launch, whatever kernel it takes."""
    code = FIRST_STEP.format(kinds=kinds, options=options)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", timeout=300)
    assert result.returncode == 0, result.stderr


@COUNTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_stands_in_tensors_takes_effect_at_each_replay(count: int, dtype: torch.dtype) -> None:
    params, expected = fixed(count), fixed(count)
    lr, decay = torch.tensor(0.1, device=GPU, dtype=dtype), torch.tensor(0.01, device=GPU, dtype=dtype)
    scale, found_inf = torch.tensor(8.0, device=GPU), torch.tensor(0.0, device=GPU)
    mine = FusedSGD(params, lr=lr, weight_decay=decay, momentum=0.9, fused=True)
    theirs = torch.optim.SGD(expected, lr=0.1, weight_decay=0.01, momentum=0.9, foreach=False)
    mine.grad_scale, mine.found_inf = scale, found_inf
    graph = captured(mine)
    for step in range(8):
        lr.fill_(0.1 / (step + 1))
        decay.fill_(0.01 * (step % 3))
        scale.fill_(2.0**step)
        found_inf.fill_(float(step in (0, 3)) * 2)  # an overflow at the first step, and one later
        theirs.param_groups[0].update(lr=lr.item(), weight_decay=decay.item())
        fill_gradients(params, expected, seed=step, factor=2.0**step)
        graph.replay()
        if step not in (0, 3):
            theirs.step()
        if step != 0:
            assert_same(mine, theirs, params, expected, f"at step {step}")
    assert all(bool(mine.state[p]["momentum_buffer"].isfinite().all()) for p in params)


@COUNTS
def test_graphs_and_eager_steps_in_turn(count: int) -> None:
    """Two graphs with other gradients each, and eager steps that write their own tables, leave each other's alone."""
    params, expected = fixed(count), fixed(count)
    mine = FusedSGD(params, lr=0.1, momentum=0.9, fused=True)
    theirs = torch.optim.SGD(expected, lr=0.1, momentum=0.9, foreach=False)
    gradients = [[torch.randn_like(p) for p in params] for _ in range(3)]

    def use(number: int) -> None:
        for p, q, grad in zip(params, expected, gradients[number], strict=True):
            p.grad, q.grad = grad, grad

    graphs = []
    for number in range(2):
        use(number)
        graphs.append(captured(mine))
    for step, number in enumerate([0, 2, 1, 0, 2, 2, 1]):
        use(number)
        if number < 2:
            graphs[number].replay()
        else:
            mine.step()
        theirs.step()
        assert_same(mine, theirs, params, expected, f"at turn {step}")


def test_a_number_that_changes_after_the_capture_takes_effect_at_the_next_eager_step() -> None:
    params, expected = fixed(3), fixed(3)
    mine = FusedSGD(params, lr=0.1, momentum=0.9, fused=True)
    theirs = torch.optim.SGD(expected, lr=0.1, momentum=0.9, foreach=False)
    graph = captured(mine)
    mine.param_groups[0]["lr"] = 0.5
    for step, (run, lr) in enumerate([(graph.replay, 0.1), (mine.step, 0.5), (graph.replay, 0.1)]):
        theirs.param_groups[0]["lr"] = lr
        fill_gradients(params, expected, seed=step)
        run()
        theirs.step()
        assert_same(mine, theirs, params, expected, f"at step {step}")


def test_a_whole_training_step() -> None:
    """As in the README: forward, backward and the optimizer in one graph, and a schedule from outside."""
    torch.manual_seed(0)
    make = lambda: torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1)).to(GPU)  # noqa: E731
    model, reference = make(), make()
    reference.load_state_dict(model.state_dict())
    lr = torch.tensor(0.1, device=GPU)
    mine = FusedSGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=1e-4, fused=True)
    theirs = torch.optim.SGD(reference.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, foreach=False)
    x, y = torch.randn(8, 16, device=GPU), torch.randn(8, 1, device=GPU)

    def train_step(net: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad(set_to_none=False)
        torch.nn.functional.mse_loss(net(x), y).backward()
        optimizer.step()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            for net, optimizer in ((model, mine), (reference, theirs)):
                train_step(net, optimizer)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        train_step(model, mine)
    for step in range(10):
        x.normal_()
        y.normal_()
        lr.fill_(0.1 / (step + 1))
        theirs.param_groups[0]["lr"] = lr.item()
        graph.replay()
        train_step(reference, theirs)
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)  # a captured product may be another kernel's


def test_a_first_step_with_dampening_can_be_captured() -> None:
    """The buffer tells the device by itself that nothing was accumulated yet."""
    params, expected = fixed(2), fixed(2)
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}
    mine = FusedSGD(params, **options, fused=True)
    theirs = torch.optim.SGD(expected, **options, foreach=False)
    graph = captured(mine)
    for step in range(3):
        fill_gradients(params, expected, seed=step)
        graph.replay()
        theirs.step()
        assert_same(mine, theirs, params, expected, f"at step {step}")


def test_momentum_buffers_made_during_a_capture_are_ordinary_memory() -> None:
    """They outlive the graph; memory of the graph's own pool would be written by whatever it does earlier."""
    params, expected = fixed(3), copies(fixed(3))
    mine = FusedSGD(params, lr=0.1, momentum=0.9, fused=True)
    theirs = torch.optim.SGD(expected, lr=0.1, momentum=0.9, foreach=False)
    for q in expected:
        q.grad = torch.zeros_like(q)
    graph = captured(mine)
    fill_gradients(params, expected, seed=0)
    graph.replay()
    theirs.step()
    del graph
    torch.cuda.empty_cache()
    junk = [torch.full((1000,), torch.nan, device=GPU) for _ in range(100)]
    fill_gradients(params, expected, seed=1)
    mine.step()
    theirs.step()
    assert_same(mine, theirs, params, expected)
    del junk


def test_a_buffer_made_during_a_capture_is_freed_behind_its_last_use() -> None:
    """It was made on a side stream, to which its memory returns: not before the step that uses it is done."""
    (p,) = fixed(1)
    optimizer = FusedSGD([p], lr=0.1, momentum=0.9, fused=True)
    graph = captured(optimizer)
    address = optimizer.state[p]["momentum_buffer"].data_ptr()
    torch.cuda.synchronize()
    torch.cuda._sleep(500_000_000)
    graph.replay()
    optimizer.state.clear()
    with torch.cuda.stream(_new_state._side_streams[p.device]):
        other = torch.empty_like(p)
    assert other.data_ptr() != address
