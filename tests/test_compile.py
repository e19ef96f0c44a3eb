"""torch.compile: the step is one operator, without a graph break, and gives the bits of a step that is not compiled."""

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
from torch._dynamo.testing import CompileCounterWithBackend

from support import assert_same, copies, make_params, seeded, set_grads, snapshot

pytestmark = pytest.mark.usefixtures("device")

SHAPES = [(5,), (7, 3), (2, 64)]
BACKENDS = ["eager", "aot_eager", "inductor"]  # the tensors themselves, copies of them, the tensors themselves again


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    """No graph of another test, no gradients left off (by an error inside a graph, which Dynamo does), no warning."""
    torch._dynamo.reset()
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", module="torch.*", category=DeprecationWarning)
        yield


def compiled(function: Callable[..., Any], backend: Any = "eager") -> Callable[..., Any]:
    step: Callable[..., Any] = torch.compile(function, backend=backend, fullgraph=True)
    return step


def same_state(mine: FusedSGD, theirs: FusedSGD) -> None:
    """To the bit, parameters and state, whatever the options."""
    for group, other in zip(mine.param_groups, theirs.param_groups, strict=True):
        for param, expected in zip(group["params"], other["params"], strict=True):
            assert torch.equal(param, expected)
            kept, wanted = mine.state.get(param, {}), theirs.state.get(expected, {})
            assert kept.keys() == wanted.keys()
            for key in kept:
                assert torch.equal(kept[key].view(torch.uint8), wanted[key].view(torch.uint8)), key


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_a_graph_break_and_to_the_bit(backend: str) -> None:
    params = make_params(SHAPES)
    expected = copies(params)
    groups = [{"params": params[:2], "momentum": 0.9, "nesterov": True}, {"params": params[2:], "weight_decay": 0.1}]
    theirs = [{**group, "params": given} for group, given in zip(groups, (expected[:2], expected[2:]), strict=True)]
    mine, theirs = FusedSGD(groups, lr=0.1), torch.optim.SGD(theirs, lr=0.1)
    step = compiled(mine.step, backend)
    for number in range(4):
        set_grads(params, expected, seed=number)
        step()
        theirs.step()
    assert_same(mine, theirs, params, expected)


OPTIONS: dict[str, tuple[type[FusedSGD], torch.dtype, dict[str, Any]]] = {
    "dampening": (FusedSGD, torch.float32, {"dampening": 0.5, "maximize": True}),
    "sgdw": (FusedSGD, torch.float32, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    "clip": (FusedSGD, torch.float32, {"max_grad_norm": 0.1, "skip_nonfinite": True}),
    "average": (FusedSGD, torch.bfloat16, {"ema_decay": 0.9}),
    "lars": (FusedLARS, torch.float32, {"weight_decay": 0.1, "max_grad_norm": 0.1}),
    "float64": (FusedSGD, torch.float64, {"weight_decay": 0.1}),
    "split": (FusedSGD, torch.bfloat16, {"master_weights": "split"}),
    "stochastic": (FusedSGD, torch.bfloat16, {"stochastic_rounding": True}),
    "int8": (FusedSGD, torch.float32, {"momentum_dtype": torch.int8}),
    "bfloat16 momentum": (FusedSGD, torch.float32, {"momentum_dtype": torch.bfloat16}),
    "reference": (FusedSGD, torch.float32, {"fused": False, "weight_decay": 0.1}),
    "foreach": (FusedSGD, torch.float32, {"foreach": True, "weight_decay": 0.1}),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", OPTIONS)
def test_every_option(case: str, backend: str) -> None:
    make, dtype, options = OPTIONS[case]
    params = make_params(SHAPES, dtype)
    expected = copies(params)
    mine, theirs = (make(given, **{"lr": 0.1, "momentum": 0.9, **options}) for given in (params, expected))
    step = compiled(mine.step, backend)
    for number in range(4):
        set_grads(params, expected, seed=number)
        if number == 2:
            for given in (params, expected):
                given[1].grad = None
        if number == 3 and mine.defaults["skip_nonfinite"]:
            for given in (params, expected):
                given[0].grad[2] = torch.inf
        step()
        theirs.step()
        same_found(mine, theirs)
    same_state(mine, theirs)


STRANGE: dict[str, Callable[[], list[Tensor]]] = {
    "channels last": lambda: [torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)],
    "strided view": lambda: [torch.randn(6, 8)[:, ::2]],
    "empty and 0-dim": lambda: [torch.randn(0, 3), torch.tensor(1.0)],
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", STRANGE)
def test_strange_tensors(case: str, backend: str) -> None:
    params = [tensor.requires_grad_() for tensor in STRANGE[case]()]
    expected = copies(params)
    mine, theirs = FusedSGD(params, lr=0.1, momentum=0.9), torch.optim.SGD(expected, lr=0.1, momentum=0.9)
    step = compiled(mine.step, backend)
    for number in range(3):
        set_grads(params, expected, seed=number)
        step()
        theirs.step()
    assert_same(mine, theirs, params, expected)


OUTSIDE: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "complex tensors": (torch.complex64, {}),
    "float32 masters": (torch.bfloat16, {"master_weights": torch.float32}),
}


@pytest.mark.parametrize("case", OUTSIDE)
def test_what_is_stepped_outside_the_graph(case: str) -> None:
    dtype, options = OUTSIDE[case]
    params = make_params(SHAPES, dtype)
    expected = copies(params)
    mine, theirs = (FusedSGD(given, lr=0.1, momentum=0.9, **options) for given in (params, expected))
    step = torch.compile(mine.step, backend="inductor")
    for number in range(3):
        set_grads(params, expected, seed=number)
        step()
        theirs.step()
    same_state(mine, theirs)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=f"leaves the graph: parameter 0: .*{case}"):
        compiled(mine.step)()


