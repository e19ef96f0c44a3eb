"""Precision options: checkpoints, and conversions from mode to mode."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from fused_sgd import FusedSGD
from fused_sgd.reference import fill_unset
from precision_support import EACH_MODE, FUSED, MASTERS, MODES, SHAPES, assert_alike, saved_and_loaded, train
from torch import Tensor

from support import Params, copies, make_params, same_bits, set_grads, snapshot

pytestmark = pytest.mark.usefixtures("device")


@FUSED
@EACH_MODE
def test_continuing_from_a_checkpoint(mode: str, fused: bool) -> None:
    dtype, options = MODES[mode]
    options = {"lr": 0.1, "momentum": 0.9, "dampening": 0.2, "fused": fused, "ema_decay": 0.9, **options}
    params = make_params(SHAPES, dtype)
    mine = FusedSGD(params, **options)
    train(mine, params, range(2))
    others = copies(params)
    again = FusedSGD(others, **{**options, "lr": 5.0})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again.load_state_dict(saved_and_loaded(mine.state_dict()))
    assert_alike(mine, params, again, others)
    train(mine, params, range(2, 4))
    train(again, others, range(2, 4))
    assert_alike(mine, params, again, others)


@FUSED
@EACH_MODE
def test_torchs_checkpoint_loads_into_each_mode(mode: str, fused: bool) -> None:
    """Its momentum counts: a step with no gradient goes where torch's goes, to what the formats tell apart."""
    dtype, options = MODES[mode]
    params = make_params([(3, 64), (33,)], dtype)
    expected = copies(params)
    theirs = torch.optim.SGD(expected, lr=0.5, momentum=0.9, foreach=False)
    for step in range(2):
        set_grads(expected, seed=step)
        theirs.step()
    with torch.no_grad():
        for p, q in zip(params, expected, strict=True):
            p.copy_(q)
    mine = FusedSGD(params, lr=7.0, fused=fused, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mine.load_state_dict(saved_and_loaded(theirs.state_dict()))
    assert {key: mine.param_groups[0][key] for key in options} == options
    assert mine.param_groups[0]["fused"] is fused
    for p, q in zip(params, expected, strict=True):
        p.grad, q.grad = torch.zeros_like(p), torch.zeros_like(q)
    mine.step()
    theirs.step()
    for p, q in zip(params, expected, strict=True):
        torch.testing.assert_close(p, q, rtol=2**-6, atol=0.02)


FP32_TO_INT8 = "momentum from torch.float32 to int8 blocks"
INT8_TO_FP32 = "momentum from int8 blocks to torch.float32"
TO_SPLIT = "master weights from float32 to a 16-bit remainder"
TO_MASTER = "master weights from a 16-bit remainder to float32"
MASTER = {"master_weights": "float32"}
SPLIT = {"master_weights": "split"}
INT8 = {"momentum_dtype": torch.int8}
CONVERSIONS: list[tuple[torch.dtype, dict[str, Any], dict[str, Any], set[str]]] = [
    (torch.float32, {}, INT8, {FP32_TO_INT8}),
    (torch.float32, INT8, {}, {INT8_TO_FP32}),
    (torch.float32, {}, {"momentum_dtype": torch.bfloat16}, {"momentum from torch.float32 to torch.bfloat16"}),
    (torch.float32, {"momentum_dtype": torch.float16}, {}, {"momentum from torch.float16 to torch.float32"}),
    (torch.float32, {"momentum_dtype": torch.bfloat16}, INT8, {"momentum from torch.bfloat16 to int8 blocks"}),
    (torch.bfloat16, SPLIT, MASTER, {TO_MASTER}),
    (torch.bfloat16, MASTER, SPLIT, {TO_SPLIT}),
    (torch.bfloat16, MASTER, {}, {"dropped master weights"}),
    (torch.bfloat16, SPLIT, {}, {"dropped master weights"}),
    (torch.bfloat16, {**SPLIT, **INT8}, MASTER, {TO_MASTER, INT8_TO_FP32}),
    (torch.bfloat16, SPLIT, {**MASTER, **INT8}, {TO_MASTER, FP32_TO_INT8}),
    (torch.bfloat16, {}, INT8, {"momentum from torch.bfloat16 to int8 blocks"}),
    (torch.bfloat16, {}, SPLIT, {"momentum from torch.bfloat16 to torch.float32"}),
]


@FUSED
@pytest.mark.parametrize("running", [False, True], ids=["loaded", "in mid-run"])
@pytest.mark.parametrize(
    ("dtype", "before", "after", "said"),
    CONVERSIONS,
    ids=lambda value: " and ".join(sorted(value)) if isinstance(value, set) else str(value),  # a set has no order
)
def test_conversions(
    dtype: torch.dtype, before: dict[str, Any], after: dict[str, Any], said: set[str], running: bool, fused: bool
) -> None:
    """By loading into another optimizer, and by changing the options of a running one."""
    params = make_params([(3, 64), (5, 128)], dtype)
    mine = FusedSGD(params, lr=0.1, momentum=0.9, fused=fused, **before)
    train(mine, params, range(3))
    buffers, masters = momentum_of(mine, params), masters_of(mine, params)
    others = copies(params)
    other = FusedSGD(others, lr=0.1, momentum=0.9, fused=fused, **(before if running else after))
    set_grads(others, seed=3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        other.load_state_dict(saved_and_loaded(mine.state_dict()))
        if running:
            assert not caught
            other.param_groups[0] |= {"momentum_dtype": None, "master_weights": None, **after}
        for p in others:
            p.grad.zero_()
        other.param_groups[0] |= {"lr": 0.0, "momentum": 1.0}
        other.step()
    texts = " / ".join(str(warning.message) for warning in caught)
    assert all(what in texts for what in said), texts
    assert texts.count("of 2 parameters") == texts.count("converted") + texts.count("dropped") == len(said)
    exact = "int8" not in str(after)
    for a, b in zip(buffers, momentum_of(other, others), strict=True):
        if exact and "momentum_dtype" not in after:
            assert a.equal(b)
        torch.testing.assert_close(a, b, rtol=0, atol=a.abs().max().item() / 127 + 0.01)
    if any("master weights from" in what for what in said):
        for a, b in zip(masters, masters_of(other, others), strict=True):
            assert same_bits(a, b)
    wanted = {"split": "remainder", "float32": "master"}.get(after.get("master_weights", ""))
    for p, q in zip(params, others, strict=True):
        assert same_bits(p, q)
        assert {"remainder", "master"} & set(other.state[q]) == ({wanted} if wanted else set())
        assert ("momentum_codes" in other.state[q]) == ("momentum_buffer" not in other.state[q]) == (not exact)


@FUSED
@pytest.mark.parametrize("model_first", [True, False])
@pytest.mark.parametrize(("before", "after"), [(SPLIT, MASTER), (MASTER, SPLIT)], ids=str)
def test_masters_are_exact_whatever_is_loaded_first(
    before: dict[str, Any], after: dict[str, Any], model_first: bool, fused: bool
) -> None:
    params = make_params([(3, 64), (33,)], torch.bfloat16)
    mine = FusedSGD(params, lr=0.1, momentum=0.9, fused=fused, **before)
    train(mine, params, range(3))
    others = make_params([(3, 64), (33,)], torch.bfloat16, seed=1)
    other = FusedSGD(others, lr=0.1, momentum=0.9, fused=fused, **after)
    for what in ("model", "optimizer") if model_first else ("optimizer", "model"):
        if what == "optimizer":
            other.load_state_dict(saved_and_loaded(mine.state_dict()))
        else:
            with torch.no_grad():
                for p, q in zip(params, others, strict=True):
                    q.copy_(p)
    set_grads(params, others, seed=3)
    mine.step()
    with pytest.warns(UserWarning, match="converted master weights from .*, of 2 parameters"):
        other.step()
    for a, b in zip(masters_of(mine, params), masters_of(other, others), strict=True):
        assert same_bits(a, b)


def momentum_of(optimizer: FusedSGD, params: Params) -> list[Tensor]:
    found = []
    for p in params:
        inner = optimizer.state[p]
        if "momentum_codes" in inner:
            values = inner["momentum_codes"].view(-1, 64).float() * inner["momentum_scale"].view(-1, 1)
            found.append(values.view(p.shape))
        else:
            found.append(inner["momentum_buffer"].float())
    return found


def masters_of(optimizer: FusedSGD, params: Params) -> list[Tensor]:
    """The exact weights."""
    found = []
    for p in params:
        inner = optimizer.state[p]
        if "remainder" in inner:  # 16 more bits of a positive integer: that of the magnitude's bits
            whole = p.detach().float().view(torch.int32) + inner["remainder"].int()
            found.append(whole.view(torch.float32))
        else:
            found.append(inner.get("master", p.detach().float()).clone())
    return found


def test_a_buffer_without_anything_in_it_stays_so_in_any_dtype() -> None:
    """Its first step is still to come, in whatever it is kept."""
    for before, after in ((None, torch.int8), (torch.int8, torch.bfloat16), (torch.bfloat16, torch.int8)):
        params = make_params([(3, 64)])
        expected = copies(params)
        options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}
        mine, theirs = FusedSGD(params, momentum_dtype=before, **options), torch.optim.SGD(expected, **options)
        train(mine, params, range(1))
        inner = mine.state[params[0]]
        fill_unset(inner["momentum_scale" if before == torch.int8 else "momentum_buffer"])
        with torch.no_grad():
            params[0].copy_(expected[0])
        mine.param_groups[0]["momentum_dtype"] = after
        set_grads(params, expected, seed=1)
        with pytest.warns(UserWarning, match="converted momentum"):
            mine.step()
        theirs.step()
        assert same_bits(params[0], expected[0]), f"{before} to {after}"


def test_int8_of_a_parameter_that_becomes_channels_last() -> None:
    """Then there are no blocks; what had accumulated goes on."""
    p = make_params([(4, 64, 3, 3)])[0]
    mine = FusedSGD([p], lr=0.1, momentum=0.9, momentum_dtype=torch.int8, fused=True)
    train(mine, [p], range(2))
    before = momentum_of(mine, [p])[0]
    p.data = p.data.to(memory_format=torch.channels_last)
    p.grad = torch.zeros_like(p)
    with pytest.warns(UserWarning, match=INT8_TO_FP32):
        mine.step()
    torch.testing.assert_close(mine.state[p]["momentum_buffer"], before * 0.9)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("fused", [True, False])
def test_the_default_dtype_does_not_matter(default: torch.dtype, fused: bool) -> None:
    params = make_params([(4, 64)])
    expected = copies(params)
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "ema_decay": 0.9}
    theirs = FusedSGD(expected, **options, momentum_dtype=torch.int8, fused=fused)
    before = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    other = torch.optim.SGD(expected, lr=0.1, momentum=0.9)
    set_grads(params, expected, seed=0)
    before.step()
    other.step()
    with pytest.warns(UserWarning, match="converted momentum"):
        theirs.load_state_dict(other.state_dict())
    torch.set_default_dtype(default)
    try:
        mine = FusedSGD(params, **options, momentum_dtype=torch.int8, fused=fused)
        with pytest.warns(UserWarning, match="converted momentum"):
            mine.load_state_dict(before.state_dict())
        for _ in range(2):
            mine.step()
    finally:
        torch.set_default_dtype(torch.float32)
    for _ in range(2):
        theirs.step()
    assert same_bits(params[0], expected[0])


