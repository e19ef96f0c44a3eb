"""FusedLARS: what it adds to the step, its errors and its helper. (tests/integrations has timm's Lars.)"""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from fused_sgd import FusedLARS, FusedSGD, param_groups
from torch import Tensor, nn

from support import copies, float64_step, make_params, same_bits, set_grads, snapshot

pytestmark = pytest.mark.usefixtures("device")

SHAPES = [(1,), (7,), (33, 5), (4097,), (0,), (2, 3, 4), ()]


def float64_ratio(p: Tensor, g: Tensor, options: dict[str, Any]) -> float:
    """The trust ratio in float64, of a gradient that was unscaled and clipped."""
    decay = options.get("weight_decay", 0)
    if not decay and not options.get("always_adapt"):
        return 1.0
    p_norm, g_norm, ratio = p.double().norm().item(), g.double().norm().item(), 1.0
    if p_norm > 0 and g_norm > 0:
        ratio = options.get("trust_coeff", 0.001) * p_norm / (g_norm + decay * p_norm + options.get("eps", 1e-8))
    return min(ratio / options["lr"], 1.0) if options.get("trust_clip") else ratio


UPDATE = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize", "lr_in_momentum")
OPTIONS: list[dict[str, Any]] = [
    {"momentum": momentum, "weight_decay": decay, "trust_clip": clip, "always_adapt": always, "lr_in_momentum": inside}
    for momentum, decay, clip, always, inside in itertools.product(
        (0, 0.9), (0, 0.02), (False, True), (False, True), (False, True)
    )
]


@pytest.mark.parametrize("max_norm", [None, 10.0])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(f"{k}={v}" for k, v in options.items() if v))
def test_equals_a_float64_model(isa: str, options: dict[str, Any], max_norm: float | None) -> None:
    """A parameter that is all zeros, a gradient that is, a scale, a learning rate that changes; norms for logging."""
    params = make_params(SHAPES)
    with torch.no_grad():
        params[1].zero_()
    models = [p.detach().double() for p in params]
    buffers: list[Tensor | None] = [None] * len(params)
    options = {"lr": 0.3, "trust_coeff": 0.02, "eps": 1e-3, "nesterov": options["momentum"] > 0, **options}
    optimizer = FusedLARS(params, **options, max_grad_norm=max_norm, fused=True)
    optimizer.grad_scale = 4.0
    for step in range(3):
        options["lr"] = optimizer.param_groups[0]["lr"] = 0.3 / (step + 1)
        set_grads(params, seed=step)
        grads = [p.grad for p in params if p.grad is not None]
        if step == 0:
            grads[2].zero_()
        total = math.sqrt(sum((g.double() / 4).square().sum().item() for g in grads))
        clip = 1.0 if max_norm is None else min(1.0, max_norm / (total + 1e-6))
        optimizer.step()
        rows = optimizer.trust_ratios()
        assert optimizer.grad_norm is not None
        assert optimizer.grad_norm.item() == pytest.approx(total, rel=1e-6)
        assert [(row.group, row.parameter) for row in rows] == [(0, i) for i, s in enumerate(SHAPES) if s != (0,)]
        found = {row.parameter: row for row in rows}
        for i, g in enumerate(grads):
            g = g.double() / 4
            ratio = float64_ratio(models[i], g * clip, options)
            if i in found:
                assert found[i].ratio.item() == pytest.approx(ratio, rel=1e-5)
                assert found[i].param_norm.item() == pytest.approx(models[i].norm().item(), rel=1e-5)
                assert found[i].grad_norm.item() == pytest.approx((g * clip).norm().item(), rel=1e-5)
            update = {key: options[key] for key in UPDATE if key in options}
            models[i], buffers[i], _ = float64_step(
                models[i], g, buffers[i], clip_coefficient=clip, trust_ratio=ratio, **update
            )
            torch.testing.assert_close(params[i].detach().double(), models[i], rtol=1e-5, atol=1e-5)


def test_without_adaptation_it_is_sgd_to_the_bit() -> None:
    params = make_params(SHAPES)
    expected = copies(params)
    mine = FusedLARS(params, lr=0.1, momentum=0.9, dampening=0.1, fused=True)
    theirs = torch.optim.SGD(expected, lr=0.1, momentum=0.9, dampening=0.1)
    for step in range(3):
        set_grads(params, expected, seed=step)
        mine.step()
        theirs.step()
    assert all(same_bits(p, q) for p, q in zip(params, expected, strict=True))


