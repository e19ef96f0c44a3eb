"""The reference against torch.optim.SGD, exact arithmetic, a float64 model of each formula, and torch's own tools.

What surrounds a step in training (clipping, averaging, decay) is compared with the sequence of torch calls it replaces.
"""

from __future__ import annotations

import copy
import io
import itertools
import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from fused_sgd.reference import (
    accumulation_dtype,
    any_nonfinite,
    clip_coefficient,
    fill_unset,
    global_norm,
    is_unset,
    sgd_update,
    trust_ratio,
    unset,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from support import bits, copies, float64_ema, float64_model, make_params, same_bits, set_grads

SHAPES = [(1,), (7,), (32,), (1021,), (4097,), (3, 5), (0,), ()]
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# A few roundings, in the dtype that an update is computed in, of the size that the model gives.
ROUNDING = {torch.float32: 2**-21, torch.float64: 2**-50}
# Half a unit in the last place, and half of the smallest subnormal, for storing in a narrower one.
STORING = {
    torch.float32: (0.0, 2**-149),
    torch.float64: (0.0, 2**-1074),
    torch.bfloat16: (2**-8, 2**-134),
    torch.float16: (2**-11, 2**-25),
}

OPTIONS = [
    {"momentum": momentum, "nesterov": nesterov, "dampening": dampening, "weight_decay": decay, "maximize": maximize}
    for momentum, nesterov, dampening, decay, maximize in itertools.product(
        (0, 0.9), (False, True), (0, 0.3), (0, 0.01), (False, True)
    )
    if not nesterov or (momentum and not dampening)
]


def option_id(options: dict[str, Any]) -> str:
    return "-".join(f"{key}={value}" for key, value in options.items() if value) or "plain"


def step_all(
    params: list[Tensor], buffers: list[Tensor | None], each: list[dict[str, Any]] | None = None, **options: Any
) -> None:
    """A step of the reference on every parameter; ``each`` adds options of one parameter."""
    with torch.no_grad():
        for index, p in enumerate(params):
            assert p.grad is not None
            own = each[index] if each else {}
            buffers[index] = sgd_update(p, p.grad, buffers[index], **options, **own)


def assert_close(got: Tensor, want: Tensor, size: Tensor, what: str = "") -> None:
    """Equal to the model's result but for rounding."""
    relative, absolute = STORING[got.dtype]
    rounding = ROUNDING[accumulation_dtype(got.dtype)]
    allowed = relative * want.abs() + rounding * size + absolute + torch.finfo(accumulation_dtype(got.dtype)).tiny
    excess = (got.detach().double() - want).abs() - allowed
    assert (excess <= 0).all(), f"{what}: {excess.max().item()} beyond what rounding explains"


# --- Options off ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", OPTIONS, ids=option_id)
@pytest.mark.parametrize("neutral", [{}, {"clip_coefficient": 1.0, "trust_ratio": 1.0, "grad_scale": 1.0}], ids=str)
def test_equals_torch_to_the_bit(
    options: dict[str, Any], dtype: torch.dtype, foreach: bool, neutral: dict[str, Any]
) -> None:
    params = make_params(SHAPES, dtype)
    expected = copies(params)
    theirs = torch.optim.SGD(expected, lr=0.1, foreach=foreach, **options)
    buffers: list[Tensor | None] = [None] * len(params)
    for step in range(4):
        set_grads(params, expected, seed=step)
        step_all(params, buffers, lr=0.1, **options, **neutral)
        theirs.step()
        for p, q, b in zip(params, expected, buffers, strict=True):
            assert same_bits(p, q)
            assert b is None or same_bits(b, theirs.state[q]["momentum_buffer"])


# --- The order of operations, in exact arithmetic ---------------------------------------------------------------------

# Significant bits and the exponent of the smallest subnormal.
FORMATS = {
    torch.float64: (53, -1074),
    torch.float32: (24, -149),
    torch.bfloat16: (8, -133),
    torch.float16: (11, -24),
}


def rounded(exact: Fraction, dtype: torch.dtype) -> Fraction:
    """Rounded once, half to even. No overflow."""
    if exact == 0:
        return exact
    precision, smallest = FORMATS[dtype]
    exponent = exact.numerator.bit_length() - exact.denominator.bit_length()
    if abs(exact) >= Fraction(2) ** exponent:
        exponent += 1  # now 2**(exponent - 1) <= |exact| < 2**exponent
    unit = Fraction(2) ** max(exponent - precision, smallest)
    return round(exact / unit) * unit


def exact_step(
    p: Fraction,
    g: Fraction,
    b: Fraction | None,
    e: Fraction | None,
    dtype: torch.dtype,
    *,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    grad_scale: float | None,
    clip_coefficient: float | None,
    decoupled_weight_decay: bool,
    trust_ratio: float | None,
    lr_in_momentum: bool,
    ema_decay: float,
) -> tuple[Fraction, Fraction | None, Fraction]:
    """One element, one rounding per line: parameter, momentum buffer and average of the next step."""
    wide = accumulation_dtype(dtype)

    def cast(number: float) -> Fraction:
        return rounded(Fraction(number), wide)

    def fma(x: Fraction, y: Fraction, z: Fraction) -> Fraction:
        return rounded(x * y + z, wide)

    def mul(x: Fraction, y: Fraction) -> Fraction:
        return rounded(x * y, wide)

    d = g
    if grad_scale is not None:
        d = rounded(d / rounded(Fraction(grad_scale), torch.float32), wide)
    if clip_coefficient is not None:
        d = mul(d, cast(clip_coefficient))
    if maximize:
        d = -d
    if weight_decay != 0 and not decoupled_weight_decay:
        d = fma(p, cast(weight_decay), d)
    if weight_decay != 0 and decoupled_weight_decay:
        p = mul(p, cast(1 - lr * weight_decay))
    if lr_in_momentum:
        d = mul(d, cast(lr * (1.0 if trust_ratio is None else trust_ratio)))
    elif trust_ratio is not None:
        d = mul(d, cast(trust_ratio))
    new_b = b
    if momentum != 0:
        new_b = d if b is None else fma(d, cast(1 - dampening), mul(b, cast(momentum)))
        d = fma(new_b, cast(momentum), d) if nesterov else new_b
        new_b = rounded(new_b, dtype)
    p = rounded(fma(d, -1 if lr_in_momentum else cast(-lr), p), dtype)
    weight = cast(1 - ema_decay)
    if e is None:
        return p, new_b, p
    away = rounded(p - e, wide)
    new_e = fma(weight, away, e) if weight < Fraction(1, 2) else fma(rounded(weight - 1, wide), away, p)
    return p, new_b, new_e


def fraction(tensor: Tensor | None) -> list[Fraction | None]:
    return [None] * 9 if tensor is None else [Fraction(value) for value in tensor.double().tolist()]


HYPER = st.floats(0, 4, allow_subnormal=False)
FACTOR = st.one_of(st.none(), st.floats(2**-10, 4))
RULES = st.fixed_dictionaries(
    {
        "lr": HYPER,
        "momentum": st.one_of(st.just(0.0), st.floats(0, 1.5, allow_subnormal=False)),
        "dampening": st.one_of(st.just(0.0), st.floats(-2, 2)),
        "weight_decay": st.one_of(st.just(0.0), st.just(1e-60), st.floats(0, 1, allow_subnormal=False)),
        "nesterov": st.booleans(),
        "maximize": st.booleans(),
        "grad_scale": st.one_of(st.none(), st.just(65536.0), st.floats(1, 1000, width=32)),
        "clip_coefficient": FACTOR,
        "decoupled_weight_decay": st.booleans(),
        "trust_ratio": FACTOR,
        "lr_in_momentum": st.booleans(),
    }
)
DECAY = st.one_of(st.sampled_from([0.0, 0.4, 0.5, 0.5 + 1e-12, 0.9, 0.999]), st.floats(0, 1, exclude_max=True))


@settings(max_examples=400, deadline=None)
@given(rule=RULES, decay=DECAY, dtype=st.sampled_from(FLOATS), seed=st.integers(0, 2**32))
def test_order_of_operations_is_exact(rule: dict[str, Any], decay: float, dtype: torch.dtype, seed: int) -> None:
    """Every dtype and option, to the bit, against rational numbers that are rounded once per operation."""
    p = make_params([(9,)], dtype, seed)[0].detach()
    ema = fill_unset(torch.empty(9, dtype=accumulation_dtype(dtype)))
    b: Tensor | None = None
    e_before: Tensor | None = None
    for step in range(3):
        grad = make_params([(9,)], dtype, seed + step + 1)[0].detach()
        want = [
            exact_step(*element, dtype, **rule, ema_decay=decay)  # type: ignore[arg-type]
            for element in zip(fraction(p), fraction(grad), fraction(b), fraction(e_before), strict=True)
        ]
        b = sgd_update(p, grad, b, **rule, ema=ema, ema_decay=decay)
        e_before = ema.clone()
        assert fraction(p) == [one[0] for one in want], f"parameter at step {step}"
        assert fraction(b) == [one[1] for one in want], f"momentum buffer at step {step}"
        assert fraction(ema) == [one[2] for one in want], f"average at step {step}"


# --- Options on, against a float64 model ------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(
    rule=RULES, decay=DECAY, dtype=st.sampled_from(FLOATS), seed=st.integers(0, 2**32), shape=st.sampled_from(SHAPES)
)
def test_every_option_within_rounding_of_float64(
    rule: dict[str, Any], decay: float, dtype: torch.dtype, seed: int, shape: tuple[int, ...]
) -> None:
    p = make_params([shape], dtype, seed)[0].detach()
    ema = fill_unset(torch.empty(shape, dtype=accumulation_dtype(dtype)))
    b: Tensor | None = None
    given_options = {key: value for key, value in rule.items() if value is not None}
    for step in range(3):
        grad = make_params([shape], dtype, seed + step + 1)[0].detach()
        model = float64_model(p, grad, b, **given_options)
        e_before = None if step == 0 else ema.clone()
        grad_before = grad.clone()
        b = sgd_update(p, grad, b, **rule, ema=ema, ema_decay=decay)
        assert same_bits(grad, grad_before), "the gradient was written"
        if p.numel() == 0:
            continue
        assert_close(p, model.param, model.param_size, f"parameter at step {step}")
        if b is not None:
            assert model.buffer is not None
            assert b.dtype == p.dtype
            assert_close(b, model.buffer, model.buffer_size, f"momentum buffer at step {step}")
        average = float64_ema(e_before, p, decay)
        size = p.double().abs() if e_before is None else p.double().abs() + e_before.double().abs()
        assert_close(ema, average, size, f"average at step {step}")


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("options", OPTIONS[::3], ids=option_id)
def test_tensor_hyperparameters_give_the_bits_of_numbers(options: dict[str, Any], dtype: torch.dtype) -> None:
    """lr and weight_decay of 1 element in any dtype; coefficient and ratio as they come from this module."""
    numbers: dict[str, Any] = {"lr": 0.125, "clip_coefficient": 0.3, "trust_ratio": 0.7, "ema_decay": 0.9}
    tensors = {
        **numbers,
        "lr": torch.tensor([0.125]),
        "clip_coefficient": torch.tensor(0.3, dtype=torch.float64),
        "trust_ratio": torch.tensor(0.7, dtype=torch.float64),
    }
    options = {**options, "weight_decay": 0.5 * bool(options["weight_decay"])}
    for decoupled, inside in itertools.product((False, True), repeat=2):
        params = make_params(SHAPES, dtype)
        for p, q in zip(params, copies(params), strict=True):
            grad = torch.randn_like(p)
            results = []
            for param, given_options in ((p.detach(), numbers), (q.detach(), tensors)):
                decay = options["weight_decay"]
                ema = fill_unset(torch.empty_like(param, dtype=accumulation_dtype(dtype)))
                buffer = None
                for _ in range(2):
                    merged = {**options, **given_options, "decoupled_weight_decay": decoupled, "lr_in_momentum": inside}
                    if given_options is tensors:
                        merged["weight_decay"] = torch.tensor([decay], dtype=torch.float64)
                    buffer = sgd_update(param, grad, buffer, ema=ema, **merged)
                results.append((param, ema, param if buffer is None else buffer))
            for one, other in zip(*results, strict=True):
                assert same_bits(one, other)


