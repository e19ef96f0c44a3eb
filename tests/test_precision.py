"""Precision options against independent models: torch's own SGD in float32, rounded in between where a mode rounds."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fused_sgd import FusedSGD
from precision_support import EACH_MODE, FUSED, MASTERS, MODES, SHAPES, Model, rounded, rounded_split
from torch import Tensor

from support import copies, make_params, same_bits, seeded, set_grads

pytestmark = pytest.mark.usefixtures("device")

OPTIONS: list[dict[str, Any]] = [
    {},
    {"momentum": 0.9, "weight_decay": 0.01},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    {"momentum": 0.5, "dampening": 0.3, "maximize": True},
]
BLOCK = 64


def test_the_model_of_rounding_differs_from_torchs_in_ties_alone() -> None:
    x = torch.cat([seeded((100_000,), 0), torch.arange(-512, 512) / 512 + 1, torch.zeros(1)])
    differs = rounded_split(x) != x.bfloat16()
    assert differs.any()
    assert ((x.view(torch.int32)[differs] & 0xFFFF) == 0x8000).all()


def is_wide(p: Tensor) -> bool:
    """Whether a momentum in 8 bits is kept wide."""
    row = p.shape[1:].numel()
    return p.dim() < 2 or row % BLOCK != 0 or row == 0 or not p.is_contiguous()


def decoded(optimizer: FusedSGD, p: Tensor) -> Tensor:
    """A momentum in 8 bits as numbers."""
    inner = optimizer.state[p]
    codes, scale = inner["momentum_codes"], inner["momentum_scale"]
    assert (codes.dtype, scale.dtype) == (torch.int8, torch.float32)
    assert scale.numel() * BLOCK == codes.numel()
    return (codes.view(-1, BLOCK).float() * scale.view(-1, 1)).view(p.shape)


# --- Master weights ---------------------------------------------------------------------------------------------------


@FUSED
@pytest.mark.parametrize(("masters", "dtype"), MASTERS, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_masters_train_as_float32(options: dict[str, Any], masters: Any, dtype: torch.dtype, fused: bool) -> None:
    params = make_params(SHAPES, dtype)
    model = Model(params, lr=0.1, **options)
    mine = FusedSGD(params, lr=0.1, master_weights=masters, fused=fused, **options)
    for step in range(5):
        set_grads(params, seed=step)
        mine.step()
        model.step(params)
        for index, (p, q) in enumerate(zip(params, model.wide, strict=True)):
            expected = rounded(q, dtype)
            assert same_bits(p, expected), f"parameter {index} at step {step}"
            inner = mine.state[p]
            if masters == "split":
                assert inner["remainder"].dtype == torch.int16
                assert inner["remainder"].equal((q.detach().view(torch.int32) & 0xFFFF).to(torch.int16))
            else:
                assert same_bits(inner["master"], q)
            if options.get("momentum"):
                assert same_bits(inner["momentum_buffer"], model.buffer(index))
    beside = "remainder" if masters == "split" else "master"
    assert set(inner) == {beside, *(["momentum_buffer"] if options.get("momentum") else [])}


@FUSED
@pytest.mark.parametrize(("masters", "dtype"), MASTERS, ids=str)
def test_masters_in_other_strides(masters: Any, dtype: torch.dtype, fused: bool) -> None:
    """channels_last, transposed, and views into a larger tensor, whose other elements stay."""
    whole = seeded((6, 40), 1).to(dtype)
    before = whole.clone()
    params = [
        make_params([(4, 8, 3, 3)], dtype)[0].detach().to(memory_format=torch.channels_last).requires_grad_(),
        make_params([(64, 5)], dtype)[0].detach().t().contiguous().t().requires_grad_(),
        whole[1:5, ::2].requires_grad_(),
    ]
    model = Model(params, lr=0.1, **OPTIONS[2])
    mine = FusedSGD(params, lr=0.1, master_weights=masters, fused=fused, **OPTIONS[2])
    for step in range(3):
        set_grads(params, seed=step)
        mine.step()
        model.step(params)
        for p, q in zip(params, model.wide, strict=True):
            assert same_bits(p, rounded(q, dtype))
    outside = torch.ones_like(whole, dtype=torch.bool)
    outside[1:5, ::2] = False
    assert whole[outside].equal(before[outside])


@FUSED
def test_masters_leave_wide_parameters_alone(fused: bool) -> None:
    """A mixed model: only narrow parameters have masters."""
    wide, narrow = make_params([(5, 64)]), make_params([(5, 64)], torch.bfloat16)
    double = make_params([(5,)], torch.float64)
    params = [*wide, *narrow, *double]
    expected = [*copies(wide), *copies(double)]
    mine = FusedSGD(params, lr=0.1, momentum=0.9, master_weights="split", fused=fused)
    theirs = torch.optim.SGD(expected, lr=0.1, momentum=0.9, foreach=False)
    for step in range(3):
        set_grads(params, seed=step)
        for p, q in zip([*wide, *double], expected, strict=True):
            q.grad = p.grad
        mine.step()
        theirs.step()
    assert same_bits(wide[0], expected[0])
    assert same_bits(double[0], expected[1])
    assert set(mine.state[wide[0]]) == set(mine.state[double[0]]) == {"momentum_buffer"}


@FUSED
@pytest.mark.parametrize("extreme", [3e38, 1e-40, float("inf"), float("nan")])
@pytest.mark.parametrize("masters", ["split", "float32"])
def test_extreme_gradients_do_what_they_do_in_float32(masters: str, extreme: float, fused: bool) -> None:
    params = make_params([(3, 64)], torch.bfloat16)
    model = Model(params, lr=0.1, momentum=0.9)
    mine = FusedSGD(params, lr=0.1, momentum=0.9, master_weights=masters, fused=fused)
    for step in range(3):
        set_grads(params, seed=step)
        params[0].grad[1, :5] = extreme
        mine.step()
        model.step(params)
        finite = model.wide[0].isfinite()
        assert same_bits(params[0][finite], rounded_split(model.wide[0][finite]))
        assert same_bits(params[0][~finite].float(), model.wide[0][~finite])
        assert same_bits(mine.state[params[0]]["momentum_buffer"], model.buffer(0))


@EACH_MODE
def test_special_values_somewhere_equal_the_reference(mode: str) -> None:
    # Loops over many elements may look for them at once: one in a batch must not be missed, nor change its neighbours.
    dtype, options = MODES[mode]
    special = torch.tensor([math.nan, math.inf, -math.inf, 3.4e38, -3.4e38, 1e-40, -0.0, 0.0])

    def scatter(tensor: Tensor, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for row in tensor.detach()[::2]:
            where, which = (
                int(torch.randint(n, (), generator=generator, device="cpu")) for n in (len(row), len(special))
            )
            row[where] = special[which].to(dtype)

    trained = []
    for fused in (True, False):
        torch.manual_seed(0)
        params = make_params([(64, 64), (8, 448), (300, 3)], dtype)
        optimizer = FusedSGD(params, lr=0.1, momentum=0.9, weight_decay=0.01, fused=fused, **options)
        for step in range(4):
            set_grads(params, seed=step)
            for index, p in enumerate(params):
                scatter(p.grad if step % 2 else p, seed=10 * step + index)  # a parameter is written by someone else
            optimizer.step()
        trained.append((params, optimizer))
    (params, mine), (others, reference) = trained
    for p, q in zip(params, others, strict=True):
        assert_same_numbers(p, q)
        for key, kept in mine.state[p].items():
            other = reference.state[q][key]
            if key == "remainder":  # where the parameter is NaN, its payload
                kept, other = (torch.where(p.isnan(), 0, tensor) for tensor in (kept, other))
            assert_same_numbers(kept, other)


def assert_same_numbers(a: Tensor, b: Tensor) -> None:
    """Equal to the bit, but for the bits of NaN."""
    assert a.isnan().equal(b.isnan())
    assert same_bits(a.nan_to_num(0.0, math.inf, -math.inf), b.nan_to_num(0.0, math.inf, -math.inf))


# --- Momentum in another dtype ----------------------------------------------------------------------------------------


@FUSED
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", OPTIONS[1:], ids=str)
def test_narrow_momentum_is_rounded_after_each_step(options: dict[str, Any], dtype: torch.dtype, fused: bool) -> None:
    params = make_params(SHAPES)
    model = Model(params, buffers=dtype, lr=0.1, **options)
    mine = FusedSGD(params, lr=0.1, momentum_dtype=dtype, fused=fused, **options)
    for step in range(4):
        set_grads(params, seed=step)
        mine.step()
        model.step(params)
        for index, (p, q) in enumerate(zip(params, model.wide, strict=True)):
            assert same_bits(p, q), f"parameter {index} at step {step}"
            assert same_bits(mine.state[p]["momentum_buffer"], model.buffer(index).to(dtype))


@FUSED
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("momentum_dtype", [None, torch.float32], ids=str)
@pytest.mark.parametrize("options", OPTIONS[1:], ids=str)
def test_momentum_of_narrow_parameters(
    options: dict[str, Any], momentum_dtype: torch.dtype | None, dtype: torch.dtype, fused: bool
) -> None:
    """Without masters the weights are rounded to nearest even at each step; the momentum as it is asked for."""
    params = make_params(SHAPES, dtype)
    model = Model(params, narrow=lambda x: x.to(dtype), buffers=momentum_dtype or dtype, lr=0.1, **options)
    mine = FusedSGD(params, lr=0.1, momentum_dtype=momentum_dtype, fused=fused, **options)
    for step in range(4):
        set_grads(params, seed=step)
        mine.step()
        model.step(params)
        for index, (p, q) in enumerate(zip(params, model.wide, strict=True)):
            assert same_bits(p, q.to(dtype)), f"parameter {index} at step {step}"
            assert same_bits(mine.state[p]["momentum_buffer"], model.buffer(index).to(momentum_dtype or dtype))


@FUSED
def test_masters_with_narrow_momentum(fused: bool) -> None:
    params = make_params(SHAPES, torch.bfloat16)
    model = Model(params, buffers=torch.bfloat16, lr=0.1, **OPTIONS[2])
    mine = FusedSGD(params, lr=0.1, master_weights="split", momentum_dtype=torch.bfloat16, fused=fused, **OPTIONS[2])
    for step in range(4):
        set_grads(params, seed=step)
        mine.step()
        model.step(params)
    for p, q in zip(params, model.wide, strict=True):
        assert same_bits(p, rounded_split(q))


# Parameters' dtype, further options, and what a step's weights become.
INT8: list[tuple[torch.dtype, dict[str, Any], Callable[[Tensor], Tensor]]] = [
    (torch.float32, {}, lambda x: x),
    (torch.bfloat16, {}, lambda x: x.bfloat16()),
    (torch.float16, {}, lambda x: x.half()),
    (torch.bfloat16, {"master_weights": "split"}, rounded_split),
    (torch.float16, {"master_weights": "float32"}, lambda x: x.half()),
]


@FUSED
@pytest.mark.parametrize(("dtype", "more", "narrow"), INT8, ids=["fp32", "bf16", "fp16", "split", "fp16-master"])
@pytest.mark.parametrize("options", OPTIONS[1:], ids=str)
def test_int8_is_float32_within_half_a_scale_a_step(
    options: dict[str, Any], dtype: torch.dtype, more: dict[str, Any], narrow: Any, fused: bool
) -> None:
    """Each step starts from the codes; weights are to the bit what torch makes of them, codes within the bound."""
    params = make_params(SHAPES, dtype)
    has_master = bool(more)
    wide_dtype = torch.float32 if has_master else dtype
    model = Model(params, narrow=None if has_master else narrow, lr=0.1, **options)
    mine = FusedSGD(params, lr=0.1, momentum_dtype=torch.int8, fused=fused, **options, **more)
    for step in range(4):
        set_grads(params, seed=step)
        if not options.get("weight_decay"):
            params[1].grad[1] = 0
        mine.step()
        model.step(params)
        for index, (p, q) in enumerate(zip(params, model.wide, strict=True)):
            assert same_bits(p, narrow(q.detach())), f"parameter {index} at step {step}"
            buffer = model.buffer(index)
            if is_wide(p):
                assert same_bits(mine.state[p]["momentum_buffer"], buffer.to(wide_dtype))
                buffer.copy_(buffer.to(wide_dtype))
                continue
            now, scale = decoded(mine, p), mine.state[p]["momentum_scale"].view(-1, 1)
            error = (now.double() - buffer.double()).abs().view(-1, BLOCK)
            assert (error <= scale.double() * (0.5 + 2**-15)).all()
            largest = buffer.view(-1, BLOCK).abs().amax(1, keepdim=True) if p.numel() else scale
            assert (scale <= largest / 127 * (1 + 2**-22) + 2**-126).all()
            buffer.copy_(now)
    if not options.get("weight_decay"):
        assert (decoded(mine, params[1])[1] == 0).all()


@FUSED
def test_int8_blocks_stay_in_rows(fused: bool) -> None:
    """A tensor's halves along dimension 0 have the codes that the whole has: it may be sharded at any row."""
    whole = make_params([(7, 3, 64), (5, 128)])
    parts = [piece.clone().requires_grad_() for p in copies(whole) for piece in p.detach().split(3)]
    optimizers = [
        FusedSGD(them, lr=0.1, momentum=0.9, momentum_dtype=torch.int8, fused=fused) for them in (whole, parts)
    ]
    for step in range(3):
        set_grads(whole, seed=step)
        for part, grad in zip(parts, [piece for p in whole for piece in p.grad.split(3)], strict=True):
            part.grad = grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    a, b = optimizers
    rest = iter(parts)
    for p in whole:
        mine = [next(rest) for _ in p.split(3)]
        assert same_bits(p, torch.cat(mine))
        for key in ("momentum_codes", "momentum_scale"):
            assert same_bits(a.state[p][key], torch.cat([b.state[piece][key] for piece in mine]))


