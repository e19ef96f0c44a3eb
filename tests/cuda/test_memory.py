"""Every way in which a kernel reaches memory, small: what compute-sanitizer runs over.

It gives every tensor memory of its own (no caching), so that an access outside shows; hence nothing is captured here.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from fused_sgd import FusedLARS, FusedSGD
from precision_support import MODES
from torch import Tensor

from support import same_bits

pytestmark = pytest.mark.sanitizer
GPU = "cuda:0"
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LENGTHS = [1, 2, 3, 7, 8, 9, 31, 257, 1023, 2049]


def step_on_both(params: list[Tensor], grads: list[Tensor], make: type[FusedSGD] = FusedSGD, **options: Any) -> None:
    """Three steps here and on the CPU, which must give the same bits."""
    twins = [p.cpu().requires_grad_() for p in params]
    params = [p.requires_grad_() for p in params]
    for p, twin, grad in zip(params, twins, grads, strict=True):
        p.grad_dtype = twin.grad_dtype = grad.dtype
        p.grad, twin.grad = grad, grad.cpu()
    optimizers = make(params, fused=True, **options), make(twins, fused=True, **options)
    for optimizer in optimizers:
        torch.manual_seed(0)  # for stochastic rounding
        for _ in range(3):
            optimizer.step()
    torch.cuda.synchronize()
    for index, (p, twin) in enumerate(zip(params, twins, strict=True)):
        assert same_bits(p.detach().cpu(), twin), f"parameter {index}"


@pytest.mark.parametrize(("dtype", "grad_dtype"), list(itertools.product(DTYPES, DTYPES)), ids=str)
def test_every_storage_combination(dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
    params = [torch.randn(length).to(GPU, dtype) for length in LENGTHS]
    grads = [torch.randn(length).to(GPU, grad_dtype) for length in LENGTHS]
    step_on_both(params, grads, lr=0.1, momentum=0.9, weight_decay=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_views_at_every_offset_that_end_with_their_memory(dtype: torch.dtype) -> None:
    params, grads = [], []
    for offset, other in itertools.product(range(0, 9), (0, 1, 3)):
        params.append(torch.randn(offset + 1029).to(GPU, dtype)[offset:])
        grads.append(torch.randn(other + 1029).to(GPU, dtype)[other:])
    step_on_both(params, grads, lr=0.1, momentum=0.9)


@pytest.mark.parametrize("count", [2, 400, 1200])
@pytest.mark.parametrize("dtypes", [DTYPES[:1], DTYPES], ids=["one dtype", "four"])
def test_tables_of_every_size(count: int, dtypes: list[torch.dtype]) -> None:
    """In 8 KB of arguments, in 32 KB of them, in device memory."""
    params = [torch.randn(i % 9 + 1).to(GPU, dtypes[i % len(dtypes)]) for i in range(count)]
    step_on_both(params, [torch.randn_like(p) for p in params], lr=0.1, momentum=0.9)


@pytest.mark.parametrize("options", [{}, {"dampening": 0.5}, {"nesterov": True, "maximize": True}], ids=str)
def test_a_tensor_of_many_chunks(options: dict[str, Any]) -> None:
    params = [torch.randn(40_001).to(GPU), torch.randn(40_001).to(GPU)[1:]]
    grads = [torch.randn_like(p) for p in params]
    step_on_both(params, grads, lr=0.1, momentum=0.9, weight_decay=0.01, **options)


def test_no_momentum() -> None:
    params = [torch.randn(length).to(GPU) for length in LENGTHS]
    step_on_both(params, [torch.randn_like(p) for p in params], lr=0.1)


@pytest.mark.parametrize("dtypes", [DTYPES[:1], DTYPES[2:3], DTYPES], ids=["float32", "bfloat16", "four"])
@pytest.mark.parametrize("lars", [False, True], ids=["clipped", "LARS"])
def test_norms(dtypes: list[torch.dtype], lars: bool) -> None:
    """Of rows of one chunk, of a few and of many, which other blocks add up."""
    lengths = [3, 4099, 20_011, 70_001, *[5] * 300]
    params = [torch.randn(length).to(GPU, dtypes[i % len(dtypes)]) for i, length in enumerate(lengths)]
    grads = [torch.randn_like(p) for p in params]
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "ema_decay": 0.5}
    make = FusedLARS if lars else FusedSGD
    step_on_both(params, grads, make, max_grad_norm=1.0, skip_nonfinite=True, **options)


@pytest.mark.parametrize("mode", MODES)
def test_storage_modes(mode: str) -> None:
    dtype, options = MODES[mode]
    params = [torch.randn(shape).to(GPU, dtype) for shape in ((129, 65), (70, 128), (20_011,), (7,))]
    step_on_both(params, [torch.randn_like(p) for p in params], lr=0.1, momentum=0.9, weight_decay=0.01, **options)


def test_tensors_that_only_the_device_knows() -> None:
    p = torch.zeros(1029, device=GPU).requires_grad_()
    p.grad = torch.full_like(p, 4)
    lr, decay = torch.tensor(0.5, device=GPU), torch.tensor(0.0, device=GPU, dtype=torch.float64)
    optimizer = FusedSGD([p], lr=lr, weight_decay=decay, momentum=0.5, fused=True)
    optimizer.grad_scale = torch.tensor(4.0, device=GPU)
    for found_inf, expected in ((1.0, 0.0), (0.0, -0.5), (2.0, -0.5)):
        optimizer.found_inf = torch.tensor(found_inf, device=GPU)
        optimizer.step()
        assert (p == expected).all()
