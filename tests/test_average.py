"""The moving average of the parameters, and swap_ema()."""

from __future__ import annotations

import copy
import io
import math
import pickle
from typing import Any

import pytest
import torch
from fused_sgd import FusedLARS, FusedSGD
from fused_sgd.reference import fill_unset
from torch import Tensor, nn

from support import bits, copies, make_params, same_bits, set_grads, snapshot

pytestmark = pytest.mark.usefixtures("device")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64]
SHAPES = [(7,), (4097,), (3, 5), (0,), ()]
AVERAGE = {torch.float64: torch.float64, torch.complex64: torch.complex64}


def trained(
    dtype: torch.dtype = torch.float32, fused: bool | None = True, steps: int = 3, **options: Any
) -> tuple[FusedSGD, list[Tensor]]:
    params = make_params(SHAPES, dtype)
    optimizer = FusedSGD(params, **{"lr": 0.1, "momentum": 0.9, "ema_decay": 0.9, "fused": fused, **options})
    for step in range(steps):
        set_grads(params, seed=step)
        optimizer.step()
    return optimizer, params


@pytest.fixture(params=[True, False], ids=["kernel", "reference"])
def fused(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_first_step_copies(isa: str, dtype: torch.dtype) -> None:
    optimizer, params = trained(dtype, steps=1)
    for p in params:
        average = optimizer.state[p]["ema"]
        assert average.dtype == AVERAGE.get(dtype, torch.float32)
        assert not average.requires_grad
        assert same_bits(average, p.detach().to(average.dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_inside_swap_ema_the_model_holds_the_averages(dtype: torch.dtype, fused: bool) -> None:
    optimizer, params = trained(dtype, fused)
    before, addresses = copies(params), [p.data_ptr() for p in params]
    averages = [optimizer.state[p]["ema"].clone() for p in params]
    with optimizer.swap_ema():
        for p, average, address in zip(params, averages, addresses, strict=True):
            assert same_bits(p, average.to(dtype))
            assert p.data_ptr() == address
    for p, q, average in zip(params, before, averages, strict=True):
        assert same_bits(p, q)
        assert same_bits(optimizer.state[p]["ema"], average)
    set_grads(params, seed=9)
    optimizer.step()  # training goes on


def test_the_bits_come_back_after_an_exception(fused: bool) -> None:
    optimizer, params = trained(fused=fused)
    with torch.no_grad():
        params[0][:3] = torch.tensor([math.nan, -0.0, math.inf])
    unchanged = [bits(p) for p in params]
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), optimizer.swap_ema():  # noqa: PT012
            assert not params[0].isnan().any()
            raise error
        assert all(torch.equal(bits(p), kept) for p, kept in zip(params, unchanged, strict=True))
    with optimizer.swap_ema():
        pass


def test_what_raises_inside_swap_ema(fused: bool) -> None:
    optimizer, params = trained(fused=fused)
    saved = optimizer.state_dict()
    before = copies(params)
    with optimizer.swap_ema():
        for what, call in {
            "step": optimizer.step,
            "state_dict": optimizer.state_dict,
            "load_state_dict": lambda: optimizer.load_state_dict(saved),
            "swap_ema": lambda: optimizer.swap_ema().__enter__(),
            "master_weights": optimizer.master_weights,
        }.items():
            with pytest.raises(RuntimeError, match=rf"^{what}\(\) inside swap_ema\(\)"):
                call()
    assert all(same_bits(p, q) for p, q in zip(params, before, strict=True))
    optimizer.step()
    optimizer.load_state_dict(saved)


def test_swap_ema_without_averages(fused: bool) -> None:
    """Before the first step, of frozen parameters, after a step that only the device knows was skipped."""
    params = make_params([(3,), (4,), (5,)])
    before = copies(params)
    optimizer = FusedSGD(params, lr=0.1, ema_decay=0.9, fused=fused)
    with optimizer.swap_ema():
        assert all(same_bits(p, q) for p, q in zip(params, before, strict=True))
    set_grads(params, seed=0)
    params[1].grad = None
    optimizer.step()
    fill_unset(optimizer.state[params[2]]["ema"])
    after = copies(params)
    with optimizer.swap_ema():
        assert all(same_bits(p, q) for p, q in zip(params, after, strict=True))
    off = FusedSGD(params, lr=0.1, fused=fused)
    off.load_state_dict(optimizer.state_dict())  # with averages, which nobody goes on with
    off.step()
    with pytest.raises(RuntimeError, match=r"swap_ema\(\) needs averages, which the option `ema_decay` keeps"):
        off.swap_ema().__enter__()
    some = FusedSGD([{"params": params[:1], "ema_decay": 0.9}, {"params": params[1:]}], lr=0.1, fused=fused)
    some.step()
    with some.swap_ema():
        assert same_bits(params[0], some.state[params[0]]["ema"])


def test_backward_through_a_graph_from_before_the_swap_raises() -> None:
    optimizer, params = trained()
    loss = (params[0] ** 2).sum()
    with optimizer.swap_ema():
        pass
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_evaluation_of_a_model() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1))
    optimizer = FusedSGD(model.parameters(), lr=0.1, ema_decay=0.5, fused=True)
    averages: list[Tensor] | None = None
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 5)).square().sum().backward()
        optimizer.step()
        now = [p.detach().clone() for p in model.parameters()]
        averages = now if averages is None else [0.5 * a + 0.5 * b for a, b in zip(averages, now, strict=True)]
    assert averages is not None
    with optimizer.swap_ema():
        for p, average in zip(model.parameters(), averages, strict=True):
            torch.testing.assert_close(p.detach(), average)


