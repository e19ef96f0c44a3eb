"""Precision options: parameters written by others, checkpoints, conversions from mode to mode, and bad input."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fused_sgd import FusedSGD
from fused_sgd.reference import fill_unset
from precision_support import EACH_MODE, FUSED, MODES, SHAPES, Model, assert_alike, rounded, saved_and_loaded, train
from torch import Tensor, nn

from support import Params, assert_same, copies, make_params, same_bits, seeded, set_grads, snapshot

pytestmark = pytest.mark.usefixtures("device")


# --- Parameters written outside step() --------------------------------------------------------------------------------


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


# --- Checkpoints ------------------------------------------------------------------------------------------------------


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
            for p, q in zip(params, others, strict=True):
                by_copy(q, p.detach())
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
