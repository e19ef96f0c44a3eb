"""Every combination of options and formats, drawn at random, against the reference."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from fused_sgd import FusedLARS, FusedSGD
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from support import CLOSE, bits, each_instruction_set, kept, make_params, same_bits, seeded

pytestmark = pytest.mark.usefixtures("device")

SHAPES = [(1,), (7,), (4097,), (3, 5), (0,), (), (129, 65), (3, 64), (2, 3, 64), (67, 128)]


class Kind(NamedTuple):
    """A parameter of the property test."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    transposed: bool
    grad_transposed: bool
    late: int  # the first step in which it has a gradient


# Options and the dtypes of parameters that they make sense for, beside float32.
NARROW = [torch.bfloat16, torch.float16]
STORAGE: list[tuple[dict[str, Any], list[torch.dtype]]] = [
    ({}, [torch.float64, *NARROW, torch.complex64, torch.complex128]),
    ({"momentum_dtype": torch.float32}, NARROW),
    ({"momentum_dtype": torch.bfloat16}, [torch.bfloat16]),
    ({"momentum_dtype": torch.int8}, NARROW),
    ({"master_weights": "split"}, [torch.bfloat16]),
    ({"master_weights": "split", "momentum_dtype": torch.int8}, [torch.bfloat16]),
    ({"master_weights": "split", "momentum_dtype": torch.bfloat16}, [torch.bfloat16]),
    ({"master_weights": torch.float32}, NARROW),
    ({"master_weights": "float32", "momentum_dtype": torch.int8}, NARROW),
    ({"master_weights": "float32", "momentum_dtype": torch.bfloat16}, [torch.bfloat16]),
    ({"stochastic_rounding": True}, NARROW),
    ({"stochastic_rounding": True, "momentum_dtype": torch.int8}, NARROW),
    ({"stochastic_rounding": True, "momentum_dtype": torch.float32}, NARROW),
]


class Case(NamedTuple):
    lars: bool
    groups: list[tuple[dict[str, Any], list[Kind]]]
    whole: dict[str, Any]  # options of the whole optimizer
    grad_scale: float | Tensor | None
    bad: dict[int, float]  # by step: what is put into one gradient
    seed: int


@st.composite
def group_options(draw: st.DrawFn, lars: bool) -> dict[str, Any]:
    momentum = draw(st.sampled_from([0.0, 0.5, 0.9]))
    nesterov = draw(st.booleans()) and momentum > 0
    options: dict[str, Any] = {
        "lr": draw(st.sampled_from([0.1, 0.5, 1e-3])),
        "momentum": momentum,
        "nesterov": nesterov,
        "dampening": 0 if nesterov else draw(st.sampled_from([0, 0.3, 1, -0.5])),
        "weight_decay": draw(st.sampled_from([0, 0.02, 0.5])),
        "maximize": draw(st.booleans()),
        "ema_decay": draw(st.sampled_from([None, 0.0, 0.3, 0.5, 0.99])),
    }
    if lars:
        options |= {
            "trust_coeff": draw(st.sampled_from([0.001, 0.1])),
            "eps": draw(st.sampled_from([1e-8, 0.1])),
            "trust_clip": draw(st.booleans()),
            "always_adapt": draw(st.booleans()),
            "lr_in_momentum": draw(st.booleans()),
        }
    else:
        options["decoupled_weight_decay"] = draw(st.booleans())
    return options


@st.composite
def a_group(draw: st.DrawFn, lars: bool) -> tuple[dict[str, Any], list[Kind]]:
    storage, dtypes = draw(st.sampled_from(STORAGE))
    kinds = st.builds(
        Kind,
        st.sampled_from(SHAPES),
        st.sampled_from([torch.float32, *dtypes]),
        st.booleans(),
        st.booleans(),
        st.sampled_from([0, 0, 0, 1]),
    )
    return {**draw(group_options(lars)), **storage}, draw(st.lists(kinds, min_size=1, max_size=3))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    lars = draw(st.booleans())
    scale = draw(st.sampled_from([None, 4.0, 3.0, 1024.0]))
    return Case(
        lars,
        draw(st.lists(a_group(lars), min_size=1, max_size=3)),
        {
            "max_grad_norm": draw(st.sampled_from([None, None, 0.1, 5.0, 1e6])),
            "skip_nonfinite": draw(st.booleans()),
        },
        torch.tensor(scale) if scale and draw(st.booleans()) else scale,
        draw(st.dictionaries(st.integers(0, 2), st.sampled_from([float("inf"), float("nan"), -float("inf")]))),
        draw(st.integers(0, 2**16)),
    )