@pytest.mark.parametrize("with_scaler", [True, False])
def test_the_graph_break_says_why(with_scaler: bool) -> None:
    (param,) = make_params([(5,)])
    optimizer = FusedSGD([param], lr=0.1, ema_decay=0.9)
    set_grads([param], seed=0)
    optimizer.step()
    if with_scaler:
        optimizer.grad_scale = 2.0
        with pytest.raises(torch._dynamo.exc.Unsupported, match="there is a grad_scale, from a GradScaler or set by"):
            compiled(optimizer.step)()
    else:
        with optimizer.swap_ema(), pytest.raises(torch._dynamo.exc.Unsupported, match="it is inside swap_ema"):
            compiled(optimizer.step)()


def same_found(mine: FusedSGD, theirs: FusedSGD) -> None:
    assert mine.skipped_steps == theirs.skipped_steps
    norm, expected = mine.grad_norm, theirs.grad_norm
    assert (norm is None) == (expected is None)
    if norm is not None and expected is not None:
        assert torch.equal(norm, expected)
    if isinstance(mine, FusedLARS) and isinstance(theirs, FusedLARS):
        for row, wanted in zip(mine.trust_ratios(), theirs.trust_ratios(), strict=True):
            assert row == wanted


@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_schedule_does_not_compile_anew(as_tensor: bool) -> None:
    params = make_params(SHAPES)
    expected = copies(params)
    mine, theirs = FusedSGD(params, lr=0.1, momentum=0.9), torch.optim.SGD(expected, lr=0.1, momentum=0.9)
    if as_tensor:
        mine.param_groups[0]["lr"] = torch.tensor(0.1)
    counter = CompileCounterWithBackend("inductor")
    step = compiled(mine.step, counter)
    for number in range(12):
        set_grads(params, expected, seed=number)
        rate = 0.1 * 0.9**number
        theirs.param_groups[0]["lr"] = rate
        if as_tensor:
            mine.param_groups[0]["lr"].fill_(rate)
            theirs.param_groups[0]["lr"] = mine.param_groups[0]["lr"].item()
        else:
            mine.param_groups[0]["lr"] = rate
        step()
        theirs.step()
    assert_same(mine, theirs, params, expected)
    assert counter.frame_count == (1 if as_tensor else 2)  # the second time with a number that may change


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_the_same_graph_has_done_before_the_step_counts(backend: str) -> None:
    params = make_params(SHAPES)
    expected = copies(params)
    rates = [torch.tensor(0.1) for _ in range(2)]
    mine, theirs = FusedSGD(params, lr=rates[0], momentum=0.9), torch.optim.SGD(expected, lr=0.1, momentum=0.9)

    def step(optimizer: torch.optim.Optimizer, params: list[Tensor], rate: Tensor) -> Tensor:
        with torch.no_grad():
            rate.mul_(0.5)
            for param in params:
                assert param.grad is not None
                param.grad.mul_(2.0)
                param.add_(1.0)
        optimizer.param_groups[0]["momentum"] = optimizer.param_groups[0]["momentum"] * 0.5
        optimizer.step()
        return optimizer.state[params[0]]["momentum_buffer"] * 2

    graph = compiled(step, backend)
    for number in range(3):
        set_grads(params, expected, seed=number)
        found = graph(mine, params, rates[0])
        theirs.param_groups[0]["lr"] = float(rates[1]) / 2
        wanted = step(theirs, expected, rates[1])
        assert torch.equal(found, wanted)
        assert_same(mine, theirs, params, expected)
        assert all(torch.equal(p.grad, q.grad) for p, q in zip(params, expected, strict=True))


