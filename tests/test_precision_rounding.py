"""Precision options: first steps, stochastic rounding, averages and trust ratios."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from fused_sgd import FusedLARS, FusedSGD
from precision_support import EACH_MODE, FUSED, MASTERS, MODES, SHAPES, Model, assert_alike, everything, rounded
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from support import copies, make_params, same_bits, set_grads

pytestmark = pytest.mark.usefixtures("device")

# --- First steps ------------------------------------------------------------------------------------------------------


@FUSED
@pytest.mark.parametrize("dampening", [0, 0.3])
@pytest.mark.parametrize("skip", ["found_inf", "skip_nonfinite", "GradScaler"])
@EACH_MODE
def test_skipped_steps_leave_no_trace(device: str, mode: str, skip: str, dampening: float, fused: bool) -> None:
    """Steps 0 and 2 are skipped. The first step comes afterwards, and random numbers are not used up."""
    dtype, options = MODES[mode]
    if skip == "GradScaler" and device != "cpu" and dtype == torch.bfloat16:
        pytest.skip("torch's GradScaler cannot look at bfloat16 gradients on a GPU")
    options = {"lr": 0.1, "momentum": 0.9, "dampening": dampening, "fused": fused, **options}
    params = make_params([(3, 64), (33,)], dtype)
    others = copies(params)
    mine = FusedSGD(params, skip_nonfinite=skip != "found_inf", **options)
    theirs = FusedSGD(others, **options)
    scaler = torch.amp.GradScaler(device, init_scale=4.0, growth_interval=100)
    for step in range(5):
        overflows = step in (0, 2)
        set_grads(params, others, seed=step)
        if not overflows:
            theirs.step()
        elif skip != "found_inf":
            params[1].grad[3] = float("inf")
        if skip == "GradScaler":
            scaler.scale(torch.zeros(()))
            for p in params:
                p.grad.mul_(scaler.get_scale())
            scaler.step(mine)
            scaler.update()
        elif skip == "found_inf":
            mine.grad_scale, mine.found_inf = None, torch.tensor(2.0 * overflows)
            mine.step()
        else:
            mine.step()
    assert_alike(mine, params, theirs, others)


# --- Stochastic rounding ----------------------------------------------------------------------------------------------


@FUSED
@pytest.mark.parametrize(
    ("dtype", "start", "steps"),
    [
        (torch.bfloat16, 1.0, 2.0**-7),
        (torch.bfloat16, -3.0, 2.0**-6),
        (torch.float16, 1.0, 2.0**-10),
        (torch.float16, 2.0**-20, 2.0**-24),
    ],
    ids=["bf16", "negative bf16", "fp16", "subnormal fp16"],
)
@pytest.mark.parametrize("part", [0.5, 0.125, 0.8125, 2.0**-10])
def test_a_million_roundings_are_right_on_average(
    dtype: torch.dtype, start: float, steps: float, part: float, fused: bool
) -> None:
    """From a value that the dtype has to ``part`` of the way to the next: up with that probability."""
    count = 10**6
    p = torch.full((count,), start, dtype=dtype, requires_grad=True)
    away = steps if start > 0 else -steps
    p.grad = torch.full((count,), -1.0 if start > 0 else 1.0, dtype=dtype)
    FusedSGD([p], lr=part * steps, stochastic_rounding=True, fused=fused).step()
    up = (p.detach().double() - start) / away
    assert ((up == 0) | (up == 1)).all()
    assert abs(up.mean().item() - part) <= 4 * (part * (1 - part) / count) ** 0.5


@FUSED
def test_random_bits_differ_between_elements_parameters_and_steps(fused: bool) -> None:
    params = [torch.ones(2, 4096, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    optimizer = FusedSGD(params[:2], lr=2.0**-9, stochastic_rounding=True, fused=fused)
    optimizer.add_param_group({"params": params[2:]})
    drawn = []
    for _ in range(2):
        for p in params:
            p.detach().fill_(1.0)
            p.grad = torch.ones_like(p)
        optimizer.step()
        drawn += [row.clone() for p in params for row in p.detach()]
    for i, a in enumerate(drawn):
        for b in drawn[:i]:
            assert 1700 < (a != b).sum().item() < 2400  # of 4096 with a half each: 2048 ± 5.5 standard deviations


@FUSED
@pytest.mark.parametrize("shape", [(0,), (0, 64), (3, 0), (), (1,)], ids=str)
def test_steps_are_counted_alike(shape: tuple[int, ...], fused: bool) -> None:
    """An empty parameter draws nothing and counts nothing, whatever the path."""
    params = make_params([shape], torch.bfloat16)
    optimizer = FusedSGD(params, lr=0.1, momentum=0.9, stochastic_rounding=True, fused=fused)
    for step in range(3):
        set_grads(params, seed=step)
        optimizer.step()
    assert optimizer.state[params[0]]["rounding"].tolist() == [0, 0, 3 if params[0].numel() else 0, 0]


@EACH_MODE
def test_runs_repeat_whatever_the_threads(device: str, mode: str) -> None:
    dtype, options = MODES[mode]
    results = []
    for threads in (1, 2, 3) if device == "cpu" else (1, 1):
        torch.set_num_threads(threads)
        params = make_params([(300, 256), (70_001,), (3, 64)], dtype)
        optimizer = FusedSGD(params, lr=0.1, momentum=0.9, fused=True, **options)
        for step in range(2):
            set_grads(params, seed=step)
            optimizer.step()
        results.append(everything(optimizer, params))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@FUSED
@EACH_MODE
@pytest.mark.parametrize(
    "make_copy", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))], ids=["copy", "pickle"]
)
def test_copies_go_on_alike(make_copy: Any, mode: str, fused: bool) -> None:
    dtype, options = MODES[mode]
    params = make_params(SHAPES, dtype)
    mine = FusedSGD(params, lr=0.1, momentum=0.9, dampening=0.2, ema_decay=0.9, fused=fused, **options)
    for step in range(2):
        set_grads(params, seed=step)
        mine.step()
    other = make_copy(mine)
    others = other.param_groups[0]["params"]
    for step in range(2, 4):
        set_grads(params, others, seed=step)
        mine.step()
        other.step()
    assert_alike(mine, params, other, others)


# --- Where nearest rounding stalls ------------------------------------------------------------------------------------


@FUSED
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_small_updates_stall_without_a_remedy(dtype: torch.dtype, fused: bool) -> None:
    """From 1 on, 64 updates of a quarter of the dtype's step there."""
    update = torch.finfo(dtype).eps / 8
    count, exact = 4096, 1 - 64 * update

    def train(**options: Any) -> Tensor:
        p = torch.ones(count, dtype=dtype, requires_grad=True)
        optimizer = FusedSGD([p], lr=update, fused=fused, **options)
        for _ in range(64):
            p.grad = torch.ones_like(p)
            optimizer.step()
        return p.detach()

    assert (train() == 1).all()
    assert (train(master_weights="float32") == exact).all()
    if dtype == torch.bfloat16:
        assert (train(master_weights="split") == exact).all()
    stochastic = train(stochastic_rounding=True).double()
    deviation = 2 * update * 8  # of 64 roundings, each of at most half of a step of 4 updates
    assert abs(stochastic.mean().item() - exact) <= 4 * deviation / count**0.5