def test_autograd_runs_through_lr_and_weight_decay() -> None:
    """With differentiable=True the step is part of a graph, whichever formula it takes."""
    p, grad = torch.randn(5, dtype=torch.float64), torch.randn(5, dtype=torch.float64, requires_grad=True)
    buffer = torch.randn(5, dtype=torch.float64)
    buffer[2] = unset(torch.float64)

    def stepped(grad: Tensor, lr: Tensor, decay: Tensor, decoupled: bool, inside: bool) -> Tensor:
        param = p.clone()
        options = {"decoupled_weight_decay": decoupled, "lr_in_momentum": inside, "trust_ratio": 0.5}
        sgd_update(param, grad, buffer.clone(), lr=lr, weight_decay=decay, momentum=0.9, dampening=0.1, **options)
        return param

    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    decay = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    for decoupled, inside in itertools.product((False, True), repeat=2):
        assert torch.autograd.gradcheck(stepped, (grad, lr, decay, decoupled, inside))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_parameters_are_pairs_of_reals(dtype: torch.dtype) -> None:
    p = make_params([(5, 3)], dtype)[0].detach()
    q = torch.view_as_real(p.clone())
    ema = fill_unset(torch.empty_like(p))
    pair_ema = fill_unset(torch.empty_like(q))
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.1, "trust_ratio": 0.3}
    options |= {"clip_coefficient": 0.5, "grad_scale": 4.0, "ema_decay": 0.7}
    buffer = fill_unset(torch.empty_like(p))
    pair_buffer = fill_unset(torch.empty_like(q))
    for step in range(3):
        grad = make_params([(5, 3)], dtype, seed=step)[0].detach()
        sgd_update(p, grad, buffer, ema=ema, **options)
        sgd_update(q, torch.view_as_real(grad), pair_buffer, ema=pair_ema, **options)
    for one, pair in ((p, q), (buffer, pair_buffer), (ema, pair_ema)):
        torch.testing.assert_close(torch.view_as_real(one), pair)


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