def test_two_steps_in_one_graph() -> None:
    params = make_params(SHAPES)
    expected = copies(params)
    mine, theirs = FusedSGD(params, lr=0.1, momentum=0.9), torch.optim.SGD(expected, lr=0.1, momentum=0.9)

    def twice(optimizer: torch.optim.Optimizer) -> None:
        optimizer.step()
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"] * 0.5
        optimizer.step()

    graph = compiled(lambda: twice(mine), "aot_eager")  # inductor forgets such a number, of any dict
    for number in range(3):
        set_grads(params, expected, seed=number)
        graph()
        twice(theirs)
        assert_same(mine, theirs, params, expected)
    assert mine.param_groups[0]["lr"] == theirs.param_groups[0]["lr"]


def test_an_option_that_the_same_graph_changes_is_left_to_a_step_outside() -> None:
    params = make_params(SHAPES)
    expected = copies(params)
    mine, theirs = FusedSGD(params, lr=0.1, momentum=0.9), torch.optim.SGD(expected, lr=0.1, momentum=0.9)

    def toggle(optimizer: torch.optim.Optimizer) -> None:
        optimizer.param_groups[0]["maximize"] = not optimizer.param_groups[0]["maximize"]
        optimizer.step()

    graph = torch.compile(lambda: toggle(mine), backend="eager")
    for number in range(3):
        set_grads(params, expected, seed=number)
        graph()
        toggle(theirs)
        assert_same(mine, theirs, params, expected)


def test_a_checkpoint_a_new_group_and_a_late_gradient_are_seen() -> None:
    params = make_params([*SHAPES, (4,)])
    expected = copies(params)
    mine, theirs = FusedSGD(params[:3], lr=0.1, momentum=0.9), torch.optim.SGD(expected[:3], lr=0.1, momentum=0.9)
    step = compiled(mine.step, "inductor")

    def both(number: int, count: int = 3) -> None:
        for given in (params, expected):
            for param in given:
                param.grad = None
        set_grads(params[:count], expected[:count], seed=number)
        step()
        theirs.step()
        assert_same(mine, theirs, params[:count], expected[:count])

    both(0, count=2)
    both(1)
    saved = copy.deepcopy(theirs.state_dict())
    both(2)
    mine.load_state_dict(copy.deepcopy(saved))
    theirs.load_state_dict(saved)
    both(3)
    for optimizer, param in ((mine, params[3]), (theirs, expected[3])):
        optimizer.add_param_group({"params": [param], "lr": 0.2, "momentum": 0.5})
    both(4, count=4)
    mine.state.clear()
    theirs.state.clear()
    both(5, count=4)
    with torch.no_grad():
        params[0].data, expected[0].data = params[0].detach() + 1, expected[0].detach() + 1
    both(6, count=4)


@pytest.mark.parametrize("schedule", [(0.0, 0.9, 0.8, 0.0, 0.7, 0.6, 0.0), (0.5, 0.0, 0.9, 0.0, 0.8)])
def test_momentum_from_nothing_and_back(schedule: tuple[float, ...]) -> None:
    params = make_params(SHAPES)
    expected = copies(params)
    mine = FusedSGD(params, lr=0.1, momentum=schedule[0])
    theirs = torch.optim.SGD(expected, lr=0.1, momentum=schedule[0])
    step = compiled(mine.step, "aot_eager")
    for number, momentum in enumerate(schedule):
        mine.param_groups[0]["momentum"] = theirs.param_groups[0]["momentum"] = momentum
        set_grads(params, expected, seed=number)
        step()
        theirs.step()
        assert_same(mine, theirs, params, expected)


