"""First steps are told by what the momentum buffer holds: -0.0, or with dampening a NaN that stands for "unset"."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from fused_sgd import FusedSGD
from fused_sgd.reference import fill_unset, is_unset
from torch import Tensor

from support import assert_same, copies, make_params, same_bits, set_grads

pytestmark = pytest.mark.usefixtures("device")

SHAPES = [(7,), (4097,), (3, 5), (0,), ()]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
OPTIONS: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}


def after_a_skip(params: list[Tensor], fused: bool | None = True) -> FusedSGD:
    """The state that a device-side skip of the first step leaves: buffers that hold nothing."""
    optimizer = FusedSGD(params, **OPTIONS, fused=fused)
    for p in params:
        optimizer.state[p]["momentum_buffer"] = fill_unset(torch.empty_like(p).detach())
    return optimizer


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_step_into_unset_buffers_is_the_first(isa: str, dtype: torch.dtype, fused: bool) -> None:
    params = make_params(SHAPES, dtype)
    expected = copies(params)
    mine, theirs = after_a_skip(params, fused), FusedSGD(expected, **OPTIONS, fused=True)
    for step in range(3):
        set_grads(params, expected, seed=step)
        if step == 1:
            params[1].grad = expected[1].grad = None
        mine.step()
        theirs.step()
        assert_same(mine, theirs, params, expected, f"at step {step}")
        assert not any(is_unset(mine.state[p]["momentum_buffer"]).any() for p in params)


@pytest.mark.parametrize("way", [{"foreach": True}, {"fused": False}, {"fused": None}], ids=str)
def test_late_parameters_and_resuming(way: dict[str, Any]) -> None:
    """A checkpoint in the middle, of parameters of which some had no gradient yet."""
    params = make_params(SHAPES)
    expected = copies(params)
    mine: FusedSGD = FusedSGD(params, **OPTIONS, fused=True)
    theirs = torch.optim.SGD(expected, **OPTIONS, foreach=False)
    for step in range(6):
        set_grads(params, expected, seed=step)
        if step < 4:
            params[0].grad = expected[0].grad = None
        if step == 2:
            saved = mine.state_dict()
            mine = FusedSGD(params, **OPTIONS, **way)
            mine.load_state_dict(copy.deepcopy(saved))
        mine.step()
        theirs.step()
        assert_same(mine, theirs, params, expected, f"at step {step}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fused", [True, False])
def test_unset_buffers_survive_a_checkpoint(dtype: torch.dtype, fused: bool) -> None:
    params = make_params(SHAPES, dtype)
    expected = copies(params)
    file = io.BytesIO()
    torch.save(after_a_skip(params).state_dict(), file)
    file.seek(0)
    mine = FusedSGD(params, **OPTIONS, fused=fused)
    mine.load_state_dict(torch.load(file, weights_only=True))
    theirs = FusedSGD(expected, **OPTIONS, fused=fused)
    for step in range(2):
        set_grads(params, expected, seed=step)
        mine.step()
        theirs.step()
        assert_same(mine, theirs, params, expected, f"at step {step}")


def test_unset_buffers_are_no_nan_to_torch() -> None:
    """torch knows a first step by a missing buffer; NaN would ruin the parameters."""
    params = make_params(SHAPES)
    expected, fresh = copies(params), copies(params)
    optimizer = after_a_skip(params)
    theirs, first = torch.optim.SGD(expected, **OPTIONS), torch.optim.SGD(fresh, **OPTIONS)
    theirs.load_state_dict(optimizer.state_dict())
    assert all(is_unset(optimizer.state[p]["momentum_buffer"]).all() for p in params), "only the copy goes without"
    for group in theirs.param_groups:
        group["fused"] = None
    set_grads(expected, fresh, seed=0)
    theirs.step()
    first.step()
    assert all(same_bits(p, q) for p, q in zip(expected, fresh, strict=True))


def test_foreach_into_unset_buffers() -> None:
    params = make_params(SHAPES)
    expected = copies(params)
    mine = after_a_skip(params, None)
    mine.param_groups[0]["foreach"] = True
    theirs = torch.optim.SGD(expected, **OPTIONS, foreach=True)
    for step in range(3):
        set_grads(params, expected, seed=step)
        mine.step()
        theirs.step()
        assert_same(mine, theirs, params, expected, f"at step {step}")


@pytest.mark.parametrize("part", [slice(None), slice(2, 3)], ids=["a buffer", "an element"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_buffer_unset_between_steady_steps_begins_anew(isa: str, dtype: torch.dtype, part: slice) -> None:
    """Also where a step finds everything else as the last one left it."""
    params = make_params(SHAPES, dtype)
    expected = copies(params)
    mine, theirs = FusedSGD(params, **OPTIONS, fused=True), FusedSGD(expected, **OPTIONS, fused=False)
    for step in range(6):
        set_grads(params, expected, seed=step)
        if step == 4:
            for optimizer, p in ((mine, params[0]), (theirs, expected[0])):
                fill_unset(optimizer.state[p]["momentum_buffer"][part])
        mine.step()
        theirs.step()
        assert_same(mine, theirs, params, expected, f"at step {step}")
        assert not any(is_unset(mine.state[p]["momentum_buffer"]).any() for p in params)


@pytest.mark.parametrize(("fused", "fails"), [(True, True), (True, False), (False, False)])
def test_options_that_change_after_a_first_step_that_was_none(fused: bool, fails: bool) -> None:
    """What had been made for that step does not fit the next: with dampening, a buffer of zeros is no first step."""
    params = make_params([(33,), (33,)])
    expected = copies(params)
    mine = FusedSGD(params, lr=0.1, momentum=0.9, skip_nonfinite=not fails, fused=fused)
    theirs = torch.optim.SGD(expected, lr=0.1, momentum=0.9, dampening=0.5)
    set_grads(params, seed=0)
    if fails:
        params[1].grad = params[0].data
        with pytest.raises(RuntimeError, match="shares memory"):
            mine.step()
    else:
        params[0].grad.fill_(torch.inf)
        mine.step()
    if fused and not fails and params[0].is_cuda:
        return  # the GPU alone knows that it skipped the step, and that the buffers hold nothing
    assert not any(mine.state.values())
    mine.param_groups[0]["dampening"] = 0.5
    for step in range(1, 4):
        set_grads(params, expected, seed=step)
        mine.step()
        theirs.step()
        assert_same(mine, theirs, params, expected, f"at step {step}")
