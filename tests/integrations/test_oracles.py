"""The reference and the kernels against timm: its Lars to rounding over its options, its SGDW to the bit."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from fused_sgd import FusedLARS, FusedSGD
from fused_sgd.reference import global_norm, sgd_update, trust_ratio
from timm.optim import SGDW, Lars
from torch import Tensor

from support import assert_same, copies, make_params, same_bits, set_grads

SHAPES = [(1,), (7,), (33, 5), (1021,), (4097,), (2, 3, 4), ()]

SGD_OPTIONS = [
    {"momentum": momentum, "nesterov": nesterov, "dampening": dampening, "weight_decay": decay}
    for momentum, nesterov, dampening, decay in itertools.product((0, 0.9), (False, True), (0, 0.3), (0, 0.02))
    if not nesterov or (momentum and not dampening)
]
ADAPT_OPTIONS: list[dict[str, Any]] = [
    {},
    {"trust_coeff": 0.02, "eps": 1e-3},
    {"trust_clip": True},
    {"trust_clip": True, "trust_coeff": 0.5},  # large enough to be held at 1
]
LARS_OPTIONS = [
    {**sgd, **adapt, "always_adapt": always}
    for sgd, adapt, always in itertools.product(SGD_OPTIONS, ADAPT_OPTIONS, (False, True))
]


def option_id(options: dict[str, Any]) -> str:
    return "-".join(f"{key}={value}" for key, value in options.items() if value) or "plain"


def reference_lars(
    params: list[Tensor], buffers: list[Tensor | None], lr: float, options: dict[str, Any]
) -> list[float]:
    """One step of LARS made of the reference's parts; returns the trust ratios."""
    adapt = {key: options[key] for key in ("trust_coeff", "eps", "trust_clip", "always_adapt") if key in options}
    update = {key: value for key, value in options.items() if key not in adapt}
    ratios = []
    with torch.no_grad():
        for index, p in enumerate(params):
            assert p.grad is not None
            norms = global_norm([p]), global_norm([p.grad])
            ratio = trust_ratio(*norms, lr=lr, weight_decay=options["weight_decay"], **adapt)
            buffers[index] = sgd_update(p, p.grad, buffers[index], lr=lr, trust_ratio=ratio, **update)
            ratios.append(ratio.item())
    return ratios


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("options", LARS_OPTIONS, ids=option_id)
def test_lars_equals_timms(options: dict[str, Any], foreach: bool) -> None:
    """With a parameter that is all zeros, and one whose gradient is: there the ratio is 1."""
    params = make_params(SHAPES)
    with torch.no_grad():
        params[1].zero_()
    expected = copies(params)
    theirs = Lars(expected, lr=1.0, foreach=foreach, **options)
    buffers: list[Tensor | None] = [None] * len(params)
    for step in range(5):
        lr = 0.3 if step < 3 else 0.05
        theirs.param_groups[0]["lr"] = lr
        set_grads(params, expected, seed=step)
        if step == 0:
            for p in (params[2], expected[2]):
                assert p.grad is not None
                p.grad.zero_()
        ratios = reference_lars(params, buffers, lr, options)
        theirs.step()
        if step == 0 and not options.get("trust_clip"):
            assert ratios[1] == ratios[2] == 1.0
        for p, q, b in zip(params, expected, buffers, strict=True):
            torch.testing.assert_close(p, q, rtol=2**-20, atol=2**-20)
            if b is not None:
                torch.testing.assert_close(b, theirs.state[q]["momentum_buffer"], rtol=2**-20, atol=2**-20)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.02])
