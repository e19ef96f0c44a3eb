"""What a step tells afterwards, by grad_norm and trust_ratios(): what that step found, with the options it had."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fused_sgd import FusedLARS, FusedSGD
from torch.utils._python_dispatch import TorchDispatchMode

from support import copies, make_params, set_grads

pytestmark = pytest.mark.usefixtures("device")


class Nothing(TorchDispatchMode):
    """A mode that changes nothing; but no kernel may hide from it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def stepped(shapes: list[tuple[int, ...]], **options: Any) -> FusedLARS:
    """An optimizer after its first step, with a param group for each shape."""
    params = make_params(shapes)
    set_grads(params, seed=0)
    optimizer = FusedLARS([{"params": [p]} for p in params], lr=0.1, weight_decay=0.1, **options)
    optimizer.step()
    return optimizer


def told(optimizer: FusedLARS) -> list[list[float]]:
    assert optimizer.grad_norm is not None
    return [[optimizer.grad_norm.item()], *([*row[:2], *map(float, row[2:5])] for row in optimizer.trust_ratios())]


@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_a_step_that_fails_tells_nothing(max_norm: float | None) -> None:
    """Not what an earlier step found, and not of parameters that came since: nobody measured those."""
    params = make_params([(4, 8), (5,)])
    optimizer = FusedLARS(params, lr=0.1, weight_decay=0.1, max_grad_norm=max_norm, fused=True)
    set_grads(params, seed=0)
    optimizer.step()
    assert len(optimizer.trust_ratios()) == 2
    more = make_params([(3,)] * 1000)
    set_grads(more, seed=1)
    more[-1].grad = more[0].data
    optimizer.add_param_group({"params": more})
    for _ in range(2):
        with pytest.raises(RuntimeError, match="shares memory"):
            optimizer.step()
        assert optimizer.trust_ratios() == []
        assert optimizer.grad_norm is None
    optimizer.param_groups[0]["lr"] = math.nan
    with pytest.raises(ValueError, match="nan"):
        optimizer.step()
    assert optimizer.trust_ratios() == []


@pytest.mark.parametrize("kind", [FusedSGD, FusedLARS])
def test_the_norm_of_a_step_in_a_mode_is_not_that_of_a_later_one(kind: type[FusedSGD]) -> None:
    (p,) = make_params([(4,)])
    optimizer = kind([p], lr=0.1, max_grad_norm=1e9)
    set_grads([p], seed=0)
    with Nothing():
        optimizer.step()
    assert optimizer.grad_norm is not None
    optimizer.step()
    optimizer.param_groups[0]["lr"] = math.nan
    with pytest.raises(ValueError, match="nan"):
        optimizer.step()
    assert optimizer.grad_norm is None


@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_groups_on_different_paths(max_norm: float | None) -> None:
    """One group on the kernel and one on the reference: as if both were on one, and so are the norms."""
    params = make_params([(33, 5), (4097,)])
    expected = copies(params)
    groups = [{"params": [params[0]], "fused": True}, {"params": [params[1]], "fused": False}]
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "max_grad_norm": max_norm}
    mine, theirs = FusedLARS(groups, **options), FusedLARS(expected, **options, fused=True)
    for step in range(3):
        set_grads(params, expected, seed=step)
        mine.step()
        theirs.step()
        assert theirs.grad_norm is not None
        assert mine.grad_norm is not None
        torch.testing.assert_close(mine.grad_norm, theirs.grad_norm)
        rows = zip(mine.trust_ratios(), theirs.trust_ratios(), strict=True)
        for number, (got, want) in enumerate(rows):
            assert (got.group, got.parameter) == (number, 0)
            torch.testing.assert_close(got[2:5], want[2:5])
        for p, q in zip(params, expected, strict=True):
            torch.testing.assert_close(p, q)
    params[1].grad = None
    mine.step()
    assert [row.group for row in mine.trust_ratios()] == [0], "what an earlier step found on the reference is gone"


@pytest.mark.parametrize("mode", [contextlib.nullcontext, Nothing])
def test_the_reference_tells_its_norms_too(mode: Any) -> None:
    params = make_params([(33, 5), (0,), (4097,)])
    expected = copies(params)
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}
    mine = FusedLARS(params, **options, fused=False)
    theirs = FusedLARS(expected, **options, fused=True)
    for step in range(3):
        set_grads(params, expected, seed=step)
        with mode():
            mine.step()
        theirs.step()
        assert mine.grad_norm is not None
        torch.testing.assert_close(mine.grad_norm, theirs.grad_norm)
        for got, want in zip(mine.trust_ratios(), theirs.trust_ratios(), strict=True):
            assert got[:2] == want[:2], "none for a parameter without elements"
            torch.testing.assert_close(got[2:5], want[2:5])