def test_lr_in_momentum_matters_only_when_lr_changes() -> None:
    for schedule, same in (([0.5] * 5, True), ([0.5, 0.4, 0.3, 0.2, 0.1], False)):
        lists = [make_params([(100,)], torch.float64) for _ in range(2)]
        for params, inside in zip(lists, (False, True), strict=True):
            optimizer = FusedLARS(
                params, momentum=0.9, weight_decay=0.1, trust_coeff=0.1, lr_in_momentum=inside, fused=True
            )
            for step, lr in enumerate(schedule):
                optimizer.param_groups[0]["lr"] = lr
                set_grads(params, seed=step)
                optimizer.step()
        assert torch.allclose(lists[0][0], lists[1][0], rtol=1e-12, atol=1e-12) is same


def test_norms_are_those_of_the_step_s_own_parameters() -> None:
    """Groups with other options, a parameter without a gradient, before the first step."""
    params = make_params([(5,), (6,), (7,)])
    groups = [{"params": [params[0]]}, {"params": params[1:], "weight_decay": 0.5}]
    optimizer = FusedLARS(groups, lr=0.1, fused=True)
    assert optimizer.trust_ratios() == []
    assert optimizer.grad_norm is None
    set_grads(params, seed=0)
    params[1].grad = None
    optimizer.step()
    rows = optimizer.trust_ratios()
    assert [(row.group, row.parameter) for row in rows] == [(0, 0), (1, 1)]
    assert rows[0].ratio == 1
    assert rows[1].ratio < 0.01
    assert [row.name for row in rows] == [None, None]


@pytest.mark.parametrize("fused", [True, False])
def test_norms_have_their_parameters_names(fused: bool) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = FusedLARS(param_groups(model, 0.1), lr=0.1, fused=fused)
    set_grads(list(model.parameters()), seed=0)
    optimizer.step()
    named = dict(model.named_parameters())
    rows = optimizer.trust_ratios()
    assert [row.name for row in rows] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    for row in rows:
        assert optimizer.param_groups[row.group]["params"][row.parameter] is named[row.name]
    del optimizer.param_groups[0]
    assert [row.name for row in optimizer.trust_ratios()][1:] == ["0.bias", "1.weight", "1.bias"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.complex64])
def test_other_dtypes_take_the_kernel(dtype: torch.dtype) -> None:
    params = make_params([(4097,)], dtype)
    optimizer = FusedLARS(params, lr=0.1, weight_decay=0.1, fused=True)
    before = params[0].detach().clone()
    set_grads(params, seed=0)
    optimizer.step()
    row = optimizer.trust_ratios()[0]
    wide = torch.complex128 if dtype.is_complex else torch.float64
    assert row.param_norm.item() == pytest.approx(before.to(wide).norm().item(), rel=1e-6)


@pytest.mark.parametrize("fused", [True, False, None])
def test_a_state_that_another_optimizer_left(fused: bool | None) -> None:
    """FusedSGD's and FusedLARS's checkpoints load into each other; the algorithm stays the running optimizer's."""
    params = make_params(SHAPES)
    set_grads(params, seed=0)
    lars = FusedLARS(params, lr=0.1, momentum=0.9, weight_decay=0.1, trust_coeff=0.5, trust_clip=True, fused=fused)
    lars.step()
    sgd = FusedSGD(copies(params), lr=0.2, momentum=0.9, fused=fused)
    sgd.load_state_dict(copy.deepcopy(lars.state_dict()))
    others = sgd.param_groups[0]["params"]
    theirs = torch.optim.SGD(copies(params), lr=0.2, momentum=0.9)
    theirs.load_state_dict(copy.deepcopy(lars.state_dict()))
    theirs.param_groups[0]["fused"] = None
    expected = theirs.param_groups[0]["params"]
    set_grads(others, expected, seed=1)
    sgd.step()
    theirs.step()
    assert all(same_bits(p, q) for p, q in zip(others, expected, strict=True))
    lars.load_state_dict(sgd.state_dict())
    group = lars.param_groups[0]
    assert (group["lr"], group["trust_coeff"], group["trust_clip"]) == (0.1, 0.5, True)
    lars.step()