@pytest.mark.parametrize("bad", [float("inf"), float("nan"), 1e30])
def test_lars_with_gradients_beyond_float32(bad: float, decay: float, clip: bool) -> None:
    """Where timm's norm is what the float64 one is, infinite or NaN, so is what becomes of it.

    The norm of 1e30 is infinite in float32 only: timm multiplies by 0, and the reference by the ratio.
    """
    params = make_params([(5,), (6,)])
    expected = copies(params)
    options = {"weight_decay": decay, "trust_clip": clip, "always_adapt": True}
    theirs = Lars(expected, lr=0.1, foreach=False, **options)
    set_grads(params, expected, seed=0)
    for p in (params[0], expected[0]):
        assert p.grad is not None
        p.grad[1] = bad
    before = expected[0].detach().clone()
    reference_lars(params, [None, None], 0.1, options)
    theirs.step()
    torch.testing.assert_close(params[1], expected[1])
    if bad == 1e30:
        assert torch.equal(expected[0], before), "timm no longer loses this step"
        assert (params[0] != before)[1]
        assert params[0].isfinite().all()
    else:
        torch.testing.assert_close(params[0], expected[0], equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("options", SGD_OPTIONS, ids=option_id)
def test_sgdw_equals_timms_to_the_bit(
    options: dict[str, Any], maximize: bool, foreach: bool, dtype: torch.dtype
) -> None:
    params = make_params(SHAPES, dtype)
    expected = copies(params)
    theirs = SGDW(expected, lr=0.1, maximize=maximize, foreach=foreach, **options)
    buffers: list[Tensor | None] = [None] * len(params)
    for step in range(5):
        lr = theirs.param_groups[0]["lr"] = 0.1 / (step + 1)
        set_grads(params, expected, seed=step)
        with torch.no_grad():
            for i, p in enumerate(params):
                assert p.grad is not None
                buffers[i] = sgd_update(
                    p, p.grad, buffers[i], lr=lr, decoupled_weight_decay=True, maximize=maximize, **options
                )
        theirs.step()
        for p, q, b in zip(params, expected, buffers, strict=True):
            assert same_bits(p, q), f"parameter at step {step}"
            assert b is None or same_bits(b, theirs.state[q]["momentum_buffer"]), f"momentum buffer at step {step}"


# --- The kernels ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", LARS_OPTIONS, ids=option_id)
def test_fused_lars_equals_timms(options: dict[str, Any]) -> None:
    params = make_params(SHAPES)
    with torch.no_grad():
        params[1].zero_()
    expected = copies(params)
    mine = FusedLARS(params, lr=1.0, fused=True, **options)
    theirs = Lars(expected, lr=1.0, **options)
    for step in range(5):
        lr = mine.param_groups[0]["lr"] = theirs.param_groups[0]["lr"] = 0.3 if step < 3 else 0.05
        set_grads(params, expected, seed=step)
        if step == 0:
            for p in (params[2], expected[2]):
                assert p.grad is not None
                p.grad.zero_()
        mine.step()
        theirs.step()
        for p, q in zip(params, expected, strict=True):
            torch.testing.assert_close(p, q, rtol=2**-20, atol=2**-20, msg=f"at step {step}, lr {lr}")
            buffer = mine.state[p].get("momentum_buffer")
            if buffer is not None:
                torch.testing.assert_close(buffer, theirs.state[q]["momentum_buffer"], rtol=2**-20, atol=2**-20)


def test_a_checkpoint_of_timms_lars_loads() -> None:
    params = make_params(SHAPES)
    expected = copies(params)
    options = {"momentum": 0.9, "weight_decay": 0.02, "trust_coeff": 0.02, "trust_clip": True}
    theirs = Lars(expected, lr=0.3, **options)
    set_grads(params, expected, seed=0)
    theirs.step()
    with torch.no_grad():
        for p, q in zip(params, expected, strict=True):
            p.copy_(q)
    mine = FusedLARS(params, fused=True)
    mine.load_state_dict(copy.deepcopy(theirs.state_dict()))  # as from a file: loading shares memory
    set_grads(params, expected, seed=1)
    mine.step()
    theirs.step()
    for p, q in zip(params, expected, strict=True):
        torch.testing.assert_close(p, q, rtol=2**-20, atol=2**-20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("options", SGD_OPTIONS, ids=option_id)
def test_fused_sgdw_equals_timms_to_the_bit(options: dict[str, Any], maximize: bool, dtype: torch.dtype) -> None:
    params = make_params(SHAPES, dtype)
    expected = copies(params)
    mine = FusedSGD(params, lr=0.1, maximize=maximize, decoupled_weight_decay=True, fused=True, **options)
    theirs = SGDW(expected, lr=0.1, maximize=maximize, **options)
    for step in range(5):
        mine.param_groups[0]["lr"] = theirs.param_groups[0]["lr"] = 0.1 / (step + 1)
        set_grads(params, expected, seed=step)
        mine.step()
        theirs.step()
        assert_same(mine, theirs, params, expected, f"at step {step}")