@pytest.mark.parametrize("options", [{"ema_decay": 0.9}, {"momentum_dtype": torch.int8}])
@pytest.mark.parametrize("fused", [None, False])
def test_the_default_device_does_not_matter(options: dict[str, Any], fused: bool | None) -> None:
    params = make_params([(4, 64)], torch.bfloat16)
    expected = copies(params)
    set_grads(params, expected, seed=0)
    mine = FusedSGD(params, lr=0.1, momentum=0.9, **options, fused=fused)
    theirs = FusedSGD(expected, lr=0.1, momentum=0.9, **options, fused=fused)
    for _ in range(2):
        with torch.device("meta"):
            mine.step()
        theirs.step()
    assert same_bits(params[0], expected[0])


@FUSED
@pytest.mark.parametrize(("masters", "dtype"), MASTERS)
def test_master_weights_are_those_of_float32_training(masters: Any, dtype: torch.dtype, fused: bool) -> None:
    params = make_params(SHAPES, dtype)
    expected = [param.detach().float().requires_grad_() for param in params]
    other = make_params([(5,)], torch.float32)
    mine = FusedSGD([*params, *other], lr=0.1, momentum=0.9, fused=fused, master_weights=masters)
    theirs = torch.optim.SGD(expected, lr=0.1, momentum=0.9, foreach=False)
    weights = mine.master_weights()
    assert [*weights] == params  # before a step, too, and without the one that needs no master
    for step in range(3):
        for param, exact in zip(params, expected, strict=True):
            assert same_bits(weights[param], exact)
        set_grads(params, seed=step)
        for param, exact in zip(params, expected, strict=True):
            assert param.grad is not None
            exact.grad = param.grad.float()
        mine.step()
        theirs.step()
        weights = mine.master_weights()
    for weight in weights.values():
        weight.zero_()  # they are copies
    weights = mine.master_weights()
    assert all(same_bits(weights[param], exact) for param, exact in zip(params, expected, strict=True))


