"""State dicts: in both directions with torch.optim.SGD, in mid-run, to the bit."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from fused_sgd import FusedSGD
from torch import Tensor

from support import assert_same, copies, make_params, same_bits, set_grads

pytestmark = pytest.mark.usefixtures("device")

SHAPES = [(33,), (4, 5), (257,)]
OPTIONS: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "dampening": 0.2}
CLASSES = [FusedSGD, torch.optim.SGD]


def saved_and_loaded(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("at", [0, 1, 3])
@pytest.mark.parametrize("after", CLASSES)
@pytest.mark.parametrize("before", CLASSES)
def test_continuing_in_mid_run(before: Any, after: Any, at: int) -> None:
    params = make_params(SHAPES)
    expected = copies(params)
    mine = before(params, **OPTIONS)
    theirs = torch.optim.SGD(expected, **OPTIONS, foreach=False)
    for step in range(6):
        if step == at:
            state = saved_and_loaded(mine.state_dict())
            mine = after(params, lr=7.0)
            mine.load_state_dict(state)
            assert mine.param_groups[0]["lr"] == 0.1
        set_grads(params, expected, seed=step)
        mine.step()
        theirs.step()
        assert_same(mine, theirs, params, expected, f"at step {step}")


def test_keys_are_torchs() -> None:
    params = make_params(SHAPES)
    set_grads(params, seed=0)
    mine, theirs = FusedSGD(params, **OPTIONS), torch.optim.SGD(params, **OPTIONS)
    mine.step()
    theirs.step()
    mine_state, theirs_state = mine.state_dict(), theirs.state_dict()
    (group,) = mine_state["param_groups"]
    for key in ("decoupled_weight_decay", "max_grad_norm", "skip_nonfinite"):
        del group[key]  # what is off is off after loading, too
    assert list(group) == list(theirs_state["param_groups"][0])
    assert type(mine_state["state"]) is dict
    assert {k: v.keys() for k, v in mine_state["state"].items()} == {
        k: v.keys() for k, v in theirs_state["state"].items()
    }


@pytest.mark.parametrize("fused", [None, True, False])
def test_the_path_is_the_running_optimizers(fused: bool | None) -> None:
    params = make_params(SHAPES)
    for theirs in (True, False, None):
        state = torch.optim.SGD(params, lr=0.3, fused=theirs).state_dict()
        optimizer = FusedSGD(params, fused=fused)
        optimizer.load_state_dict(state)
        assert optimizer.param_groups[0]["fused"] is fused
        assert optimizer.param_groups[0]["lr"] == 0.3


def test_loading_keeps_a_buffer_that_is_wider_than_its_parameter_and_widens_a_narrower_one() -> None:
    """(torch casts to the parameter's dtype.)"""
    wide, narrow = make_params([(9,)]), make_params([(9,)], torch.bfloat16)
    source = FusedSGD(wide, lr=0.1, momentum=0.9)
    set_grads(wide, seed=0)
    source.step()
    target = FusedSGD(narrow, lr=0.1, momentum=0.9, fused=True)
    target.load_state_dict(source.state_dict())
    buffer = target.state[narrow[0]]["momentum_buffer"]
    assert same_bits(buffer, source.state[wide[0]]["momentum_buffer"])
    set_grads(narrow, seed=1)
    target.step()
    assert target.state[narrow[0]]["momentum_buffer"].dtype == torch.float32
    narrow_source = FusedSGD(narrow, lr=0.1, momentum=0.9, momentum_dtype=torch.bfloat16)
    narrow_source.step()
    with pytest.warns(UserWarning, match=r"momentum from torch.bfloat16 to torch.float32, of 1 parameter"):
        source.load_state_dict(narrow_source.state_dict())
    assert source.state[wide[0]]["momentum_buffer"].dtype == torch.float32


def test_a_checkpoint_of_another_model_is_refused_before_anything_is_written() -> None:
    params, others = make_params([(9,), (4,)]), make_params([(9,), (5,)])
    source = FusedSGD(others, lr=0.1, momentum=0.9)
    set_grads(others, seed=0)
    source.step()
    target = FusedSGD(params, lr=0.1, momentum=0.9)
    target.load_state_dict(source.state_dict())
    set_grads(params, seed=0)
    before = params[0].detach().clone()
    with pytest.raises(RuntimeError, match=r"parameter 1 .*momentum_buffer has another shape"):
        target.step()
    assert torch.equal(params[0], before)
    with pytest.raises(ValueError, match="different number of parameter groups"):
        target.load_state_dict({"state": {}, "param_groups": []})


def test_load_hooks_run() -> None:
    params = make_params(SHAPES)
    optimizer = FusedSGD(params, **OPTIONS)
    calls: list[str] = []
    optimizer.register_load_state_dict_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_load_state_dict_post_hook(lambda *_: calls.append("post"))
    optimizer.register_state_dict_post_hook(lambda *_: calls.append("saved"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["saved", "pre", "post"]


def test_momentum_switched_on_after_loading() -> None:
    params = make_params(SHAPES)
    expected = copies(params)
    mine, theirs = FusedSGD(params, lr=0.1), torch.optim.SGD(expected, lr=0.1)
    for optimizer in (mine, theirs):
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        optimizer.param_groups[0]["momentum"] = 0.9
    for step in range(3):
        set_grads(params, expected, seed=step)
        mine.step()
        theirs.step()
    assert_same(mine, theirs, params, expected)


def test_distributed_checkpoint_initialises_state_without_moving_the_parameters() -> None:
    """torch.distributed.checkpoint steps once with zero gradients and lr 0."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model = torch.nn.Linear(3, 2)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = FusedSGD(model.parameters(), lr=0.1, momentum=0.9)
    state = get_optimizer_state_dict(model, optimizer)
    assert set(state["state"]) == {"weight", "bias"}
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_every_default_is_a_constructor_argument() -> None:
    """ZeroRedundancyOptimizer calls optimizer_class(params, **defaults)."""
    params = make_params(SHAPES)
    optimizer = FusedSGD(params, **OPTIONS)
    again = FusedSGD(params, **optimizer.defaults)
    assert again.defaults == optimizer.defaults


def test_older_pickles_without_newer_keys_load() -> None:
    params = make_params(SHAPES)
    optimizer = FusedSGD(params, **OPTIONS)
    state = optimizer.__getstate__()
    newer = ("momentum_dtype", "master_weights", "stochastic_rounding")  # than the first pickles, and no defaults there
    for group in state["param_groups"]:
        for key in ("nesterov", "maximize", "foreach", "differentiable", "fused", *newer):
            group.pop(key)
    state["defaults"] = {key: value for key, value in state["defaults"].items() if key not in newer}
    older = FusedSGD.__new__(FusedSGD)
    older.__setstate__(state)
    set_grads(params, seed=0)
    older.step()


def test_gradscaler_drives_the_step(device: str) -> None:
    params = make_params([(64,), (8, 8)])
    expected = copies(params)
    mine = FusedSGD(params, lr=0.1, momentum=0.9, fused=True)
    theirs = torch.optim.SGD(expected, lr=0.1, momentum=0.9)
    scalers = [torch.amp.GradScaler(device, init_scale=1024.0, growth_interval=2) for _ in range(2)]

    def backward(scaler: torch.amp.GradScaler, tensors: list[Tensor], step: int) -> None:
        for p in tensors:
            p.grad = None
        factor = float("inf") if step in (0, 3) else 1.0
        loss = sum((p * p).sum() * factor for p in tensors)
        scaler.scale(loss).backward()

    for step in range(7):
        for scaler, optimizer, tensors in zip(scalers, (mine, theirs), (params, expected), strict=True):
            backward(scaler, tensors, step)
            scaler.step(optimizer)
            scaler.update()
        assert scalers[0].get_scale() == scalers[1].get_scale()
        for p, q in zip(params, expected, strict=True):
            assert same_bits(p, q), f"at step {step}"
    assert "grad_scale" not in mine.__dict__


@pytest.mark.parametrize(("fused", "flag"), [(None, False), (True, True), (False, False)])
def test_the_flag_that_gradscaler_asks_for(fused: bool | None, flag: bool) -> None:
    optimizer = FusedSGD(make_params(SHAPES), fused=fused)
    assert optimizer._step_supports_amp_scaling is flag
    assert copy.deepcopy(optimizer)._step_supports_amp_scaling is flag
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer._step_supports_amp_scaling is flag


@pytest.mark.parametrize("way", [{}, {"fused": True}, {"fused": False}, {"foreach": True}], ids=str)
@pytest.mark.parametrize("scale", [4.0, torch.tensor(4.0), torch.tensor([4.0], dtype=torch.float64)], ids=str)
def test_grad_scale_set_by_the_user(way: dict[str, Any], scale: float | Tensor) -> None:
    """To divide by the number of accumulated micro-batches."""
    params = make_params(SHAPES)
    expected = copies(params)
    mine = FusedSGD(params, lr=0.1, momentum=0.9, **way)
    theirs = torch.optim.SGD(expected, lr=0.1, momentum=0.9)
    set_grads(params, expected, seed=0)
    for p in params:
        p.grad.mul_(4)
    mine.grad_scale = scale
    mine.step()
    theirs.step()
    assert all(same_bits(p, q) for p, q in zip(params, expected, strict=True))


@pytest.mark.parametrize("fused", [True, False])
def test_entries_of_no_parameter_are_kept(fused: bool) -> None:
    """As in torch: of a number beyond the parameters, and under a key of the user's own."""
    params = make_params(SHAPES)
    set_grads(params, seed=0)
    mine = FusedSGD(params, **OPTIONS, fused=fused)
    mine.step()
    mine.state["note"] = {"ema": torch.ones(2)}
    state = mine.state_dict()
    state["state"][77] = {"momentum_buffer": torch.ones(3)}
    mine.load_state_dict(state)
    assert torch.equal(mine.state[77]["momentum_buffer"], torch.ones(3))
    assert torch.equal(mine.state["note"]["ema"], torch.ones(2))
    mine.step()


def test_a_momentum_in_a_dtype_without_arithmetic() -> None:
    params = make_params(SHAPES)
    set_grads(params, seed=0)
    mine = FusedSGD(params, **OPTIONS)
    mine.step()
    state = mine.state_dict()
    state["state"][1]["momentum_buffer"] = state["state"][1]["momentum_buffer"].to(torch.float8_e4m3fn)
    mine.load_state_dict(state)
    before = copies(params)
    with pytest.raises(RuntimeError, match=r"parameter 1 .*momentum_buffer has a dtype that cannot hold it .*float8"):
        mine.step()
    assert all(same_bits(p, q) for p, q in zip(params, before, strict=True))


def test_what_torch_does_not_have() -> None:
    """An option that was off is off after loading; a checkpoint of torch's says nothing about it."""
    params = make_params(SHAPES)
    options: dict[str, Any] = {"decoupled_weight_decay": True, "max_grad_norm": 2.0, "skip_nonfinite": True}
    off = {"decoupled_weight_decay": False, "max_grad_norm": None, "skip_nonfinite": False}
    for source, expected in ((FusedSGD, off), (torch.optim.SGD, options)):
        mine = FusedSGD(params, lr=0.2, **options)
        mine.load_state_dict(saved_and_loaded(source(params, lr=0.1).state_dict()))
        assert mine.param_groups[0]["lr"] == 0.1
        assert {key: mine.param_groups[0][key] for key in options} == expected


def test_an_option_that_only_some_groups_use() -> None:
    params = make_params(SHAPES)
    groups = [{"params": [p], "decoupled_weight_decay": index == 1} for index, p in enumerate(params)]
    saved = FusedSGD(groups, lr=0.1).state_dict()
    mine = FusedSGD([{"params": [p], "decoupled_weight_decay": True} for p in params], lr=0.1)
    mine.load_state_dict(saved_and_loaded(saved))
    assert [group["decoupled_weight_decay"] for group in mine.param_groups] == [False, True, False]
