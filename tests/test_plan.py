"""The plan is a cache and only a cache: whatever anyone replaces between two steps, the next step is right.

Each test runs FusedSGD beside torch.optim.SGD, does the same thing to both, and compares to the bit.
"""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fused_sgd import FusedSGD
from torch import Tensor

from support import assert_same, copies, make_params, same_bits, set_grads

pytestmark = pytest.mark.usefixtures("device")

Optimizer = torch.optim.Optimizer
SHAPES = [(33,), (4, 5), (257,)]
OPTIONS: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}


def replace_gradient(optimizer: Optimizer, params: list[Tensor]) -> None:
    params[0].grad = torch.full_like(params[0], 0.5)


def drop_gradient(optimizer: Optimizer, params: list[Tensor]) -> None:
    params[1].grad = None


def replace_storage(optimizer: Optimizer, params: list[Tensor]) -> None:
    params[0].data = torch.linspace(0, 1, 33)


def grow_parameter(optimizer: Optimizer, params: list[Tensor]) -> None:
    params[0].grad = None
    params[0].data = torch.linspace(0, 1, 70)
    params[0].grad = torch.ones(70)
    del optimizer.state[params[0]]


def swap_tensors(optimizer: Optimizer, params: list[Tensor]) -> None:
    grad = params[0].grad
    other = torch.linspace(0, 1, 33).requires_grad_()
    other.grad = grad.clone()
    torch.utils.swap_tensors(params[0], other)


def change_dtype(optimizer: Optimizer, params: list[Tensor]) -> None:
    grad = params[0].grad.double()
    params[0].grad = None
    params[0].data = params[0].data.double()
    params[0].grad = grad
    optimizer.state[params[0]]["momentum_buffer"] = optimizer.state[params[0]]["momentum_buffer"].double()


def replace_buffer(optimizer: Optimizer, params: list[Tensor]) -> None:
    optimizer.state[params[0]]["momentum_buffer"] = torch.full((33,), 0.25)


def write_buffer(optimizer: Optimizer, params: list[Tensor]) -> None:
    optimizer.state[params[0]]["momentum_buffer"].fill_(0.25)


def replace_buffer_data(optimizer: Optimizer, params: list[Tensor]) -> None:
    optimizer.state[params[0]]["momentum_buffer"].data = torch.full((33,), 0.25)


def delete_buffer(optimizer: Optimizer, params: list[Tensor]) -> None:
    del optimizer.state[params[0]]["momentum_buffer"]


def set_buffer_to_none(optimizer: Optimizer, params: list[Tensor]) -> None:
    optimizer.state[params[0]]["momentum_buffer"] = None


def transpose_buffer(optimizer: Optimizer, params: list[Tensor]) -> None:
    buffer = optimizer.state[params[1]]["momentum_buffer"]
    optimizer.state[params[1]]["momentum_buffer"] = buffer.t().contiguous().t()


def replace_inner_dict(optimizer: Optimizer, params: list[Tensor]) -> None:
    optimizer.state[params[0]] = {"momentum_buffer": torch.full((33,), 0.25)}


def delete_from_state(optimizer: Optimizer, params: list[Tensor]) -> None:
    del optimizer.state[params[0]]


def pop_from_state(optimizer: Optimizer, params: list[Tensor]) -> None:
    optimizer.state.pop(params[0])


def clear_state(optimizer: Optimizer, params: list[Tensor]) -> None:
    optimizer.state.clear()


def update_state(optimizer: Optimizer, params: list[Tensor]) -> None:
    optimizer.state.update({params[0]: {"momentum_buffer": torch.full((33,), 0.25)}})


def touch_state(optimizer: Optimizer, params: list[Tensor]) -> None:
    del optimizer.state[params[0]]
    optimizer.state[params[0]]["momentum_buffer"] = torch.full((33,), 0.25)  # through __missing__


def setdefault_state(optimizer: Optimizer, params: list[Tensor]) -> None:
    del optimizer.state[params[0]]
    optimizer.state.setdefault(params[0], {})["momentum_buffer"] = torch.full((33,), 0.25)


def replace_state(optimizer: Optimizer, params: list[Tensor]) -> None:
    optimizer.state = defaultdict(dict)


def replace_state_with_plain_dict(optimizer: Optimizer, params: list[Tensor]) -> None:
    optimizer.state = dict(optimizer.state)
    optimizer.state[params[0]] = {"momentum_buffer": torch.full((33,), 0.25)}