def test_hooks_are_called_once() -> None:
    (param,) = make_params([(5,)])
    optimizer = FusedSGD([param], lr=0.1)
    called = []
    optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    optimizer.register_step_post_hook(lambda *_: called.append("after"))
    step = torch.compile(optimizer.step, backend="eager")
    for number in range(2):
        set_grads([param], seed=number)
        step()
    assert called == ["before", "after"] * 2


@pytest.mark.cpu_only
def test_a_closure_and_a_grad_scaler_are_stepped_outside_the_graph() -> None:
    params = make_params(SHAPES)
    expected = copies(params)
    mine, theirs = FusedSGD(params, lr=0.1, fused=True), FusedSGD(expected, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)

    def loss(params: list[Tensor]) -> Tensor:
        return torch.stack([param.square().sum() for param in params]).sum()

    step = torch.compile(mine.step, backend="eager")

    def closure() -> float:
        mine.zero_grad()
        value = loss(params)
        value.backward()
        return float(value.detach())

    step(closure)
    loss(expected).backward()
    theirs.step()
    assert all(torch.equal(p, q) for p, q in zip(params, expected, strict=True))
    mine.zero_grad()
    theirs.zero_grad()
    scaler.scale(loss(params)).backward()
    torch.compile(lambda: scaler.step(mine), backend="eager")()
    scaler.update()
    loss(expected).backward()
    theirs.step()
    assert all(torch.equal(p, q) for p, q in zip(params, expected, strict=True))
    assert "grad_scale" not in mine.__dict__


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_input_is_the_same_error_and_nothing_is_written(backend: str) -> None:
    params = make_params(SHAPES, torch.float16)
    before = copies(params)
    optimizer = FusedSGD([(f"weight{index}", param) for index, param in enumerate(params)], lr=0.1)
    step = compiled(optimizer.step, backend)
    set_grads(params, seed=0)
    optimizer.param_groups[0]["lr"] = float("nan")
    with pytest.raises(ValueError, match="Invalid learning rate: nan"):
        step()
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.param_groups[0]["master_weights"] = "split"
    with pytest.raises(RuntimeError, match=r"weight0.*split.* is for bfloat16"):
        step()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))


@pytest.mark.parametrize("fused", [True, False])
def test_version_counters_move(fused: bool) -> None:
    (param,) = make_params([(5,)])
    optimizer = FusedSGD([param], lr=0.1, momentum=0.9, fused=fused)
    step = compiled(optimizer.step, "inductor")
    for number in range(3):
        set_grads([param], seed=number)
        loss = param.square().sum()
        versions = [tensor._version for tensor in (param, *optimizer.state.get(param, {}).values())]
        step()
        now = [tensor._version for tensor in (param, *optimizer.state[param].values())]
        assert all(after > before for before, after in zip(versions, now, strict=False))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_two_optimizers_and_copies_have_steps_of_their_own() -> None:
    first, second = make_params([(5,)], seed=1), make_params([(5,)], seed=2)
    optimizers = [FusedSGD(first, lr=0.1, momentum=0.9), FusedSGD(second, lr=0.2, momentum=0.9)]
    optimizers.append(copy.deepcopy(optimizers[0]))
    step = compiled(lambda optimizer: optimizer.step(), "inductor")
    for optimizer in [*optimizers, *optimizers]:
        (param,) = optimizer.param_groups[0]["params"]
        (expected,) = copies([param])
        wanted = torch.optim.SGD([expected], lr=optimizer.param_groups[0]["lr"], momentum=0.9)
        if param in optimizer.state:
            wanted.state[expected]["momentum_buffer"] = optimizer.state[param]["momentum_buffer"].clone()
        set_grads([param], [expected], seed=3)
        step(optimizer)
        wanted.step()
        assert torch.equal(param, expected)


def test_an_optimizer_that_is_gone_is_freed() -> None:
    params = make_params(SHAPES)
    optimizer = FusedSGD(params, lr=0.1, momentum=0.9)
    set_grads(params, seed=0)
    compiled(optimizer.step, "inductor")()
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    torch._dynamo.reset()
    gc.collect()
    assert gone() is None


