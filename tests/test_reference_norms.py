"""The reference's norms, clipping and trust ratios, against the torch calls they replace and a float64 model."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from fused_sgd.reference import (
    accumulation_dtype,
    any_nonfinite,
    clip_coefficient,
    global_norm,
    sgd_update,
    trust_ratio,
)
from reference_support import FLOATS, OPTIONS, ROUNDING, SHAPES, option_id, step_all
from torch import Tensor

from support import copies, make_params, same_bits, set_grads

# --- Clipping and gradients that are not finite -----------------------------------------------------------------------


@pytest.mark.parametrize("max_norm", [1e-3, 1.0, 50.0, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", OPTIONS[::3], ids=option_id)
def test_clipping_equals_torchs(options: dict[str, Any], dtype: torch.dtype, max_norm: float) -> None:
    params = make_params(SHAPES, dtype)
    expected = copies(params)
    theirs = torch.optim.SGD(expected, lr=0.1, **options)
    buffers: list[Tensor | None] = [None] * len(params)
    for step in range(3):
        set_grads(params, expected, seed=step)
        norm = global_norm([p.grad for p in params if p.grad is not None])
        step_all(params, buffers, lr=0.1, clip_coefficient=clip_coefficient(norm, max_norm), **options)
        their_norm = torch.nn.utils.clip_grad_norm_(expected, max_norm)
        theirs.step()
        torch.testing.assert_close(norm, their_norm.double(), rtol=ROUNDING[dtype] * 4, atol=0)
        for p, q in zip(params, expected, strict=True):
            torch.testing.assert_close(p, q, rtol=ROUNDING[dtype], atol=ROUNDING[dtype])


@pytest.mark.parametrize("norm", [0.0, 0.3, 1.0 - 1e-6, 1.0, 7.0, 1e300, math.inf, math.nan])
@pytest.mark.parametrize("max_norm", [1e-3, 1.0, math.inf])
def test_clip_coefficient_equals_torchs(norm: float, max_norm: float) -> None:
    total = torch.tensor(norm, dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64, requires_grad=True)
    one.grad = torch.ones(1, dtype=torch.float64)
    torch.nn.utils.clip_grads_with_norm_(one, max_norm, total)
    got = clip_coefficient(total, max_norm)
    assert same_bits(got, one.grad[0])
    assert got.dtype == torch.float64
    assert got.isnan() or got <= 1


def test_global_norm_is_that_of_one_long_vector() -> None:
    grads = [torch.randn(shape, dtype=dtype) for shape in SHAPES for dtype in FLOATS]
    grads += [torch.randn(5, dtype=torch.complex64), torch.eye(4).to_sparse()]
    parts = [torch.view_as_real(g) if g.is_complex() else g.to_dense() for g in grads]
    vector = torch.cat([part.double().flatten() for part in parts])
    norm = global_norm(grads)
    assert norm.shape == ()
    assert norm.dtype == torch.float64
    torch.testing.assert_close(norm, vector.norm(), rtol=1e-14, atol=0)
    assert global_norm([]) == 0
    assert global_norm([torch.zeros(3), torch.empty(0)]) == 0


def test_global_norm_loses_nothing_that_matters() -> None:
    """In float32 the first would overflow, and the second would stop growing."""
    assert global_norm([torch.full((4,), 1e38)]).item() == pytest.approx(2e38, rel=1e-6)
    many = torch.full((2**25,), 1e-3)
    exact = many[0].double().item() * math.sqrt(many.numel())
    assert global_norm([many, torch.full((1,), 1e3)]).item() == pytest.approx(math.hypot(exact, 1e3), rel=1e-13)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("scale", [1024.0, 3.0, torch.tensor(3.0)])
def test_norm_is_taken_of_what_the_step_takes(dtype: torch.dtype, scale: float | Tensor) -> None:
    grads = [torch.randn(1021).to(dtype), torch.randn(7).to(dtype)]
    wide = accumulation_dtype(dtype)
    divided = [g.to(wide) / torch.as_tensor(scale, dtype=wide) for g in grads]
    assert same_bits(global_norm(grads, scale), global_norm(divided))


@pytest.mark.parametrize("dtype", [*FLOATS, torch.complex64])
def test_nonfinite_gradients_are_found(dtype: torch.dtype) -> None:
    real = dtype.to_real() if dtype.is_complex else dtype
    largest, smallest = torch.finfo(real).max, torch.finfo(real).smallest_normal
    fine = torch.tensor([0.0, -0.0, largest, -largest, smallest]).to(dtype) if real != torch.float64 else None
    fine = torch.tensor([largest, -largest, 5e-324], dtype=dtype) if fine is None else fine
    found = any_nonfinite([fine, torch.empty(0, dtype=dtype), fine.reshape(-1, 1)])
    assert found.dtype == torch.bool
    assert found.shape == ()
    assert not found
    for bad in (math.inf, -math.inf, math.nan):
        for position in (0, -1):
            grad = fine.clone()
            grad[position] = bad
            assert any_nonfinite([fine, grad, fine])
    assert not any_nonfinite([])
    assert any_nonfinite([torch.tensor([1.0, math.nan]).to(dtype).to_sparse(), fine])


def test_finite_gradients_whose_norm_overflows_are_finite() -> None:
    grads = [torch.full((3,), 1e200, dtype=torch.float64)]
    assert global_norm(grads).isinf()
    assert not any_nonfinite(grads)


# --- LARS -------------------------------------------------------------------------------------------------------------

RATIOS = list(itertools.product((0.0, 3.0, math.inf, math.nan), (0.0, 0.5, math.nan), (0.0, 0.01), (False, True)))


@pytest.mark.parametrize("trust_clip", [False, True])
@pytest.mark.parametrize(("param_norm", "grad_norm", "decay", "always_adapt"), RATIOS)
def test_trust_ratio(param_norm: float, grad_norm: float, decay: float, always_adapt: bool, trust_clip: bool) -> None:
    got = trust_ratio(
        torch.tensor(param_norm, dtype=torch.float64),
        torch.tensor(grad_norm, dtype=torch.float64),
        lr=0.004,
        weight_decay=decay,
        trust_coeff=0.02,
        eps=1e-3,
        trust_clip=trust_clip,
        always_adapt=always_adapt,
    )
    want = 1.0
    if decay or always_adapt:
        if param_norm > 0 and grad_norm > 0:
            want = 0.02 * param_norm / (grad_norm + param_norm * decay + 1e-3)
        want = min(want / 0.004, 1.0) if trust_clip else want
    assert got.dtype == torch.float64
    assert got.shape == ()
    assert got.item() == pytest.approx(want, rel=1e-15, nan_ok=True)


LARS = [
    {"momentum": momentum, "nesterov": nesterov, "dampening": dampening, "weight_decay": decay, "trust_clip": clip}
    for momentum, nesterov, dampening, decay, clip in itertools.product(
        (0, 0.9), (False, True), (0, 0.3), (0, 0.01), (False, True)
    )
    if not nesterov or (momentum and not dampening)
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("inside", [False, True], ids=["lr outside", "lr in momentum"])
@pytest.mark.parametrize("options", LARS, ids=option_id)
def test_lars_equals_a_float64_model(options: dict[str, Any], inside: bool, dtype: torch.dtype) -> None:
    """The whole of it: clipping, norms of what was clipped, a learning rate that changes, several parameters."""
    params = make_params(SHAPES, dtype)
    models = [p.detach().double().clone() for p in params]
    buffers: list[Tensor | None] = [None] * len(params)
    model_buffers: list[Tensor | None] = [None] * len(params)
    adapt = {"weight_decay": options["weight_decay"], "trust_clip": options["trust_clip"], "always_adapt": True}
    update = {key: value for key, value in options.items() if key != "trust_clip"}
    for step in range(4):
        lr = 2.0 / (step + 1)
        set_grads(params, seed=step)
        grads = [p.grad for p in params if p.grad is not None]
        clip = clip_coefficient(global_norm(grads), 10.0)
        ratios = [
            trust_ratio(global_norm([p]), global_norm([g]) * clip, lr=lr, **adapt)
            for p, g in zip(params, grads, strict=True)
        ]
        each = [{"trust_ratio": ratio} for ratio in ratios]
        step_all(params, buffers, each, lr=lr, clip_coefficient=clip, lr_in_momentum=inside, **update)
        total = math.sqrt(sum(g.double().square().sum().item() for g in grads))
        for i, g in enumerate(grads):
            d = g.double() * min(1.0, 10.0 / (total + 1e-6))
            w_norm, g_norm = models[i].norm().item(), d.norm().item()
            ratio = 0.001 * w_norm / (g_norm + options["weight_decay"] * w_norm + 1e-8) if w_norm * g_norm else 1.0
            ratio = min(ratio / lr, 1.0) if options["trust_clip"] else ratio
            d = ratio * (d + options["weight_decay"] * models[i])
            d = lr * d if inside else d
            if options["momentum"]:
                before = model_buffers[i]
                b = d if before is None else options["momentum"] * before + (1 - options["dampening"]) * d
                model_buffers[i] = b
                d = d + options["momentum"] * b if options["nesterov"] else b
            models[i] = models[i] - (d if inside else lr * d)
    for p, model in zip(params, models, strict=True):
        torch.testing.assert_close(p.detach().double(), model, rtol=4 * ROUNDING[dtype], atol=4 * ROUNDING[dtype])


def test_lr_in_momentum_matters_only_when_it_changes() -> None:
    """A buffer of lr * d, subtracted, is a buffer of d, multiplied by lr: until lr is another."""
    start = torch.randn(100, dtype=torch.float64)
    grads = [torch.randn(100, dtype=torch.float64) for _ in range(6)]
    for schedule, same in (([0.5] * 6, True), ([0.5, 0.4, 0.3, 0.2, 0.1, 0.0], False)):
        params = [start.clone(), start.clone()]
        for p, inside in zip(params, (False, True), strict=True):
            buffer = None
            for lr, grad in zip(schedule, grads, strict=True):
                buffer = sgd_update(p, grad, buffer, lr=lr, momentum=0.9, trust_ratio=0.1, lr_in_momentum=inside)
        assert torch.allclose(*params, rtol=1e-13, atol=1e-13) is same
