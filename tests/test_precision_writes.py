"""Precision options: parameters that others write between steps, and what their masters make of it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fused_sgd import FusedSGD
from precision_support import FUSED, Model, rounded, train
from torch import Tensor, nn

from support import Params, assert_same, copies, make_params, same_bits, seeded, set_grads, snapshot

pytestmark = pytest.mark.usefixtures("device")


def by_copy(p: Tensor, values: Tensor) -> None:
    with torch.no_grad():
        p.copy_(values)


def by_index(p: Tensor, values: Tensor) -> None:
    with torch.no_grad():
        p[0].copy_(values[0])


def by_load_state_dict(p: Tensor, values: Tensor) -> None:
    module = nn.Module()
    module.weight = p
    module.load_state_dict({"weight": values})


def by_data(p: Tensor, values: Tensor) -> None:
    p.data = values.clone()


def by_edit_of_data(p: Tensor, values: Tensor) -> None:
    p.data.copy_(values)


WAYS = pytest.mark.parametrize("write", [by_copy, by_index, by_load_state_dict, by_data, by_edit_of_data])


@FUSED
@WAYS
@pytest.mark.parametrize("late", [False, True], ids=["in the steady path", "before another first step"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_others_write_counts(dtype: torch.dtype, late: bool, write: Callable[..., None], fused: bool) -> None:
    """What was written replaces the master; where the old value was written again, the master keeps its bits."""
    params: Params = [nn.Parameter(p.detach()) for p in make_params([(6, 64), (5, 3)], dtype)]
    model = Model(params, lr=0.1, momentum=0.9)
    more: Params = make_params([(4,)], dtype) if late else []
    mine = FusedSGD([*params, *more], lr=0.1, momentum=0.9, master_weights="float32", fused=fused)
    for step in range(8):
        if step in (4, 5):
            for p, q in zip(params, model.wide, strict=True):
                values = p.detach().clone()
                values[0] = seeded(values[0].shape, step).to(dtype)
                values[0, 1] = 0
                write(p, values)
                with torch.no_grad():
                    q[0] = torch.where(values[0] == rounded(q, dtype)[0], q[0], values[0].float())
            if write is by_edit_of_data:
                mine.refresh_master_weights()
            for p in more:
                p.grad = torch.ones_like(p)
        set_grads(params, seed=step)
        mine.step()
        model.step(params)
        for p, q in zip(params, model.wide, strict=True):
            assert same_bits(mine.state[p]["master"], q), f"at step {step}"
            assert same_bits(p, rounded(q, dtype))


@FUSED
@WAYS
def test_what_others_write_counts_at_once_in_split(write: Callable[..., None], fused: bool) -> None:
    """The remainder stays: less than half of a step of the parameter's own."""
    p = nn.Parameter(make_params([(6, 64)], torch.bfloat16)[0].detach())
    mine = FusedSGD([p], lr=0.1, master_weights="split", fused=fused)
    train(mine, [p], range(3))
    values = p.detach().clone()
    values[0] = seeded(values[0].shape, 5).bfloat16()
    write(p, values)
    p.grad = torch.zeros_like(p)
    mine.step()
    assert same_bits(p, values)


@FUSED
@pytest.mark.parametrize("value", [0.0, -0.0, float("inf"), -float("inf"), 2.0**-133, -(2.0**-133)])
def test_zeros_and_infinities_written_into_a_split_parameter_stay(value: float, fused: bool) -> None:
    """Pruning sets weights to zero. A remainder from before, taken from the bits of a zero, would leave a NaN."""
    p = make_params([(6, 64)], torch.bfloat16)[0]
    mine = FusedSGD([p], lr=0.1, master_weights="split", fused=fused)
    train(mine, [p], range(3))
    p.data.fill_(value)
    p.grad = torch.zeros_like(p)
    mine.step()
    assert not p.isnan().any()
    if abs(value) < 1:
        assert (p == value).all()


@FUSED
def test_what_is_written_into_a_split_parameter_is_exact_without_the_remainder(fused: bool) -> None:
    """docs/precision.md says what stays of one, and how to be rid of it."""
    p = make_params([(6, 64)], torch.bfloat16)[0]
    mine = FusedSGD([p], lr=0.1, master_weights="split", ema_decay=0.0, fused=fused)
    train(mine, [p], range(3))
    with torch.no_grad():
        p.fill_(1.0)
    p.grad = torch.zeros_like(p)
    mine.step()
    exact = mine.state[p]["ema"]  # without decay it is the weight
    assert (p == 1).all()
    assert 0 < (exact - 1).abs().max() <= 2.0**-8
    mine.state[p]["remainder"].zero_()
    mine.step()
    assert (mine.state[p]["ema"] == 1).all()


def test_masters_are_not_refreshed_inside_swap_ema() -> None:
    p = make_params([(6, 64)], torch.bfloat16)[0]
    mine = FusedSGD([p], lr=0.1, master_weights="float32", ema_decay=0.9)
    train(mine, [p], range(3))
    unchanged = mine.state[p]["master"].clone()
    with mine.swap_ema():
        with pytest.raises(RuntimeError, match=r"refresh_master_weights\(\) inside swap_ema"):
            mine.refresh_master_weights()
        with pytest.raises(RuntimeError, match=r"a copy inside swap_ema"):  # it would take averages for weights
            copy.deepcopy(mine)
    assert same_bits(mine.state[p]["master"], unchanged)


