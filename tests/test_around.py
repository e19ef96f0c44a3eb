"""What surrounds a step, folded into it, against the calls of torch that it replaces; the same bits on any threads."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
from fused_sgd import FusedLARS, FusedSGD
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from support import CLOSE, assert_same, bits, copies, each_instruction_set, kept, make_params, same_bits, set_grads

pytestmark = pytest.mark.usefixtures("device")

SHAPES = [(1,), (7,), (4097,), (3, 5), (0,), (), (129, 65), (67, 128)]


def grads_of(params: list[Tensor]) -> list[Tensor]:
    grads = [p.grad for p in params]
    assert all(grad is not None for grad in grads)
    return [grad for grad in grads if grad is not None]


EVERYTHING: list[dict[str, Any]] = [
    {"max_grad_norm": 1.0},
    {"skip_nonfinite": True},
    {"ema_decay": 0.9},
    {"decoupled_weight_decay": True, "max_grad_norm": 0.5, "skip_nonfinite": True, "ema_decay": 0.9, "dampening": 0.2},
    {"lars": True},
    {"lars": True, "max_grad_norm": 0.5, "skip_nonfinite": True, "ema_decay": 0.9, "lr_in_momentum": True},
]


@pytest.mark.cpu_only
@pytest.mark.parametrize("options", EVERYTHING, ids=lambda options: "-".join(options))
def test_threads_and_instruction_sets_change_no_bit(options: dict[str, Any]) -> None:
    """Sizes around what one thread does, a batch of LARS and a tile."""
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, **options}
    make_optimizer = FusedLARS if options.pop("lars", False) else FusedSGD
    shapes = [(300_007,), (1,), (70, 1000), (5,), (0,), (40_960,), (65_537,)]
    first: list[Tensor] | None = None
    for _, threads in itertools.product(each_instruction_set(), (1, 2, 3)):
        torch.set_num_threads(threads)
        params = make_params(shapes)
        optimizer = make_optimizer(params, fused=True, **options)
        for step in range(2):
            set_grads(params, seed=step)
            optimizer.step()
        results = [bits(t) for p in params for t in (p, *kept(optimizer, p).values())]
        if optimizer.grad_norm is not None:
            results.append(bits(optimizer.grad_norm))
        first = results if first is None else first
        assert all(torch.equal(a, b) for a, b in zip(results, first, strict=True)), f"{threads} threads"


# --- Against the calls of torch that it replaces ----------------------------------------------------------------------

OPTIONS: list[dict[str, Any]] = [
    {},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    {"momentum": 0.9, "dampening": 0.3, "maximize": True},
]


@pytest.mark.parametrize("way", [{"fused": True}, {"fused": False}, {"foreach": True}], ids=str)
@pytest.mark.parametrize("max_norm", [1e-3, 1.0, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_clipping_equals_torchs(
    options: dict[str, Any], dtype: torch.dtype, max_norm: float, way: dict[str, Any]
) -> None:
    params = make_params(SHAPES, dtype)
    expected = copies(params)
    mine = FusedSGD(params, lr=0.1, max_grad_norm=max_norm, **way, **options)
    theirs = torch.optim.SGD(expected, lr=0.1, foreach=False, **options)
    for step in range(3):
        set_grads(params, expected, seed=step)
        before = [grad.clone() for grad in grads_of(params)]
        mine.step()
        norm = torch.nn.utils.clip_grad_norm_(expected, max_norm)
        theirs.step()
        assert mine.grad_norm is not None
        torch.testing.assert_close(mine.grad_norm, norm.double(), rtol=CLOSE[dtype], atol=0)
        assert all(same_bits(a, b) for a, b in zip(before, grads_of(params), strict=True))
        if max_norm == 1e6:
            assert_same(mine, theirs, params, expected, f"at step {step}")
        for p, q in zip(params, expected, strict=True):
            torch.testing.assert_close(p, q, rtol=CLOSE[dtype], atol=CLOSE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("decay", [0.0, 0.3, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_average_equals_torchs_to_the_bit(options: dict[str, Any], decay: float, dtype: torch.dtype) -> None:
    params = make_params(SHAPES, dtype)
    model = torch.nn.ParameterList(copies(params))
    expected = list(model.parameters())
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
    mine = FusedSGD(params, lr=0.1, ema_decay=decay, fused=True, **options)
    theirs = torch.optim.SGD(expected, lr=0.1, foreach=False, **options)
    for step in range(4):
        set_grads(params, expected, seed=step)
        mine.step()
        theirs.step()
        averaged.update_parameters(model)
        for p, q, average in zip(params, expected, averaged.parameters(), strict=True):
            assert same_bits(p, q)
            assert same_bits(mine.state[p]["ema"], average), f"at step {step}"


SCALED: list[dict[str, Any]] = [
    {"max_grad_norm": 0.5, "fused": True},
    {"max_grad_norm": 0.5},
    {"max_grad_norm": 0.5, "fused": False},
    {"skip_nonfinite": True},
    {"max_grad_norm": 0.5, "skip_nonfinite": True, "ema_decay": 0.9, "fused": True},
]


@pytest.mark.parametrize("unscale_first", [False, True])
@pytest.mark.parametrize("dampening", [0, 0.3])
@pytest.mark.parametrize("options", SCALED, ids=str)
def test_gradscaler_drives_the_step(
    device: str, options: dict[str, Any], dampening: float, unscale_first: bool
) -> None:
    """Steps 0 and 3 overflow. Torch unscales, clips and steps one after the other."""
    params = make_params([(64,), (8, 8)])
    expected = copies(params)
    mine = FusedSGD(params, lr=0.1, momentum=0.9, dampening=dampening, **options)
    theirs = torch.optim.SGD(expected, lr=0.1, momentum=0.9, dampening=dampening)
    scalers = [torch.amp.GradScaler(device, init_scale=1024.0, growth_interval=2) for _ in range(2)]
    for step in range(6):
        for scaler, optimizer, tensors in zip(scalers, (mine, theirs), (params, expected), strict=True):
            for p in tensors:
                p.grad = None
            loss = sum((p * p).sum() * (float("inf") if step in (0, 3) else 1.0) for p in tensors)
            assert isinstance(loss, Tensor)
            scaler.scale(loss).backward()
            if optimizer is theirs or unscale_first:
                scaler.unscale_(optimizer)
            if optimizer is theirs and options.get("max_grad_norm"):
                torch.nn.utils.clip_grad_norm_(tensors, options["max_grad_norm"])
            before = [grad.clone() for grad in grads_of(tensors)]
            scaler.step(optimizer)
            assert all(same_bits(a, b) for a, b in zip(before, grads_of(tensors), strict=True))
            scaler.update()
        assert scalers[0].get_scale() == scalers[1].get_scale()
        for p, q in zip(params, expected, strict=True):
            torch.testing.assert_close(p, q, rtol=CLOSE[p.dtype], atol=CLOSE[p.dtype], msg=f"at step {step}")
        if step == 0 and device == "cpu":
            assert not mine.state, "a skipped step is no first step"
    assert not {"grad_scale", "found_inf"} & mine.__dict__.keys()


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({}, False),
        ({"ema_decay": 0.9}, False),
        ({"fused": True}, True),
        ({"max_grad_norm": 1.0}, True),
        ({"max_grad_norm": 1.0, "fused": False}, True),
        ({"skip_nonfinite": True}, True),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", [FusedSGD, FusedLARS])
def test_the_flag_that_gradscaler_asks_for(kind: type[FusedSGD], options: dict[str, Any], flag: bool) -> None:
    params = make_params(SHAPES)
    optimizer = kind(params, lr=0.1, momentum=0.9, **options)
    set_grads(params, seed=0)
    optimizer.step()
    assert optimizer._step_supports_amp_scaling is flag
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert other._step_supports_amp_scaling is flag
        assert other.defaults == optimizer.defaults
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer._step_supports_amp_scaling is flag
    optimizer.load_state_dict(torch.optim.SGD(copies(params), lr=0.1).state_dict())
    assert optimizer._step_supports_amp_scaling is flag
    assert optimizer.param_groups[0]["max_grad_norm"] == options.get("max_grad_norm")
    assert optimizer.param_groups[0]["skip_nonfinite"] == options.get("skip_nonfinite", False)
    optimizer.step()


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])
@pytest.mark.parametrize("options", EVERYTHING, ids=lambda options: "-".join(options))
def test_copies_go_on_alike(options: dict[str, Any], make_copy: Any) -> None:
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, **options}
    kind = FusedLARS if options.pop("lars", False) else FusedSGD
    params = make_params(SHAPES)
    mine = kind(params, fused=True, **options)
    for step in range(2):
        set_grads(params, seed=step)
        mine.step()
    other = make_copy(mine)
    others = other.param_groups[0]["params"]
    set_grads(params, others, seed=2)
    mine.step()
    other.step()
    assert_same(mine, other, params, others)
    for p, q in zip(params, others, strict=True):
        assert kept(mine, p).keys() == kept(other, q).keys()
        assert all(same_bits(tensor, kept(other, q)[key]) for key, tensor in kept(mine, p).items())
