"""The reference against torch.optim.SGD, exact arithmetic, and a float64 model of each formula."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from fused_sgd.reference import (
    accumulation_dtype,
    fill_unset,
    sgd_update,
    unset,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from reference_support import FLOATS, OPTIONS, SHAPES, assert_close, option_id, step_all
from torch import Tensor

from support import copies, float64_ema, float64_model, make_params, same_bits, set_grads

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


def stored(rounded: Fraction | None, dtype: torch.dtype) -> Fraction | float | None:
    """A rounded value as the dtype holds it: an infinity where it is beyond the largest."""
    if rounded is None or abs(rounded) <= torch.finfo(dtype).max:
        return rounded
    return math.copysign(math.inf, rounded)


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


OVERFLOWING = {
    "lr": 4.0,
    "momentum": 1.0,
    "dampening": 0.0,
    "weight_decay": 1.0,
    "nesterov": True,
    "maximize": False,
    "grad_scale": None,
    "clip_coefficient": 2.0,
    "decoupled_weight_decay": False,
    "trust_ratio": 4.0,
    "lr_in_momentum": False,
}  # in float16


@settings(max_examples=400, deadline=None)
@example(rule=OVERFLOWING, decay=0.0, dtype=torch.float16, seed=0)
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
        assert p.tolist() == [stored(one[0], dtype) for one in want], f"parameter at step {step}"
        assert b is None or b.tolist() == [stored(one[1], dtype) for one in want], f"momentum buffer at step {step}"
        if not (p.isfinite().all() and (b is None or b.isfinite().all())):
            return  # float16 has overflowed, and there are no fractions to go on with
        assert fraction(ema) == [one[2] for one in want], f"average at step {step}"


# --- Options on, against a float64 model ------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@example(rule=OVERFLOWING, decay=0.0, dtype=torch.float16, seed=0, shape=(1,))
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
        if not (p.isfinite().all() and (b is None or b.isfinite().all())):
            return  # float16 has overflowed, and differences of infinities say nothing
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