def change_lr(optimizer: Optimizer, params: list[Tensor]) -> None:
    optimizer.param_groups[0]["lr"] = 0.03


def tensor_lr(optimizer: Optimizer, params: list[Tensor]) -> None:
    optimizer.param_groups[0]["lr"] = torch.tensor(0.03)


def momentum_off(optimizer: Optimizer, params: list[Tensor]) -> None:
    optimizer.param_groups[0]["momentum"] = 0


def nesterov_on(optimizer: Optimizer, params: list[Tensor]) -> None:
    optimizer.param_groups[0]["nesterov"] = True


def maximize_on(optimizer: Optimizer, params: list[Tensor]) -> None:
    optimizer.param_groups[0]["maximize"] = True


def foreach_on(optimizer: Optimizer, params: list[Tensor]) -> None:
    optimizer.param_groups[0]["foreach"] = True


def replace_group(optimizer: Optimizer, params: list[Tensor]) -> None:
    optimizer.param_groups[0] = {**optimizer.param_groups[0], "lr": 0.03}


def replace_groups(optimizer: Optimizer, params: list[Tensor]) -> None:
    optimizer.param_groups = [{**optimizer.param_groups[0], "params": params[:1], "lr": 0.03}]


def shorten_group(optimizer: Optimizer, params: list[Tensor]) -> None:
    optimizer.param_groups[0]["params"] = params[1:]


def reverse_group(optimizer: Optimizer, params: list[Tensor]) -> None:
    optimizer.param_groups[0]["params"].reverse()


def add_group(optimizer: Optimizer, params: list[Tensor]) -> None:
    extra = make_params([(11,)], seed=9)[0]
    params.append(extra)
    extra.grad = torch.full((11,), 0.5)
    optimizer.add_param_group({"params": [extra], "lr": 0.2, "momentum": 0.5})


def load_own_state(optimizer: Optimizer, params: list[Tensor]) -> None:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def transpose_gradient(optimizer: Optimizer, params: list[Tensor]) -> None:
    params[1].grad = params[1].grad.t().contiguous().t()


def nothing(optimizer: Optimizer, params: list[Tensor]) -> None:
    pass


CHANGES = [
    replace_gradient, drop_gradient, replace_storage, grow_parameter, swap_tensors, change_dtype, replace_buffer,
    write_buffer, replace_buffer_data, delete_buffer, set_buffer_to_none, transpose_buffer, replace_inner_dict,
    delete_from_state, pop_from_state, clear_state, update_state, touch_state, setdefault_state, replace_state,
    replace_state_with_plain_dict, change_lr, tensor_lr, momentum_off, nesterov_on, maximize_on, foreach_on,
    replace_group, replace_groups, shorten_group, reverse_group, add_group, load_own_state, transpose_gradient, nothing,
]  # fmt: skip


@pytest.mark.parametrize("others", [0, 500])  # before those that change: enough for a second thread
@pytest.mark.parametrize("fresh_gradients", [False, True])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_change_between_steps(
    change: Callable[[Optimizer, list[Tensor]], None], fresh_gradients: bool, others: int
) -> None:
    torch.set_num_threads(2)
    params = make_params(SHAPES)
    expected = copies(params)
    first = make_params(others * [(3,)], seed=1)
    first_expected = copies(first)
    mine = FusedSGD([*first, *params], **OPTIONS)
    theirs = torch.optim.SGD([*first_expected, *expected], **OPTIONS, foreach=False)
    set_grads(first + params, first_expected + expected, seed=0)
    for step in range(5):
        if fresh_gradients:
            set_grads(first + params, first_expected + expected, seed=step)
        if step == 2:
            change(mine, params)
            change(theirs, expected)
        mine.step()
        theirs.step()
        assert_same(mine, theirs, first + params, first_expected + expected, f"at step {step}")


def test_tensor_lr_is_read_at_every_step() -> None:
    lr = torch.tensor(0.1)
    decay = torch.tensor(0.01, dtype=torch.float64)
    params = make_params(SHAPES)
    expected = copies(params)
    mine = FusedSGD(params, lr=lr, weight_decay=decay, momentum=0.9, fused=True)
    theirs = torch.optim.SGD(expected, lr=lr, weight_decay=decay, momentum=0.9)
    for step in range(4):
        set_grads(params, expected, seed=step)
        mine.step()
        theirs.step()
        lr.mul_(0.5)
        decay.add_(0.01)
    assert_same(mine, theirs, params, expected)


