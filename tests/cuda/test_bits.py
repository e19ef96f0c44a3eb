"""The same bits as torch.optim.SGD on the GPU, loop and foreach, and as the walk on the CPU."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from fused_sgd import FusedLARS, FusedSGD
from torch import Tensor

from support import assert_same, copies, make_params, same_bits, set_grads

GPU = "cuda:0"
# Around packs, blocks and chunks, and enough of the last one for chunks of 64 KiB on every GPU.
SHAPES = [(1,), (7,), (2048,), (4097,), (129, 1031), (0,), (), (40_000_003,)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"momentum": 0.9, "weight_decay": 0.01},
    {"momentum": 0.9, "weight_decay": 0.01, "nesterov": True},
    {"momentum": 0.9, "dampening": 0.3, "maximize": True},
]
by_options = pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")


def on_gpu(params: list[Tensor]) -> list[Tensor]:
    return [p.detach().to(GPU, copy=True).requires_grad_() for p in params]


def assert_equal_across(a: FusedSGD, b: FusedSGD, step: int) -> None:
    """Parameters and momentum buffers of two optimizers on different devices."""
    pairs = zip(a.param_groups[0]["params"], b.param_groups[0]["params"], strict=True)
    for index, (p, q) in enumerate(pairs):
        assert same_bits(p.cpu(), q.cpu()), f"parameter {index} at step {step}"
        if a.defaults["momentum"]:
            ours, theirs = (o.state[t]["momentum_buffer"].cpu() for o, t in ((a, p), (b, q)))
            assert same_bits(ours, theirs), f"momentum buffer {index} at step {step}"


@by_options
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_equal_to_torch(dtype: torch.dtype, foreach: bool, options: dict[str, Any]) -> None:
    params = on_gpu(make_params(SHAPES, dtype))
    expected = copies(params)
    mine = FusedSGD(params, lr=0.1, fused=True, **options)
    theirs = torch.optim.SGD(expected, lr=0.1, foreach=foreach, **options)
    for step in range(4):
        set_grads(params, expected, seed=step)
        mine.step()
        theirs.step()
        assert_same(mine, theirs, params, expected, f"at step {step}")


@by_options
@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_to_the_cpu(dtype: torch.dtype, options: dict[str, Any]) -> None:
    on_cpu = make_params(SHAPES[:-1], dtype)
    params = on_gpu(on_cpu)
    optimizers = [FusedSGD(tensors, lr=0.1, fused=True, **options) for tensors in (params, on_cpu)]
    for step in range(4):
        set_grads(params, on_cpu, seed=step)
        for optimizer in optimizers:
            optimizer.step()
        assert_equal_across(*optimizers, step)


@pytest.mark.parametrize(("dtype", "grad_dtype"), list(itertools.product(DTYPES, DTYPES)), ids=str)
def test_every_storage_combination_equals_the_cpu(dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
    on_cpu = make_params([(1,), (257,), (20_011,)], dtype)
    params = on_gpu(on_cpu)
    optimizers = [
        FusedSGD(tensors, lr=0.1, momentum=0.9, weight_decay=0.01, fused=True) for tensors in (params, on_cpu)
    ]
    for p in (*params, *on_cpu):
        p.grad_dtype = grad_dtype
    for step in range(3):
        for p, q in zip(params, on_cpu, strict=True):
            q.grad = torch.randn(q.shape, dtype=torch.float64).to(grad_dtype)
            p.grad = q.grad.to(GPU)
        for optimizer in optimizers:
            optimizer.step()
        assert_equal_across(*optimizers, step)


@pytest.mark.parametrize("scale", [3.0, 65536.0])
def test_dividing_by_a_scale_equals_the_cpu(scale: float) -> None:
    """A division is correctly rounded, on either."""
    on_cpu = make_params([(4097,)])
    params = on_gpu(on_cpu)
    optimizers = [FusedSGD(tensors, lr=0.1, momentum=0.9, fused=True) for tensors in (params, on_cpu)]
    set_grads(params, on_cpu, seed=0)
    optimizers[0].grad_scale = torch.tensor(scale, device=GPU)
    optimizers[1].grad_scale = scale
    for optimizer in optimizers:
        optimizer.step()
    assert_equal_across(*optimizers, 0)


def test_special_values_and_subnormals() -> None:
    """Nothing is flushed to zero, and signs of zeros and infinities are kept."""
    special = [0.0, -0.0, 1e-45, -1e-45, 1e-38, 3.4e38, torch.inf, -torch.inf, torch.nan, 1.0]
    p = torch.tensor(special).repeat_interleave(len(special))
    grad = torch.tensor(special).repeat(len(special))
    for options in OPTIONS:
        on_cpu, params = [p.clone().requires_grad_()], [p.to(GPU).requires_grad_()]
        optimizers = [FusedSGD(tensors, lr=1e-3, fused=True, **options) for tensors in (params, on_cpu)]
        for step in range(3):
            on_cpu[0].grad, params[0].grad = grad.clone(), grad.to(GPU)
            for optimizer in optimizers:
                optimizer.step()
            assert_equal_across(*optimizers, step)


@pytest.mark.parametrize("lars", [False, True], ids=["clipped", "LARS"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_equal_the_cpu(dtype: torch.dtype, lars: bool) -> None:
    """Of more chunks in a row than lanes, and of more rows than those; the sums are the CPU's to the bit."""
    on_cpu = make_params([(1_200_007,), (20_000,), *[(3,)] * 600], dtype)
    params = on_gpu(on_cpu)
    make = FusedLARS if lars else FusedSGD
    optimizers = [
        make(tensors, lr=0.1, momentum=0.9, weight_decay=0.01, max_grad_norm=1.0, fused=True)
        for tensors in (params, on_cpu)
    ]
    for step in range(3):
        set_grads(params, on_cpu, seed=step)
        for optimizer in optimizers:
            optimizer.step()
        norm, expected = optimizers[0].grad_norm, optimizers[1].grad_norm
        assert norm is not None
        assert expected is not None
        assert same_bits(norm.cpu(), expected)
        assert_equal_across(*optimizers, step)


def test_scales_of_int8_momentum_equal_the_cpu() -> None:
    """Where quotients and inverses are hardest to round: mantissas near a power of two, all exponents, and others."""
    generator = torch.Generator().manual_seed(0)
    near = torch.arange(4096)
    mantissas = torch.cat([near, 2**23 - 1 - near, torch.randint(2**23, (1 << 16,), generator=generator)])
    exponents = torch.randint(1, 255, mantissas.shape, generator=generator)
    exponents[0], mantissas[0] = 254, 2**23 - 1  # the largest number
    largest = (exponents << 23 | mantissas).to(torch.int32).view(torch.float32)
    shape = (len(largest), 64)
    on_cpu = [torch.zeros(shape).requires_grad_()]
    params = on_gpu(on_cpu)
    steppers = [FusedSGD(p, lr=1e-3, momentum=0.9, momentum_dtype=torch.int8, fused=True) for p in (on_cpu, params)]
    for step in range(2):
        grad = (torch.rand(shape, generator=generator) - 0.5) * largest[:, None]
        grad[:, step] = -largest
        on_cpu[0].grad, params[0].grad = grad, grad.to(GPU)
        for stepper in steppers:
            stepper.step()
        ours, theirs = (stepper.state[p[0]] for stepper, p in zip(steppers, (params, on_cpu), strict=True))
        assert same_bits(params[0].cpu(), on_cpu[0]), f"parameters at step {step}"
        for key in ("momentum_codes", "momentum_scale"):
            assert same_bits(ours[key].cpu(), theirs[key]), f"{key} at step {step}"
