"""What the reference keeps: averages, as torch keeps them, and the mark of what has accumulated nothing."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from fused_sgd.reference import (
    fill_unset,
    is_unset,
    sgd_update,
    unset,
)
from reference_support import FLOATS, OPTIONS, SHAPES, option_id, step_all
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from support import bits, copies, make_params, same_bits, set_grads

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