def make(case: Case, fused: bool) -> tuple[FusedSGD, list[Tensor], list[Kind]]:
    params, kinds, groups = [], [], []
    for options, members in case.groups:
        mine = make_params([kind.shape for kind in members], seed=case.seed)
        for index, kind in enumerate(members):
            p = make_params([kind.shape], kind.dtype, case.seed + index)[0].detach()
            mine[index] = (p.mT.contiguous().mT if kind.transposed and p.dim() == 2 else p).requires_grad_()
        params += mine
        kinds += members
        groups.append({**options, "params": mine})
    optimizer = (FusedLARS if case.lars else FusedSGD)(groups, lr=0.1, **case.whole, fused=fused)
    if case.grad_scale is not None:
        optimizer.grad_scale = case.grad_scale
    return optimizer, params, kinds


def set_case_grads(case: Case, params: list[Tensor], kinds: list[Kind], step: int) -> None:
    scale = 1.0 if case.grad_scale is None else float(case.grad_scale)
    generator = torch.Generator().manual_seed(case.seed + step)
    there = []
    for p, kind in zip(params, kinds, strict=True):
        grad = (seeded(tuple(p.shape), generator, torch.float64) * scale).to(p.dtype)
        if kind.grad_transposed and grad.dim() == 2:
            grad = grad.mT.contiguous().mT
        p.grad = grad if step >= kind.late else None
        # (Complex arithmetic differs where an element is infinite.)
        there += [grad] if p.grad is not None and p.numel() and not p.is_complex() else []
    if step in case.bad and there:
        victim = there[step % len(there)]
        victim[tuple(size // 2 for size in victim.shape)] = case.bad[step]


@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_every_combination_equals_the_reference(case: Case) -> None:
    """To the bit without a norm, else to rounding; every instruction set to the bit; gradients are not written."""
    normed = case.lars or case.whole["max_grad_norm"] is not None
    # A complex gradient is divided by the scale to rounding only, and so is the norm that all are clipped by.
    least = 2**-17 if any(kind.dtype == torch.complex64 for _, kinds in case.groups for kind in kinds) else 0.0
    reference, expected, kinds = make(case, fused=False)
    for step in range(3):
        set_case_grads(case, expected, kinds, step)
        reference.step()
    first: list[Tensor] | None = None
    for isa in each_instruction_set():
        mine, params, _ = make(case, fused=True)
        for step in range(3):
            set_case_grads(case, params, kinds, step)
            before = [None if p.grad is None else p.grad.clone() for p in params]
            mine.step()
            for p, grad in zip(params, before, strict=True):
                assert grad is None or same_bits(grad, p.grad), "a gradient was written"
        assert {row.path for row in mine.explain() if "provisional" not in row.reason} == {"kernel"}
        assert mine.skipped_steps == reference.skipped_steps
        results = []
        for index, (p, q) in enumerate(zip(params, expected, strict=True)):
            a, b = {"parameter": p, **kept(mine, p)}, {"parameter": q, **kept(reference, q)}
            if p.is_cuda and len(b) == 1:  # all steps were skipped, which the host did not know: it made state
                a = {"parameter": p}
            assert a.keys() == b.keys(), f"parameter {index}, {isa}"
            for key in a:
                what = f"{key} of parameter {index}, {isa}"
                assert a[key].dtype == b[key].dtype
                if normed or p.is_complex():
                    rtol = max(CLOSE[p.dtype], least)
                    atol = rtol * float(b[key].detach().abs().nan_to_num(0, 0, 0).max()) if p.numel() else 0
                    close = torch.isclose(a[key], b[key], rtol=rtol, atol=atol, equal_nan=True)
                    assert close.all(), what
                else:
                    assert same_bits(a[key], b[key]), what
                results.append(bits(a[key]))
        norm, theirs = mine.grad_norm, reference.grad_norm
        if theirs is not None:
            assert norm is not None
            torch.testing.assert_close(norm, theirs, rtol=1e-6, atol=0, equal_nan=True)
        if first is None:
            first = results
        assert all(torch.equal(a, b) for a, b in zip(results, first, strict=True)), f"{isa} differs from the first set"