# --- With the options that the step had, and of the groups it had -----------------------------------------------------


@pytest.mark.parametrize("max_norm", [None, 0.5])
@pytest.mark.parametrize("fused", [True, False])
def test_options_that_changed_since(fused: bool, max_norm: float | None) -> None:
    """A scheduler's step comes before most people log."""
    optimizer = stepped([(5,), (4, 6)], trust_clip=True, max_grad_norm=max_norm, fused=fused)
    before = told(optimizer)
    assert len(before) == 3
    changes = {"lr": 1e-6, "weight_decay": 7.0, "trust_coeff": 9.0, "eps": 1.0, "trust_clip": False}
    for group in optimizer.param_groups:
        group.update(changes, always_adapt=True, max_grad_norm=None if max_norm else 1e-3)
    assert told(optimizer) == before


def test_a_tensor_lr_that_was_written_since() -> None:
    (p,) = make_params([(4, 6)])
    set_grads([p], seed=0)
    lr = torch.tensor(0.1, device="cpu")
    optimizer = FusedLARS([p], lr=lr, weight_decay=0.1, trust_coeff=0.01, trust_clip=True, fused=True)
    optimizer.step()
    before = told(optimizer)
    lr.fill_(1e-6)
    assert told(optimizer) == before


@pytest.mark.parametrize("fused", [True, False, None])
def test_a_group_that_was_removed_since(fused: bool | None) -> None:
    optimizer = stepped([(5,), (6,)], fused=fused)
    before = told(optimizer)
    assert [row[:2] for row in before[1:]] == [[0, 0], [1, 0]]
    optimizer.param_groups.pop(0)
    assert told(optimizer) == before
    optimizer.param_groups.clear()
    assert told(optimizer) == before
    optimizer.step()
    assert optimizer.trust_ratios() == []


# --- Steps that were not taken ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_that_was_skipped(fused: bool) -> None:
    """Nothing was multiplied by a ratio. (A GPU skips by itself, and rows are told without waiting for it.)"""
    optimizer = stepped([(5,), (6,)], skip_nonfinite=True, fused=fused)
    assert len(optimizer.trust_ratios()) == 2
    (p,) = optimizer.param_groups[1]["params"]
    with torch.no_grad():
        p.grad[0] = torch.inf
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert optimizer.grad_norm is not None
    assert optimizer.grad_norm.isinf()
    if not p.is_cuda:
        assert optimizer.trust_ratios() == []


@pytest.mark.parametrize("mode", [contextlib.nullcontext, Nothing])
@pytest.mark.parametrize("fused", [None, False])
def test_a_step_that_a_scaler_skipped(fused: bool | None, mode: Any) -> None:
    optimizer = stepped([(5,), (6,)], max_grad_norm=1.0, fused=fused)
    assert optimizer.grad_norm is not None
    optimizer.found_inf, optimizer.grad_scale = torch.tensor(1.0, device="cpu"), torch.tensor(2.0, device="cpu")
    with mode():
        optimizer.step()
    assert optimizer.grad_norm is None
    assert optimizer.trust_ratios() == []


@pytest.mark.parametrize("fused", [True, False])
def test_a_checkpoint_that_was_loaded_since(fused: bool) -> None:
    optimizer = stepped([(5,), (6,)], max_grad_norm=1.0, fused=fused)
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.grad_norm is None
    assert optimizer.trust_ratios() == []
    optimizer.step()
    assert len(optimizer.trust_ratios()) == 2


@pytest.mark.parametrize("kind", [FusedSGD, FusedLARS])
@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("mode", [contextlib.nullcontext, Nothing])
def test_a_step_without_gradients(kind: type[FusedSGD], fused: bool | None, mode: Any) -> None:
    optimizer = kind(make_params([(5,)]), lr=0.1, max_grad_norm=None if kind is FusedLARS else 1.0, fused=fused)
    with mode():
        optimizer.step()
    assert optimizer.grad_norm == 0
    optimizer.param_groups.clear()
    with mode():
        optimizer.step()
    assert not optimizer.grad_norm