@FUSED
def test_master_weights_follow_what_was_written(fused: bool) -> None:
    (param,) = make_params([(3, 64)], torch.bfloat16)
    mine = FusedSGD([param], lr=0.1, fused=fused, master_weights=torch.float32)
    set_grads([param], seed=0)
    mine.step()
    before = mine.master_weights()[param]
    with torch.no_grad():
        param[1] = 7.0
    after = mine.master_weights()[param]
    assert same_bits(after[0], before[0])
    assert same_bits(after[2], before[2])
    assert bool((after[1] == 7.0).all())


def test_master_weights_of_a_state_that_does_not_fit() -> None:
    (param,) = make_params([(3, 64)], torch.bfloat16)
    mine = FusedSGD([("weight", param)], lr=0.1, master_weights="split")
    mine.state[param]["remainder"] = torch.zeros(3, dtype=torch.int16)
    with pytest.raises(RuntimeError, match=r"'weight'.*its remainder has another shape"):
        mine.master_weights()


@FUSED
@pytest.mark.parametrize("missing", ["momentum_codes", "momentum_scale"])
def test_half_an_int8_momentum_is_refused(missing: str, fused: bool) -> None:
    """It would begin anew, without a word."""
    (param,) = make_params([(3, 64)])
    mine = FusedSGD([("weight", param)], lr=0.1, momentum=0.9, fused=fused, momentum_dtype=torch.int8)
    set_grads([param], seed=0)
    mine.step()
    del mine.state[param][missing]
    unchanged = snapshot(mine)
    with pytest.raises(RuntimeError, match=f"'weight'.*its {missing} is missing"):
        mine.step()
    unchanged()
    mine.state[param].clear()
    mine.step()