# --- Decoupled weight decay -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", OPTIONS, ids=option_id)
def test_decoupled_decay_is_a_multiplication_before_the_step(options: dict[str, Any], dtype: torch.dtype) -> None:
    params = make_params(SHAPES, dtype)
    expected = copies(params)
    decay = options["weight_decay"]
    theirs = torch.optim.SGD(expected, lr=0.1, **{**options, "weight_decay": 0})
    buffers: list[Tensor | None] = [None] * len(params)
    for step in range(4):
        set_grads(params, expected, seed=step)
        step_all(params, buffers, lr=0.1, decoupled_weight_decay=True, **options)
        with torch.no_grad():
            for q in expected:
                q.mul_(1 - 0.1 * decay)
        theirs.step()
        for p, q in zip(params, expected, strict=True):
            assert same_bits(p, q)


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


# --- Moving average ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("decay", [0.0, 0.3, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("options", OPTIONS[::3], ids=option_id)
def test_average_equals_torchs_to_the_bit(options: dict[str, Any], decay: float, dtype: torch.dtype) -> None:
    params = make_params(SHAPES, dtype)
    model = torch.nn.ParameterList(copies(params))
    expected = list(model.parameters())
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
    theirs = torch.optim.SGD(expected, lr=0.1, **options)
    buffers: list[Tensor | None] = [None] * len(params)
    each = [{"ema": fill_unset(torch.empty_like(p))} for p in params]
    for step in range(4):
        set_grads(params, expected, seed=step)
        step_all(params, buffers, each, lr=0.1, ema_decay=decay, **options)
        theirs.step()
        averaged.update_parameters(model)
        for one, e, p in zip(each, averaged.parameters(), params, strict=True):
            assert same_bits(one["ema"], e)
            assert not one["ema"].requires_grad
            assert p.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_average_of_16_bit_parameters_is_float32_of_what_is_stored(dtype: torch.dtype) -> None:
    p = torch.ones(3, dtype=dtype)
    ema = fill_unset(torch.empty(3))
    sgd_update(p, torch.full_like(p, 1e-4), None, lr=0.1, ema=ema, ema_decay=0.9)
    assert torch.equal(ema, torch.ones(3)), "the parameter did not move, so the average must not"
    p += 1
    sgd_update(p, torch.zeros_like(p), None, lr=0.1, ema=ema, ema_decay=0.75)
    assert torch.equal(ema, torch.full((3,), 1.25))