# --- Averages and trust ratios ----------------------------------------------------------------------------------------


@FUSED
@pytest.mark.parametrize(("masters", "dtype"), MASTERS, ids=str)
def test_averages_follow_the_master(masters: Any, dtype: torch.dtype, fused: bool) -> None:
    params = make_params([(33,), (5, 64)], dtype)
    model = Model(params, lr=0.1, momentum=0.9)
    module = torch.nn.ParameterList(model.wide)
    average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    mine = FusedSGD(params, lr=0.1, momentum=0.9, ema_decay=0.9, master_weights=masters, fused=fused)
    for step in range(4):
        set_grads(params, seed=step)
        mine.step()
        model.step(params)
        average.update_parameters(torch.nn.ParameterList(model.wide))
        before = everything(mine, params)
        with mine.swap_ema():
            for p, ema in zip(params, average.parameters(), strict=True):
                assert same_bits(mine.state[p]["ema"], ema.detach()), f"at step {step}"
                assert same_bits(p, ema.to(dtype))
        assert all(torch.equal(a, b) for a, b in zip(before, everything(mine, params), strict=True))
    for p, q in zip(params, model.wide, strict=True):
        assert same_bits(p, rounded(q, dtype))


@FUSED
@pytest.mark.parametrize(("masters", "dtype"), MASTERS, ids=str)
def test_trust_ratios_are_of_the_master(masters: Any, dtype: torch.dtype, fused: bool) -> None:
    """The same as LARS of float32 parameters. (Norms of the rounded ones would differ in their third digit.)"""
    options: dict[str, Any] = {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.01, "trust_coeff": 0.1, "fused": fused}
    params = [torch.full((5, 64), 1.0, dtype=dtype, requires_grad=True), *make_params([(40, 64)], dtype)]
    wide = [p.detach().float().requires_grad_() for p in params]
    mine, theirs = FusedLARS(params, master_weights=masters, **options), FusedLARS(wide, **options)
    for step in range(4):
        set_grads(params, seed=step)
        for p, q in zip(params, wide, strict=True):
            q.grad = p.grad.float()
        mine.step()
        theirs.step()
        for p, q in zip(params, wide, strict=True):
            assert same_bits(p, rounded(q, dtype)), f"at step {step}"
