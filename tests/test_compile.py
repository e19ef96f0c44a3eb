"""torch.compile: a step runs outside of the graph, as that of torch.optim.SGD does, and without a warning."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from fused_sgd import FusedLARS, FusedSGD
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from support import assert_same, copies, make_params, same_bits, seeded, set_grads

pytestmark = pytest.mark.usefixtures("device")

SHAPES = [(5,), (7, 3), (2, 64)]
BACKENDS = pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
OPTIONS: dict[str, tuple[type[FusedSGD], torch.dtype, dict[str, Any]]] = {
    "dampening": (FusedSGD, torch.float32, {"dampening": 0.5, "maximize": True}),
    "clip": (FusedSGD, torch.float32, {"max_grad_norm": 0.1, "skip_nonfinite": True}),
    "average": (FusedSGD, torch.bfloat16, {"ema_decay": 0.9}),
    "lars": (FusedLARS, torch.float32, {"weight_decay": 0.1, "max_grad_norm": 0.1}),
    "complex": (FusedSGD, torch.complex64, {}),
    "master": (FusedSGD, torch.bfloat16, {"master_weights": "float32"}),
    "int8": (FusedSGD, torch.float32, {"momentum_dtype": torch.int8}),
    "reference": (FusedSGD, torch.float32, {"fused": False, "weight_decay": 0.1}),
    "foreach": (FusedSGD, torch.float32, {"foreach": True, "weight_decay": 0.1}),
}


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    """No graph of another test, and no warning."""
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", module="torch.*", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message="Guards may run slower on Python 3.13.0")
        yield


@pytest.mark.parametrize("case", OPTIONS)
def test_a_compiled_step(case: str) -> None:
    make, dtype, options = OPTIONS[case]
    params = make_params(SHAPES, dtype)
    expected = copies(params)
    mine, theirs = (make(given, **{"lr": 0.1, "momentum": 0.9, **options}) for given in (params, expected))
    step = torch.compile(mine.step, backend="eager")
    for number in range(4):
        set_grads(params, expected, seed=number)
        mine.param_groups[0]["lr"] = theirs.param_groups[0]["lr"] = 0.1 * 0.5**number
        if number == 2:
            params[1].grad = expected[1].grad = None
        step()
        theirs.step()
    for param, other in zip(params, expected, strict=True):
        assert same_bits(param, other)
        assert mine.state[param].keys() == theirs.state[other].keys()
        assert all(same_bits(mine.state[param][key], theirs.state[other][key]) for key in mine.state[param])
    assert mine.grad_norm == theirs.grad_norm


@BACKENDS
def test_training_in_one_function(backend: str) -> None:
    """With all that users put around a step."""
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    reference = copy.deepcopy(model)
    mine = FusedSGD(model.parameters(), lr=0.1, momentum=0.9)
    theirs = torch.optim.SGD(reference.parameters(), lr=0.1, momentum=0.9)
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5) for optimizer in (mine, theirs)]

    def train(model: Any, optimizer: Any, step: Callable[[], None], schedule: Any, x: Tensor) -> Tensor:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        for param in model.parameters():
            assert param.grad is not None
            param.grad.mul_(2.0)
        step()
        schedule.step()
        return model(x).square().mean()

    step = torch.compiler.disable(theirs.step)  # which torch would compile, and round otherwise
    mine_compiled, theirs_compiled = (torch.compile(train, backend=backend) for _ in range(2))  # to the same arithmetic
    for number in range(3):
        x = seeded((16, 8), number)
        losses = [
            mine_compiled(model, mine, mine.step, schedules[0], x),
            theirs_compiled(reference, theirs, step, schedules[1], x),
        ]
        before = copies([*model.parameters()])
        for loss in losses:
            loss.backward()
        assert same_bits(*losses)
        assert all(same_bits(p, q) for p, q in zip(model.parameters(), before, strict=True))
        assert_same(mine, theirs, [*model.parameters()], [*reference.parameters()])


def test_what_a_compiled_function_changes_before_the_step_counts() -> None:
    params = make_params(SHAPES)
    expected = copies(params)
    mine, theirs = FusedSGD(params, lr=0.1, momentum=0.9), torch.optim.SGD(expected, lr=0.1, momentum=0.9)
    set_grads(params, expected, seed=9)
    mine.step()
    theirs.step()

    def step(optimizer: torch.optim.Optimizer, params: list[Tensor]) -> None:
        with torch.no_grad():
            for param in params:
                param.add_(1.0)
                optimizer.state[param]["momentum_buffer"] = torch.ones_like(param)
        optimizer.param_groups[0]["maximize"] = not optimizer.param_groups[0]["maximize"]
        optimizer.step()

    graph = torch.compile(step, backend="eager")
    for number in range(3):
        set_grads(params, expected, seed=number)
        graph(mine, params)
        step(theirs, expected)
        assert_same(mine, theirs, params, expected)


def test_hooks_whenever_they_come() -> None:
    (param,) = make_params([(5,)])
    optimizer = FusedSGD([param], lr=0.1)
    called: list[str] = []
    step = torch.compile(optimizer.step, backend="eager")
    set_grads([param], seed=0)
    step()
    optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    optimizer.register_step_post_hook(lambda *_: called.append("after"))
    handle = register_optimizer_step_post_hook(lambda *_: called.append("anyone's"))
    step()
    handle.remove()
    step()
    assert called == ["before", "after", "anyone's", "before", "after"]


@pytest.mark.parametrize("way", ["closure", "subclass"])
def test_a_closure_and_a_subclass(way: str) -> None:
    class Overriding(FusedSGD):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    (param,) = make_params([(5,)], torch.bfloat16)
    cls = Overriding if way == "subclass" else FusedSGD
    optimizer = cls([param], lr=0.1, ema_decay=0.9, master_weights=torch.float32)

    def use() -> Tensor:
        if way == "closure":
            optimizer.step(lambda: 1.0)
        else:
            optimizer.step()
        return param * 2

    twin, found = copies([param]), []
    for function in (torch.compile(use, backend="eager"), use):
        with torch.no_grad():
            param.copy_(twin[0])
        optimizer.state.clear()
        for number in range(2):
            set_grads([param], seed=number)
            found.append(function().detach().clone())
    assert same_bits(found[0], found[2])
    assert same_bits(found[1], found[3])


def test_an_error_is_the_step_s_own() -> None:
    (param,) = make_params([(5,)])
    optimizer = FusedSGD([("weight", param)], lr=0.1)
    set_grads([param], seed=0)
    step: Callable[[], None] = torch.compile(optimizer.step, backend="eager")
    optimizer.param_groups[0]["lr"] = float("nan")
    with pytest.raises(ValueError, match="Invalid learning rate: nan"):
        step()
    optimizer.param_groups[0]["lr"] = 0.1
    step()
    assert torch.is_grad_enabled()


def test_an_optimizer_that_is_gone_is_freed() -> None:
    params = make_params(SHAPES)
    optimizer = FusedSGD(params, lr=0.1, momentum=0.9)
    set_grads(params, seed=0)
    torch.compile(optimizer.step, backend="eager")()
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    torch._dynamo.reset()
    gc.collect()
    assert gone() is None