# --- Checkpoints ------------------------------------------------------------------------------------------------------


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", ["file", "deepcopy", "pickle"])
def test_the_average_survives(way: str, dtype: torch.dtype, fused: bool) -> None:
    """torch casts state to the parameter's dtype on loading: an average in float32 would become bfloat16."""
    optimizer, params = trained(dtype, fused)
    if way == "file":
        others = copies(params)
        other = FusedSGD(others, lr=0.5, momentum=0.9, ema_decay=0.9, fused=fused)
        other.load_state_dict(through_a_file(optimizer.state_dict()))
    else:
        other = copy.deepcopy(optimizer) if way == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
        others = other.param_groups[0]["params"]
    for p, q in zip(params, others, strict=True):
        a, b = optimizer.state[p]["ema"], other.state[q]["ema"]
        assert same_bits(a, b)
        assert a.data_ptr() != b.data_ptr() or not a.numel()
    for step in range(2):
        set_grads(params, others, seed=10 + step)
        optimizer.step()
        other.step()
    for p, q in zip(params, others, strict=True):
        assert same_bits(p, q)
        assert same_bits(optimizer.state[p]["ema"], other.state[q]["ema"])


def test_options_that_are_off_leave_no_state() -> None:
    params = make_params(SHAPES)
    set_grads(params, seed=0)
    optimizer = FusedSGD(params, lr=0.1, momentum=0.9)
    optimizer.step()
    theirs = torch.optim.SGD(copies(params), lr=0.1, momentum=0.9)
    saved = optimizer.state_dict()
    there = saved["param_groups"][0].keys() - theirs.state_dict()["param_groups"][0].keys()
    assert there == {"decoupled_weight_decay", "max_grad_norm", "skip_nonfinite"}  # which are off after loading, too
    assert all(inner.keys() == {"momentum_buffer"} for inner in saved["state"].values())
    on = {"decoupled_weight_decay": True, "max_grad_norm": 1.0, "skip_nonfinite": True, "ema_decay": 0.0}
    optimizer = FusedSGD(params, lr=0.1, **on)  # type: ignore[arg-type]
    optimizer.step()
    saved = optimizer.state_dict()
    assert {key: saved["param_groups"][0][key] for key in on} == on
    assert all(inner.keys() == {"ema"} for inner in saved["state"].values())
    assert "ema_decay" in optimizer.param_groups[0], "only the copy goes without"