def failing(optimizer: FusedLARS, how: str) -> Callable[[], object]:
    """What makes the next step fail; called, it puts all back."""
    group = optimizer.param_groups[0]
    if how == "nan":
        group["lr"] = math.nan
        return lambda: group.update(lr=0.1)
    if how == "differ":
        group["skip_nonfinite"] = True
        return lambda: group.update(skip_nonfinite=False)
    if how == "shape":
        p = group["params"][0]
        kept, p.data = p.data, torch.zeros(7)
        return lambda: setattr(p, "data", kept)
    if how == "half way":  # it is judged, norms are known, and it is the last to be written
        p = optimizer.param_groups[-1]["params"][0]
        optimizer.param_groups[-1].update(momentum=0.9, fused=False)
        optimizer.state[p] = Stubborn()
        return optimizer.state.clear
    optimizer.grad_scale = math.nan
    return lambda: optimizer.__dict__.pop("grad_scale")


class Stubborn(dict[str, Any]):
    def __setitem__(self, key: str, value: Any) -> None:
        raise ZeroDivisionError


@pytest.mark.parametrize("how", ["nan", "differ", "shape", "half way", "scale"])
@pytest.mark.parametrize("mode", [contextlib.nullcontext, Nothing])
@pytest.mark.parametrize("fused", [None, False])
def test_any_step_that_fails_tells_nothing(fused: bool | None, mode: Any, how: str) -> None:
    optimizer = stepped([(5,), (6,)], max_grad_norm=1.0, fused=fused)
    with mode():
        optimizer.step()
        assert optimizer.grad_norm is not None
        put_back = failing(optimizer, how)
        with pytest.raises((RuntimeError, ValueError, ZeroDivisionError)):
            optimizer.step()
        assert optimizer.grad_norm is None
        assert optimizer.trust_ratios() == []
        put_back()
        optimizer.step()
        assert len(optimizer.trust_ratios()) == 2


def test_a_closure_that_fails() -> None:
    optimizer = stepped([(5,)], max_grad_norm=1.0)

    def closure() -> float:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        optimizer.step(closure)
    assert optimizer.grad_norm is None
    assert optimizer.trust_ratios() == []


@pytest.mark.parametrize("kind", [FusedSGD, FusedLARS])
def test_totals_of_a_step_in_a_mode_are_not_those_of_a_later_one(kind: type[FusedSGD]) -> None:
    """That is left to the reference in part, and knows its norms from elsewhere, or needs none."""
    params = make_params([(5,), (6,)])
    groups = [{"params": [params[0]]}, {"params": [params[1]], "fused": False}]
    optimizer = kind(groups, lr=0.1, max_grad_norm=None if kind is FusedLARS else 1.0)
    set_grads(params, seed=0)
    with Nothing():
        optimizer.step()
    assert optimizer.grad_norm is not None
    for group in optimizer.param_groups:
        group["max_grad_norm"] = None
    for p in params:
        p.grad.mul_(100)
    optimizer.step()
    if kind is FusedSGD:
        assert optimizer.grad_norm is None
    else:
        expected = torch.cat([p.grad.double() for p in params]).norm()
        torch.testing.assert_close(optimizer.grad_norm, expected)


def test_what_is_told_is_a_copy() -> None:
    for fused in (True, False):
        optimizer = stepped([(5,)], max_grad_norm=1.0, fused=fused)
        before = told(optimizer)
        optimizer.grad_norm.zero_()
        for tensor in optimizer.trust_ratios()[0][2:5]:
            tensor.zero_()
        assert told(optimizer) == before


@pytest.mark.parametrize("mode", [contextlib.nullcontext, Nothing])
@pytest.mark.parametrize("fused", [None, False])
def test_a_scaler_that_has_looked_is_believed(fused: bool | None, mode: Any) -> None:
    """skip_nonfinite takes no pass of its own then, on any path."""
    (p,) = make_params([(5,)])
    optimizer = FusedSGD([p], lr=0.1, skip_nonfinite=True, fused=fused)
    set_grads([p], seed=0)
    optimizer.found_inf, optimizer.grad_scale = torch.tensor(0.0, device="cpu"), torch.tensor(2.0, device="cpu")
    with mode():
        optimizer.step()
    assert optimizer.grad_norm is None


@pytest.mark.parametrize("fused", [True, False])
def test_norms_of_nothing_but_empty_parameters(fused: bool) -> None:
    optimizer = stepped([(0,)], fused=fused)
    assert told(optimizer) == [[0.0]]