def test_training_in_one_function() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    reference = copy.deepcopy(model)
    mine = FusedSGD(model.parameters(), lr=0.1, momentum=0.9)
    theirs = torch.optim.SGD(reference.parameters(), lr=0.1, momentum=0.9)

    def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    graph = torch.compile(train, backend="aot_eager")
    for number in range(3):
        x = seeded((16, 8), number)
        graph(model, mine, x)
        train(reference, theirs, x)
    for param, expected in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(param, expected)


# --- The operator -----------------------------------------------------------------------------------------------------


def captured_arguments(optimizer: FusedSGD) -> tuple[Any, ...]:
    """What the compiled step of an optimizer gives to the operator."""
    graphs: list[tuple[torch.fx.GraphModule, list[Any]]] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        def run(*given: Any) -> Any:
            graphs.append((graph, list(given)))
            return graph(*given)

        return run

    taken: list[tuple[Any, ...]] = []

    class Take(torch.fx.Interpreter):
        def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
            if target in (torch.ops.fused_sgd.step_, torch.ops.fused_sgd.step_.default):
                taken.append(args)
                return None
            return super().call_function(target, args, kwargs)

    compiled(optimizer.step, backend)()
    Take(graphs[0][0]).run(*graphs[0][1])
    return taken[0]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own, in 2.14.1
@pytest.mark.parametrize("case", ["clip", "lars", "split", "int8"])
def test_the_operator_is_clean(case: str) -> None:
    make, dtype, options = OPTIONS[case]
    params = make_params(SHAPES, dtype)
    optimizer = make(params, **{"lr": torch.tensor(0.1), "momentum": 0.9, **options})
    set_grads(params, seed=0)
    arguments = captured_arguments(optimizer)
    torch.library.opcheck(torch.ops.fused_sgd.step_.default, arguments)


def test_the_operator_writes_what_it_is_given_and_nothing_else() -> None:
    params = make_params(SHAPES)
    optimizer = FusedSGD(params, lr=0.1, momentum=0.9)
    set_grads(params, seed=0)
    _, grads, states, *rest, _ = captured_arguments(optimizer)
    mine, buffers = copies(params), [state.clone() for state in states]
    theirs = copies(params)
    expected = torch.optim.SGD(theirs, lr=0.1, momentum=0.9)
    for param, grad, buffer in zip(theirs, grads, buffers, strict=True):
        param.grad, expected.state[param]["momentum_buffer"] = grad, buffer.clone()
    unchanged = snapshot(optimizer)
    torch.ops.fused_sgd.step_(mine, grads, buffers, *rest, optimizer._handle)
    unchanged()
    expected.step()
    for index, param in enumerate(theirs):
        assert torch.equal(mine[index], param)
        assert torch.equal(buffers[index], expected.state[param]["momentum_buffer"])


def test_the_operator_refuses_a_state_that_lacks_something() -> None:
    params = make_params(SHAPES)
    optimizer = FusedSGD(params, lr=0.1, momentum=0.9)
    set_grads(params, seed=0)
    given_params, grads, _, scalars, numbers, groups, _ = captured_arguments(optimizer)
    before = copies(params)
    groups = [group.replace('["momentum_buffer"]', "[]") for group in groups]
    with pytest.raises(RuntimeError, match="there is no momentum_buffer among the states"):
        torch.ops.fused_sgd.step_(given_params, grads, [], scalars, numbers, groups)
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))


def test_the_operator_refuses_lists_that_do_not_fit() -> None:
    params = make_params(SHAPES)
    optimizer = FusedSGD(params, lr=0.1, momentum=0.9)
    set_grads(params, seed=0)
    arguments = captured_arguments(optimizer)
    for position, name in enumerate(("params", "grads", "states")):
        wrong = [*arguments]
        wrong[position] = wrong[position][:2]
        with pytest.raises(ValueError, match=f"`{name}` has 2 elements, and the groups describe 3|`grads` has 3"):
            torch.ops.fused_sgd.step_(*wrong)
    with pytest.raises(ValueError, match="`numbers` has 3 elements, and the groups describe 8"):
        torch.ops.fused_sgd.step_(*arguments[:4], arguments[4][:3], *arguments[5:])