def test_average_of_strided_memory() -> None:
    p, ema = torch.randn(8, 6).t(), fill_unset(torch.empty(6, 16))[:, ::2]
    q, dense = p.contiguous(), fill_unset(torch.empty(6, 8))
    for _ in range(3):
        grad = torch.randn(6, 8)
        sgd_update(p, grad, None, lr=0.1, ema=ema, ema_decay=0.9)
        sgd_update(q, grad, None, lr=0.1, ema=dense, ema_decay=0.9)
    assert same_bits(ema.contiguous(), dense)


# --- Elements that have accumulated nothing ---------------------------------------------------------------------------

UNSET = {
    torch.float64: (torch.int64, 0x7FFDC00000000000),
    torch.float32: (torch.int32, 0x7FEE0000),
    torch.bfloat16: (torch.int16, 0x7FEE),
    torch.float16: (torch.int16, 0x7F70),
}


@pytest.mark.parametrize("dtype", FLOATS)
def test_unset_bits(dtype: torch.dtype) -> None:
    integer, pattern = UNSET[dtype]
    assert unset(dtype).isnan()
    assert unset(dtype).view(integer).item() == pattern
    assert unset(dtype).dtype == dtype
    strided = torch.zeros(4, 6, dtype=dtype).t()[::2]
    assert fill_unset(strided) is strided
    assert (strided.contiguous().view(integer) == pattern).all()
    assert is_unset(strided).all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_only_these_bits_are_unset(dtype: torch.dtype) -> None:
    integer, pattern = UNSET[dtype]
    others = torch.tensor([0.0, -0.0, 1.0, math.inf, -math.inf, math.nan], dtype=dtype)
    neighbours = torch.tensor([pattern - 1, pattern + 1, pattern ^ 1], dtype=integer).view(dtype)
    assert not is_unset(torch.cat([others, neighbours, -fill_unset(others.clone())])).any()
    made = torch.cat([others - others, others * 0, others / others, others.sqrt(), others + math.nan])
    assert not is_unset(made).any()
    mixed = torch.zeros(5, dtype=dtype)
    mixed[3] = unset(dtype)
    assert is_unset(mixed).tolist() == [False, False, False, True, False]


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_unset_complex(dtype: torch.dtype) -> None:
    z = torch.zeros(3, 2, dtype=dtype)
    assert not is_unset(z).any()
    z[1] = unset(dtype)
    assert is_unset(z).tolist() == [[False, False], [True, True], [False, False]]
    assert is_unset(fill_unset(z.t())).all()
    assert is_unset(unset(dtype))
    half = torch.complex(unset(dtype.to_real()), torch.zeros((), dtype=dtype.to_real()))
    assert not is_unset(half)