@pytest.mark.parametrize("lr", [0, 0.0, False])
@pytest.mark.parametrize("fused", [True, False])
def test_a_learning_rate_of_zero(fused: bool, lr: float) -> None:
    """An integer, too, as schedules return it; trust_clip divides by it."""
    (p,) = make_params([(5,)])
    before = p.detach().clone()
    set_grads([p], seed=0)
    optimizer = FusedLARS([p], lr=lr, momentum=0.9, weight_decay=0.1, trust_clip=True, fused=fused)
    optimizer.step()
    assert same_bits(p, before)
    assert optimizer.trust_ratios()[0].ratio == 1


@pytest.mark.parametrize("fused", [True, False])
def test_options_that_are_tensors_on_the_cpu(fused: bool) -> None:
    """They are read at the step, and told as they were."""
    (p,), (q,) = make_params([(5,)]), make_params([(5,)])
    set_grads([p], [q], seed=0)
    numbers = {"trust_coeff": 0.25, "eps": 0.5}
    tensors = {key: torch.tensor(value, device="cpu") for key, value in numbers.items()}
    mine = FusedLARS([p], lr=0.1, weight_decay=0.1, trust_clip=True, fused=fused, **tensors)
    theirs = FusedLARS([q], lr=0.1, weight_decay=0.1, trust_clip=True, fused=fused, **numbers)
    mine.step()
    theirs.step()
    for tensor in tensors.values():
        tensor.zero_()
    assert same_bits(p, q)
    assert mine.trust_ratios()[0].ratio == theirs.trust_ratios()[0].ratio


@pytest.mark.parametrize("fused", [True, False])
def test_a_checkpoint_of_lars_leaves_nothing_of_it_in_sgd(fused: bool) -> None:
    (p,), (q,) = make_params([(5,)]), make_params([(5,)])
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}
    set_grads([p], [q], seed=0)
    lars = FusedLARS(make_params([(5,)]), lr_in_momentum=True, **options)
    mine, theirs = FusedSGD([p], fused=fused, **options), torch.optim.SGD([q], **options)
    mine.load_state_dict(lars.state_dict())
    for _ in range(3):
        mine.step()
        theirs.step()
    assert same_bits(p, q)


def test_a_checkpoint_with_decoupled_decay_is_refused_by_lars() -> None:
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}
    (p,), (q,) = make_params([(5,)]), make_params([(5,)])
    set_grads([p], [q], seed=0)
    sgdw, lars = FusedSGD([p], decoupled_weight_decay=True, **options), FusedLARS([q], **options)
    sgdw.step()
    lars.step()
    unchanged, groups = snapshot(lars), {**lars.param_groups[0]}
    with pytest.raises(ValueError, match="decoupled_weight_decay"):
        lars.load_state_dict(sgdw.state_dict())
    unchanged()
    assert lars.param_groups[0] == groups
    lars.step()


# --- Errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("key", ["trust_coeff", "eps"])
def test_nan(key: str, fused: bool) -> None:
    params = make_params([(3,)])
    with pytest.raises(ValueError, match=f"Invalid {key}: nan"):
        FusedLARS(params, **{key: math.nan}, fused=fused)
    optimizer = FusedLARS(params, lr=0.1, momentum=0.9, fused=fused)
    set_grads(params, seed=0)
    optimizer.step()
    optimizer.param_groups[0][key] = math.nan
    unchanged = snapshot(optimizer)
    with pytest.raises(ValueError, match=rf"Invalid {key}: nan; .* \(param group 0\)"):
        optimizer.step()
    unchanged()


@pytest.mark.parametrize("key", ["trust_coeff", "eps"])
def test_negative(key: str) -> None:
    message = f"Invalid {key}: -0.1; it must be 0 or more"
    with pytest.raises(ValueError, match=message):
        FusedLARS(make_params([(3,)]), **{key: -0.1})
    for fused in (True, False):
        params = make_params([(3,)])
        optimizer = FusedLARS(params, fused=fused)
        set_grads(params, seed=0)
        optimizer.param_groups[0][key] = -0.1
        unchanged = snapshot(optimizer)
        with pytest.raises(ValueError, match=rf"{message} \(param group 0\)"):
            optimizer.step()
        unchanged()