def test_parameters_that_take_turns() -> None:
    """Mixture of experts: every step has other parameters with gradients."""
    params = make_params([(50,)] * 6)
    expected = copies(params)
    mine = FusedSGD(params, **OPTIONS, fused=True)
    theirs = torch.optim.SGD(expected, **OPTIONS)
    for step in range(12):
        set_grads(params, expected, seed=step)
        for index in range(6):
            if (index + step) % 3 == 0 or (index > 3 and step < 5):
                params[index].grad = expected[index].grad = None
        mine.step()
        theirs.step()
        assert_same(mine, theirs, params, expected, f"at step {step}")


def test_copies_and_pickles_are_independent() -> None:
    params = make_params(SHAPES)
    optimizer = FusedSGD(params, **OPTIONS)
    set_grads(params, seed=0)
    optimizer.step()
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        twins = twin.param_groups[0]["params"]
        before = [p.detach().clone() for p in params]
        for step in range(1, 3):
            set_grads(twins, seed=step)
            twin.step()
        assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True)), "the original changed"
        assert not any(torch.equal(p, q) for p, q in zip(params, twins, strict=True))
    expected = copies(params)
    theirs = torch.optim.SGD(expected, **OPTIONS)
    theirs.load_state_dict(optimizer.state_dict())
    twin = copy.deepcopy(optimizer)
    twins = twin.param_groups[0]["params"]
    for step in range(1, 3):
        set_grads(twins, expected, seed=step)
        twin.step()
        theirs.step()
    assert_same(twin, theirs, twins, expected)


def test_nothing_outlives_the_optimizer() -> None:
    """Momentum goes with the optimizer at once, not when the garbage collector comes by."""
    params = make_params(SHAPES)
    set_grads(params, seed=0)
    optimizer = FusedSGD(params, **OPTIONS)
    optimizer.step()
    buffer = weakref.ref(optimizer.state[params[0]]["momentum_buffer"])
    gc.disable()
    try:
        del optimizer
        assert buffer() is None
    finally:
        gc.enable()


def test_clearing_the_state_frees_it_at_once() -> None:
    params = make_params(SHAPES)
    set_grads(params, seed=0)
    optimizer = FusedSGD(params, **OPTIONS)
    optimizer.step()
    buffer = weakref.ref(optimizer.state[params[0]]["momentum_buffer"])
    optimizer.state.clear()
    assert buffer() is None


def test_a_circle_through_the_plan_is_collected() -> None:
    """A parameter's hook may hold the model, the model the optimizer, and the optimizer's plan the parameter."""

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(3))
            self.optimizer = FusedSGD([self.weight], lr=0.1, momentum=0.9)
            self.weight.register_hook(lambda grad: grad * len(list(self.parameters())))

    model = Model()
    model.weight.sum().backward()
    model.optimizer.step()
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_reading_leaves_no_entries() -> None:
    """An entry that reading creates makes torch.distributed.checkpoint think that the state is there."""
    params = make_params(SHAPES)
    optimizer = FusedSGD(params, **OPTIONS)
    optimizer.explain()
    optimizer.step()  # no gradient anywhere
    assert not optimizer.state
    plain = FusedSGD(params, lr=0.1)
    set_grads(params, seed=0)
    plain.step()
    assert not plain.state


def test_version_counters_are_bumped() -> None:
    params = make_params([(5,), (2, 3)])
    set_grads(params, seed=0)
    optimizer = FusedSGD(params, **OPTIONS, fused=True)
    optimizer.step()
    versions = [p._version for p in params] + [optimizer.state[p]["momentum_buffer"]._version for p in params]
    optimizer.step()
    after = [p._version for p in params] + [optimizer.state[p]["momentum_buffer"]._version for p in params]
    assert all(b > a for a, b in zip(versions, after, strict=True))


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_shared_memory_stays_an_error(steps: int) -> None:
    """A step that had refused a gradient inside a parameter let the next one pass."""
    params = make_params([(100,), (50,), (100,)])
    optimizer = FusedSGD(params, lr=0.1, momentum=0.9, fused=True)
    for step in range(steps):
        set_grads(params, seed=step)
        optimizer.step()
    set_grads(params, seed=7)
    params[2].grad = params[0].detach()
    before = [p.detach().clone() for p in params]
    for _ in range(3):
        with pytest.raises(RuntimeError, match="shares memory"):
            optimizer.step()
    assert all(same_bits(p, q) for p, q in zip(params, before, strict=True))
    set_grads(params, seed=8)
    optimizer.step()