@pytest.mark.parametrize("dtype", FLOATS)
def test_unset_survives_copies_and_checkpoints(dtype: torch.dtype) -> None:
    state = {"momentum_buffer": fill_unset(torch.empty(100, dtype=dtype))}
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)["momentum_buffer"]
    for tensor in (loaded, copy.deepcopy(state)["momentum_buffer"], state["momentum_buffer"].clone(), loaded.to(dtype)):
        assert is_unset(tensor).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("options", [options for options in OPTIONS if options["momentum"]], ids=option_id)
def test_first_step_into_an_unset_buffer(options: dict[str, Any], dtype: torch.dtype) -> None:
    """It is the first step to the bit; and with no dampening, so it is into a buffer of -0.0."""
    starts = [None, fill_unset(torch.empty(1021, dtype=dtype))]
    if not options["dampening"]:
        starts.append(torch.full((1021,), -0.0, dtype=dtype))
    results = []
    for start in starts:
        p = make_params([(1021,)], dtype)[0].detach()
        buffer = start
        for step in range(3):
            grad = make_params([(1021,)], dtype, seed=step + 1)[0].detach()
            grad[:4] = torch.tensor([0.0, -0.0, math.inf, math.nan])
            kept = sgd_update(p, grad, buffer, lr=0.1, **options)
            assert kept is buffer or buffer is None
            buffer = kept
        assert buffer is not None
        results.append((p, buffer))
    for p, buffer in results[1:]:
        assert torch.equal(bits(p), bits(results[0][0]))
        assert torch.equal(bits(buffer), bits(results[0][1]))


def test_elements_are_unset_one_by_one() -> None:
    grad = torch.tensor([1.0, 1.0, 1.0])
    buffer = torch.tensor([2.0, 2.0, math.nan])
    buffer[1] = unset(torch.float32)
    sgd_update(torch.zeros(3), grad, buffer, lr=0.1, momentum=0.5, dampening=0.25)
    assert buffer[:2].tolist() == [1.75, 1.0]
    assert buffer[2].isnan(), "a NaN that was accumulated stays"
    ema = torch.tensor([2.0, 2.0, math.nan])
    ema[1] = unset(torch.float32)
    sgd_update(torch.zeros(3), torch.zeros(3), None, lr=0.1, ema=ema, ema_decay=0.5)
    assert ema[:2].tolist() == [1.0, 0.0]
    assert ema[2].isnan()