@pytest.mark.parametrize("fused", [True, False])
def test_an_edit_of_data_before_the_first_applied_step(fused: bool) -> None:
    """The master that was made for a step that was skipped is not the next one's."""
    params = make_params([(9,)], torch.bfloat16)
    options: dict[str, Any] = {"lr": 1.0, "master_weights": torch.float32, "skip_nonfinite": True}
    optimizer = FusedSGD(params, **options, fused=fused)
    params[0].grad = torch.full_like(params[0], torch.inf)
    optimizer.step()
    params[0].data.fill_(5.0)
    optimizer.refresh_master_weights()
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    assert torch.equal(params[0], torch.full_like(params[0], 4.0))


@pytest.mark.cpu_only  # a GPU decides by itself, when the host has done its part
@pytest.mark.filterwarnings("ignore:fused_sgd. converted momentum")
@pytest.mark.parametrize(("fused", "fails"), [(True, True), (True, False), (False, False)])
def test_a_step_that_is_none_takes_over_and_converts_nothing(fused: bool, fails: bool) -> None:
    """Neither a write into the parameter nor another momentum_dtype, until a step is done."""
    params = make_params([(9,), (9,)], torch.bfloat16)
    expected = copies(params)
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "master_weights": torch.float32, "fused": fused}
    mine, theirs = FusedSGD(params, **options, skip_nonfinite=not fails), FusedSGD(expected, **options)
    set_grads(params, expected, seed=0)
    mine.step()
    theirs.step()
    mine.param_groups[0]["momentum_dtype"] = torch.bfloat16
    kept = params[0].detach().clone()
    with torch.no_grad():
        params[0].fill_(5.0)
    set_grads(params, seed=1)
    if fails:
        params[1].grad = params[0].data
    else:
        params[1].grad.fill_(torch.inf)
    unchanged = snapshot(mine)
    with pytest.raises(RuntimeError, match="shares memory") if fails else contextlib.nullcontext():
        mine.step()
    unchanged()
    mine.param_groups[0]["momentum_dtype"] = None
    with torch.no_grad():
        params[0].copy_(kept)
    for step in range(2, 4):
        set_grads(params, expected, seed=step)
        mine.step()
        theirs.step()
        assert_same(mine, theirs, params, expected, f"at step {step}")
        for p, q in zip(params, expected, strict=True):
            assert same_bits(mine.state[p]["master"], theirs.state[q]["master"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_written_into_many_parameters_at_once(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a clamp of all weights after each step does it: only what was written changes, and nothing is judged anew."""
    shapes = [(5,), (0, 3), (), (1 << 20, 1), (2, 3, 4, 4), (1000, 600), (7, 3), (1000, 600)]
    params = make_params(shapes, dtype)
    params[4] = params[4].detach().to(memory_format=torch.channels_last).requires_grad_()
    expected = copies(params)
    mine = FusedSGD(params, lr=0.1, momentum=0.9, master_weights=torch.float32)
    theirs = FusedSGD(expected, lr=0.1, momentum=0.9, master_weights=torch.float32, fused=False)
    set_grads(params, expected, seed=0)
    mine.step()
    theirs.step()
    monkeypatch.setattr(mine, "_admit", None)
    for number in range(1, 3):
        before = [mine.state[param]["master"].clone() for param in params]
        with torch.no_grad():
            for param in [*params, *expected]:
                if param.dim() != 1:
                    param.clamp_(-0.5, 0.5)
        weights = mine.master_weights()
        for param, master in zip(params, before, strict=True):
            was_clamped = rounded(master, dtype) != param
            assert same_bits(weights[param], torch.where(was_clamped, param.float(), master))
        set_grads(params, expected, seed=number)
        mine.step()
        theirs.step()
        for param, other in zip(params, expected, strict=True):
            assert same_bits(param, other)
            assert same_bits(mine.state[param]["master"], theirs.state[other]["master"])


def test_a_skipped_step_gives_back_what_it_took_over() -> None:
    params = make_params([(5,), (7, 3)], torch.bfloat16)
    mine = FusedSGD(params, lr=0.1, master_weights=torch.float32, skip_nonfinite=True)
    set_grads(params, seed=0)
    mine.step()
    with torch.no_grad():
        params[0].fill_(3.0)
    before = [mine.state[param]["master"].clone() for param in params]
    assert params[1].grad is not None
    params[1].grad[0] = torch.inf
    mine.step()
    if params[0].device.type == "cpu":  # a GPU decides alone
        assert all(same_bits(mine.state[p]["master"], master) for p, master in zip(params, before, strict=True))
    params[1].grad[0] = 0.0
    params[0].grad = torch.zeros_like(params[0])
    mine.step()
    assert bool((mine.state[params[0]]["master"] == 3.0).all())