@FUSED
def test_what_stays_wide_beside_int8_and_says_so(fused: bool) -> None:
    model = torch.nn.ModuleDict(
        {
            "linear": torch.nn.Linear(64, 3),
            "odd": torch.nn.Linear(65, 3),
            "conv": torch.nn.Conv2d(64, 4, 3).to(memory_format=torch.channels_last),
        }
    )
    odd, double = model["odd"].weight, torch.nn.Parameter(torch.ones(2, 64, dtype=torch.float64))
    params = [*model.named_parameters(), ("double", double)]
    mine = FusedSGD(params, lr=0.1, momentum=0.9, momentum_dtype=torch.int8, fused=fused)
    expected = copies([p for _, p in params])
    theirs = torch.optim.SGD(expected, lr=0.1, momentum=0.9, foreach=False)
    for step in range(3):
        set_grads([p for _, p in params], expected, seed=step)
        mine.step()
        theirs.step()
    coded = {name for name, p in params if "momentum_codes" in mine.state[p]}
    assert coded == {"linear.weight"}
    for (name, p), q in zip(params, expected, strict=True):
        if name not in coded:
            assert same_bits(p, q), name
            assert same_bits(mine.state[p]["momentum_buffer"], theirs.state[q]["momentum_buffer"]), name
    assert mine.state[odd].keys() == {"momentum_buffer"}
    if fused:
        reasons = {name: row.reason for row in mine.explain() for name in row.names}
        assert "whole blocks of 64" in reasons["odd.weight"]
        assert "whole blocks of 64" in reasons["linear.bias"]
        assert "not contiguous" in reasons["conv.weight"]
        assert "torch.float64" in reasons["double"]
        assert not reasons["linear.weight"]
        assert "momentum int8" in str(mine.explain())