def test_into_torch_and_back() -> None:
    """torch ignores what it does not know; what it wrote loads here, where options that were on stay on."""
    optimizer, params = trained(max_grad_norm=0.5, skip_nonfinite=True)
    others = copies(params)
    theirs = torch.optim.SGD(others, lr=0.1, momentum=0.9)
    theirs.load_state_dict(through_a_file(optimizer.state_dict()))
    set_grads(params, others, seed=10)
    torch.nn.utils.clip_grad_norm_(others, 0.5)
    theirs.param_groups[0]["fused"] = None
    theirs.step()
    optimizer.step()
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q)
    plain = torch.optim.SGD(copies(params), lr=0.3, momentum=0.9).state_dict()
    optimizer.load_state_dict(plain)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["max_grad_norm"], group["skip_nonfinite"], group["ema_decay"]) == (0.3, 0.5, True, 0.9)
    optimizer.step()
    assert all(same_bits(optimizer.state[p]["ema"], p) for p in params), "the first step of a new average"


@pytest.mark.parametrize("late", [False, True])
def test_turned_on_and_off_in_between(late: bool, fused: bool) -> None:
    optimizer, params = trained(fused=fused, ema_decay=None if late else 0.9)
    group = optimizer.param_groups[0]
    group["ema_decay"] = 0.5 if late else None
    before = {p: optimizer.state[p]["ema"].clone() for p in params if "ema" in optimizer.state[p]}
    set_grads(params, seed=7)
    optimizer.step()
    for p in params:
        assert same_bits(optimizer.state[p]["ema"], p.detach() if late else before[p])


@pytest.mark.parametrize("kind", [FusedSGD, FusedLARS])
@pytest.mark.parametrize("bad", [1, 1.0, -0.1, 2, math.nan, math.inf])
def test_ema_decay_out_of_range(kind: type[FusedSGD], bad: float, fused: bool) -> None:
    params = make_params([(3,)])
    with pytest.raises(ValueError, match=r"Invalid ema_decay: .*; it must be in \[0, 1\)"):
        kind(params, lr=0.1, ema_decay=bad, fused=fused)
    optimizer = kind(params, lr=0.1, ema_decay=0.5, fused=fused)
    set_grads(params, seed=0)
    optimizer.step()
    optimizer.param_groups[0]["ema_decay"] = bad
    unchanged = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"Invalid ema_decay: .*; it must be in \[0, 1\) \(param group 0\)"):
        optimizer.step()
    unchanged()


@pytest.mark.parametrize("other", ["dtype", "shape", "number"])
def test_an_average_that_does_not_fit(other: str, fused: bool) -> None:
    optimizer, params = trained(fused=fused)
    optimizer.state[params[1]]["ema"] = {"dtype": torch.zeros(4097).double(), "shape": torch.zeros(4), "number": 3}[
        other
    ]
    set_grads(params, seed=0)
    before = copies(params)
    problem = {"dtype": "must be torch.float32", "shape": "has another shape", "number": "is 3, no tensor"}[other]
    with pytest.raises((RuntimeError, TypeError), match=rf"param group 0, parameter 1 .*its ema {problem}"):
        optimizer.step()
    assert all(same_bits(p, q) for p, q in zip(params, before, strict=True))


@pytest.mark.parametrize("average", [torch.ones(1), torch.ones(2), torch.ones(7, dtype=torch.int64), "x"], ids=str)
def test_swap_ema_refuses_an_average_that_does_not_fit(average: Any) -> None:
    optimizer, params = trained()
    optimizer.state[params[0]]["ema"] = average
    before = copies(params)
    with pytest.raises(RuntimeError, match=r"param group 0, parameter 0 .*its ema"), optimizer.swap_ema():
        pass
    assert all(same_bits(p, q) for p, q in zip(params, before, strict=True))


def test_what_can_be_restored_is_restored(fused: bool) -> None:
    optimizer, params = trained(fused=fused)
    before = copies(params)
    with pytest.raises(RuntimeError, match="size of tensor"), optimizer.swap_ema():
        params[1].data = torch.ones(5)
    assert all(same_bits(params[index], before[index]) for index in (0, 2, 3, 4))
    optimizer.state_dict()  # which is refused inside
