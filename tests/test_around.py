"""What surrounds a step, folded into it: any combination of options, against the reference and what it replaces."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from fused_sgd import FusedLARS, FusedSGD
from fused_sgd._native import C
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from support import assert_same, bits, copies, make_params, same_bits, seeded, set_grads

pytestmark = pytest.mark.usefixtures("device")

SHAPES = [(1,), (7,), (4097,), (3, 5), (0,), (), (129, 65), (3, 64), (2, 3, 64), (67, 128)]
# Of float32's eight roundings, or the one that a 16-bit format may make otherwise after a norm's last bit.
CLOSE = {
    torch.float64: 2**-44,
    torch.complex128: 2**-44,
    torch.float32: 2**-17,
    torch.complex64: 2**-17,
    torch.bfloat16: 2**-6,
    torch.float16: 2**-9,
}


def each_instruction_set() -> Iterator[str]:
    """Selects one after the other; the one from before at the end. (A GPU does not care.)"""
    assert C is not None
    before = C.instruction_set()
    on_cpu = torch.get_default_device().type == "cpu"
    try:
        for name, runs_here, _ in C.instruction_sets():
            if runs_here if on_cpu else name == before:
                C.select_instruction_set(name)
                yield name
    finally:
        C.select_instruction_set(before)


def grads_of(params: list[Tensor]) -> list[Tensor]:
    grads = [p.grad for p in params]
    assert all(grad is not None for grad in grads)
    return [grad for grad in grads if grad is not None]


def kept(optimizer: torch.optim.Optimizer, param: Tensor) -> dict[str, Tensor]:
    return {key: value for key, value in optimizer.state.get(param, {}).items() if value is not None}


# --- Every combination of options, against the reference --------------------------------------------------------------


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