@pytest.mark.parametrize("fused", [True, False])
def test_decoupled_decay_and_a_trust_ratio_exclude_each_other(fused: bool) -> None:
    params = make_params([(3,), (4,)])
    message = "`decoupled_weight_decay` and a trust ratio exclude each other"
    with pytest.raises(ValueError, match=message):
        FusedLARS(params, decoupled_weight_decay=True, fused=fused)
    optimizer = FusedLARS(params[:1], lr=0.1, momentum=0.9, fused=fused)
    with pytest.raises(ValueError, match=message + r" \(param group 1\)"):
        optimizer.add_param_group({"params": params[1:], "decoupled_weight_decay": True})
    assert len(optimizer.param_groups) == 1
    set_grads(params, seed=0)
    optimizer.step()
    optimizer.param_groups[0]["decoupled_weight_decay"] = True
    unchanged = snapshot(optimizer)
    with pytest.raises(ValueError, match=message + r" \(param group 0\)"):
        optimizer.step()
    unchanged()


@pytest.mark.parametrize(
    ("kind", "options", "key"),
    [
        (FusedSGD, {"decoupled_weight_decay": True}, "decoupled_weight_decay"),
        (FusedSGD, {"ema_decay": 0.9}, "ema_decay"),
        (FusedSGD, {"ema_decay": 0.0}, "ema_decay"),
        (FusedLARS, {}, "trust_coeff"),
        (FusedLARS, {"trust_coeff": 0.0}, "trust_coeff"),
    ],
)
def test_foreach_has_none_of_it(kind: type[FusedSGD], options: dict[str, Any], key: str) -> None:
    params = make_params([(3,), (4,)])
    message = f"`foreach=True` is torch's own implementation, which has no `{key}`"
    with pytest.raises(RuntimeError, match=message):
        kind(params, foreach=True, **options)
    optimizer = kind(params[:1], **options)
    with pytest.raises(RuntimeError, match=message):
        optimizer.add_param_group({"params": params[1:], "foreach": True})
    assert len(optimizer.param_groups) == 1
    set_grads(params, seed=0)
    optimizer.step()
    optimizer.param_groups[0]["foreach"] = True
    unchanged = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    unchanged()


@pytest.mark.parametrize("options", [{"ema_decay": 0.9}, {"lars": True}], ids=str)
def test_sparse_gradients_are_refused(options: dict[str, Any]) -> None:
    params = make_params([(6, 3), (5,)])
    kind = FusedLARS if options.pop("lars", False) else FusedSGD
    optimizer = kind(params, lr=0.1, **options)
    set_grads(params, seed=0)
    assert params[0].grad is not None
    params[0].grad = params[0].grad.to_sparse()
    unchanged = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"parameter 0 .*neither ema_decay nor a trust ratio supports sparse"):
        optimizer.step()
    unchanged()


def test_trust_coeff_in_a_group_of_fused_sgd() -> None:
    params = make_params([(3,)])
    with pytest.raises(ValueError, match=r"`trust_coeff` is an option of FusedLARS \(param group 0\)"):
        FusedSGD([{"params": params, "trust_coeff": 0.1}])


@pytest.mark.parametrize("key", ["trust_coeff", "eps"])
@pytest.mark.parametrize("value", [None, "0.1"])
def test_a_coefficient_that_is_no_number(key: str, value: Any) -> None:
    params = make_params([(5,)])
    with pytest.raises(TypeError, match=f"{key} must be a number, and is {value!r}"):
        FusedLARS(params, lr=0.1, **{key: value})
    optimizer = FusedLARS(params, lr=0.1)
    with pytest.raises(TypeError, match=rf"{key} must be a number, and is {value!r} \(param group 1\)"):
        optimizer.add_param_group({"params": make_params([(3,)]), key: value})


# --- param_groups() ---------------------------------------------------------------------------------------------------


def test_param_groups() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2), nn.LayerNorm(2))
    model[3].bias.requires_grad_(False)
    groups = param_groups(model, 0.1)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert [name for name, _ in groups[0]["params"]] == ["0.weight", "3.weight"]
    assert [name for name, _ in groups[1]["params"]] == ["0.bias", "1.weight", "1.bias", "4.weight", "4.bias"]
    optimizer = FusedLARS(groups, lr=0.1, momentum=0.9, fused=True)
    model(torch.randn(2, 3, 3, 3)).square().sum().backward()
    optimizer.step()
    ratios = {(row.group, row.parameter): row.ratio.item() for row in optimizer.trust_ratios()}
    assert len(ratios) == 7
    assert all((ratio == 1) is (group == 1) for (group, _), ratio in ratios.items())
    assert "0.weight" in str(optimizer.explain())
    assert len(param_groups(nn.LayerNorm(3), 0.1)) == 1
    assert param_groups(nn.Flatten(), 0.1) == []
