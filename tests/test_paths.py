"""Which path a parameter takes, what explain() says of it, and what all paths have in common."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from fused_sgd import FusedSGD
from fused_sgd._native import C
from torch import Tensor

from support import assert_same, copies, make_params, same_bits, set_grads

pytestmark = pytest.mark.usefixtures("device")


def paths(optimizer: FusedSGD) -> list[tuple[str, str]]:
    return [(row.path, row.reason) for row in optimizer.explain()]


@pytest.mark.parametrize("sparse_dim", [1, 2])
@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}, {"maximize": True}])
def test_sparse_gradients_take_the_reference(options: dict[str, Any], sparse_dim: int) -> None:
    params = make_params([(6, 4), (5,)])
    expected = copies(params)
    mine = FusedSGD(params, lr=0.1, **options)
    theirs = torch.optim.SGD(expected, lr=0.1, **options, foreach=False)
    for step in range(3):
        set_grads(params, expected, seed=step)
        for p in (params[0], expected[0]):
            p.grad[1::2] = 0
            p.grad = p.grad.to_sparse(sparse_dim)
        mine.step()
        theirs.step()
        assert all(same_bits(p, q) for p, q in zip(params, expected, strict=True))
    assert paths(mine)[0] == ("reference", "the gradient is sparse (torch.sparse_coo)")
    assert paths(mine)[1] == ("kernel", "")


def test_sparse_gradients_with_weight_decay_are_refused_by_name() -> None:
    params = make_params([(6, 4)])
    set_grads(params, seed=0)
    params[0].grad = params[0].grad.to_sparse()
    with pytest.raises(RuntimeError, match=r"parameter 0 .*weight_decay does not support sparse gradients"):
        FusedSGD(params, lr=0.1, weight_decay=0.1).step()


@pytest.mark.parametrize("momentum", [0, 0.9])
def test_an_embedding_with_sparse_gradients_trains_as_torchs(device: str, momentum: float) -> None:
    """To the bit on a CPU. On a GPU torch itself differs from run to run: it adds up sparse momentum in any order."""
    torch.manual_seed(0)
    embedding = torch.nn.Embedding(20, 4, sparse=True)
    head = torch.nn.Linear(4, 2)
    mine = torch.nn.Sequential(embedding, head)
    theirs = copy.deepcopy(mine)
    tokens = torch.cat([torch.arange(20), torch.arange(7)])  # some twice, so that gradients are not coalesced
    losses = []
    options = {"lr": 0.2, "momentum": momentum}
    optimizers = FusedSGD(mine.parameters(), **options), torch.optim.SGD(theirs.parameters(), **options, foreach=False)
    for _ in range(60):
        for model, optimizer in zip((mine, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(tokens), tokens % 2)
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
        for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
            if device == "cpu":
                assert same_bits(p, q)
            else:
                torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("momentum", [0, 0.9])
def test_differentiable_steps(momentum: float) -> None:
    def run(p: Tensor, grad: Tensor, lr: Tensor, buffer: Tensor) -> Tensor:
        p = p.clone()
        p.grad = grad
        optimizer = FusedSGD([p], lr=lr, momentum=momentum, weight_decay=0.1, differentiable=True)
        if momentum:
            optimizer.state[p]["momentum_buffer"] = buffer.clone()
        optimizer.step()
        return p

    tensors = [torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    lr = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    buffer = torch.randn(4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (*tensors, lr, buffer))


def test_the_first_momentum_of_a_differentiable_step_keeps_its_graph() -> None:
    """torch detaches it: the new parameter then does not depend on the gradient at all."""
    p = torch.randn(3, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(3, dtype=torch.float64, requires_grad=True)
    q = p.clone()
    q.grad = grad
    FusedSGD([q], lr=0.1, momentum=0.9, differentiable=True).step()
    q.sum().backward()
    torch.testing.assert_close(grad.grad, torch.full_like(grad, -0.1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_foreach_true_is_torchs_own(dtype: torch.dtype) -> None:
    params = make_params([(33,), (4, 5)], dtype)
    expected = copies(params)
    mine = FusedSGD(params, lr=0.1, momentum=0.9, weight_decay=0.01, foreach=True)
    theirs = torch.optim.SGD(expected, lr=0.1, momentum=0.9, weight_decay=0.01, foreach=True)
    for step in range(3):
        set_grads(params, expected, seed=step)
        mine.step()
        theirs.step()
        assert_same(mine, theirs, params, expected)
    assert paths(mine) == [("foreach", "foreach=True")]


def test_groups_of_every_path_in_one_optimizer() -> None:
    params = make_params([(33,), (4, 5), (17,), (9,)])
    expected = copies(params)
    ways: list[dict[str, Any]] = [{}, {"fused": False}, {"foreach": True}, {"fused": True}]
    mine = FusedSGD([{"params": [p], **way} for p, way in zip(params, ways, strict=True)], lr=0.1, momentum=0.9)
    theirs = torch.optim.SGD(expected, lr=0.1, momentum=0.9, foreach=False)
    for step in range(3):
        set_grads(params, expected, seed=step)
        mine.step()
        theirs.step()
        assert_same(mine, theirs, params, expected)
    assert [path for path, _ in paths(mine)] == ["kernel", "reference", "foreach", "kernel"]


def test_a_plain_subclass_takes_the_reference() -> None:
    class Odd(Tensor):
        pass

    p = torch.randn(5).as_subclass(Odd).requires_grad_()
    p.grad = torch.ones(5)
    before = p.detach().clone()
    optimizer = FusedSGD([p], lr=0.5)
    assert paths(optimizer) == [("reference", "the parameter is a Odd, a subclass of Tensor")]
    optimizer.step()
    assert torch.equal(p, before - 0.5)


def test_a_dispatch_mode_sees_the_step() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Recorder(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.operators: list[str] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.operators.append(str(func))
            return func(*args, **(kwargs or {}))

    params = make_params([(5,)])
    set_grads(params, seed=0)
    before = params[0].detach().clone()
    with Recorder() as recorder:
        FusedSGD(params, lr=0.5).step()
    assert any("add" in name for name in recorder.operators)
    assert same_bits(params[0], torch.add(before, params[0].grad, alpha=-0.5))
    with Recorder(), pytest.raises(RuntimeError, match="`fused=True` cannot be honoured under an active"):
        FusedSGD(params, lr=0.5, fused=True).step()


def test_lr_that_requires_a_gradient_takes_the_reference() -> None:
    params = make_params([(5,)])
    optimizer = FusedSGD(params, lr=torch.tensor(0.1, requires_grad=True))
    assert paths(optimizer)[0][0] == "reference"
    set_grads(params, seed=0)
    optimizer.step()


def test_closures_hooks_and_schedulers() -> None:
    params = make_params([(5,)])
    optimizer = FusedSGD(params, lr=0.5, momentum=0.9)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = (params[0] ** 2).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        first = optimizer.step(closure)
    scheduler.step()
    second = optimizer.step(closure)
    assert calls == ["pre", "post"] * 2
    assert optimizer.param_groups[0]["lr"] == 0.25
    assert second.item() < first.item()


def test_explain_before_and_after_gradients(device: str) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4)).to(torch.bfloat16)
    optimizer = FusedSGD(model.named_parameters(), lr=0.1)
    (row,) = optimizer.explain()
    assert row[:4] == (0, str(model[0].weight.device), "bfloat16", "kernel")
    assert row.reason.startswith("provisional")
    assert (row.parameters, row.names) == (4, ("0.weight", "0.bias", "1.weight", "1.bias"))
    model(torch.ones(2, 4, dtype=torch.bfloat16)).sum().backward()
    (row,) = optimizer.explain()
    assert row.reason == ""
    text = str(optimizer.explain())
    assert text.splitlines()[0].split() == ["group", "device", "dtype", "path", "reason", "parameters", "names"]
    model[0].weight.grad = model[0].weight.grad.t().contiguous().t()
    assert "gradient in other strides, through a copy" in str(optimizer.explain())


def test_explain_tells_what_fused_true_would_refuse() -> None:
    (param,) = make_params([(5, 3)])
    param.grad = torch.ones(5, 3).to_sparse()
    optimizer = FusedSGD([param], lr=0.1, fused=True)
    assert paths(optimizer) == [("none", "fused=True cannot be honoured: the gradient is sparse (torch.sparse_coo)")]


@pytest.mark.parametrize("inference", [False, True])
def test_the_first_step_may_be_in_any_grad_mode(inference: bool) -> None:
    params = make_params([(5,)])
    expected = copies(params)
    mine = FusedSGD(params, lr=0.1, momentum=0.9, fused=True)
    theirs = torch.optim.SGD(expected, lr=0.1, momentum=0.9)
    set_grads(params, expected, seed=0)
    with torch.inference_mode(inference):
        mine.step()
    theirs.step()
    mine.step()
    theirs.step()
    assert_same(mine, theirs, params, expected)
    assert not mine.state[params[0]]["momentum_buffer"].is_inference()


def test_copy_on_write_parameters_are_separated_before_they_are_written() -> None:
    original = torch.randn(100)
    lazy = torch._lazy_clone(original).requires_grad_()
    lazy.grad = torch.ones(100)
    before = original.clone()
    FusedSGD([lazy], lr=1.0, fused=True).step()
    assert torch.equal(original, before)
    assert torch.equal(lazy, before - 1)


@pytest.mark.cpu_only
def test_the_gil_is_released_while_a_long_walk_runs() -> None:
    import threading
    import time

    params = [torch.zeros(40_000_000).requires_grad_()]
    params[0].grad = torch.ones_like(params[0])
    optimizer = FusedSGD(params, lr=0.1, momentum=0.9, fused=True)
    optimizer.step()
    torch.set_num_threads(1)
    ticks: list[float] = []
    stop = threading.Event()

    def tick() -> None:
        while not stop.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.0005)

    thread = threading.Thread(target=tick)
    thread.start()
    start = time.perf_counter()
    optimizer.step()
    end = time.perf_counter()
    stop.set()
    thread.join()
    assert sum(start < t < end for t in ticks) > 3, "no other Python thread ran during the walk"


@pytest.mark.cpu_only
def test_selecting_an_instruction_set() -> None:
    assert C is not None
    with pytest.raises(ValueError, match=r"unknown instruction set 'mmx'; compiled in are: .*portable"):
        C.select_instruction_set("mmx")
