"""Equality to the bit with torch.optim.SGD in float32 and float64; one rounding in bfloat16 and float16."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from fused_sgd import FusedSGD
from fused_sgd.reference import sgd_update
from hypothesis import given, settings
from hypothesis import strategies as st

from support import assert_same, copies, float64_step, make_params, same_bits, seeded, set_grads

pytestmark = pytest.mark.usefixtures("device")

SHAPES = [(1,), (7,), (32,), (1024,), (4097,), (3, 5), (0,), ()]

OPTIONS = [
    {"momentum": momentum, "nesterov": nesterov, "dampening": dampening, "weight_decay": decay, "maximize": maximize}
    for momentum, nesterov, dampening, decay, maximize in itertools.product(
        (0, 0.9), (False, True), (0, 0.3), (0, 0.01), (False, True)
    )
    if not nesterov or (momentum and not dampening)
]


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("lr", [0.1, 1e-3])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(f"{k}={v}" for k, v in options.items() if v))
def test_equal_to_the_bit(fma_isa: str, options: dict[str, Any], lr: float, dtype: torch.dtype, foreach: bool) -> None:
    """8 shapes x 20 options x 2 learning rates x 2 dtypes x 2 peers, each for 4 steps, on every set with FMA."""
    params = make_params(SHAPES, dtype)
    expected = copies(params)
    mine = FusedSGD(params, lr=lr, fused=True, **options)
    theirs = torch.optim.SGD(expected, lr=lr, foreach=foreach, **options)
    for step in range(4):
        set_grads(params, expected, seed=step)
        mine.step()
        theirs.step()
        assert_same(mine, theirs, params, expected, f"at step {step}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(f"{k}={v}" for k, v in options.items() if v))
def test_portable_and_reference_are_equal_to_the_bit(isa: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    params = make_params(SHAPES, dtype)
    expected = copies(params)
    mine = FusedSGD(params, lr=0.1, fused=True, **options)
    reference = FusedSGD(expected, lr=0.1, fused=False, **options)
    for step in range(3):
        set_grads(params, expected, seed=step)
        mine.step()
        reference.step()
        assert_same(mine, reference, params, expected, f"at step {step}")


SPECIAL = [0.0, -0.0, 1.0, -1.0, 1e-45, 1e-38, 3.4e38, float("inf"), -float("inf"), float("nan"), 65504.0, 1e-8]
VALUES = st.one_of(st.sampled_from(SPECIAL), st.floats(width=32))
HYPER = st.floats(0, 10, allow_nan=False)


@settings(max_examples=300, deadline=None)
@given(
    p=st.lists(VALUES, min_size=1, max_size=40),
    grads=st.lists(VALUES, min_size=3, max_size=12),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    lr=HYPER,
    momentum=st.one_of(st.just(0.0), HYPER),
    dampening=st.floats(-3, 3),
    weight_decay=st.one_of(st.just(0.0), st.just(1e-60), HYPER),
    nesterov=st.booleans(),
    maximize=st.booleans(),
    foreach=st.booleans(),
)
def test_any_values_and_hyperparameters(
    p: list[float],
    grads: list[float],
    dtype: torch.dtype,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    foreach: bool,
) -> None:
    nesterov = nesterov and momentum > 0
    options: dict[str, Any] = {
        "lr": lr,
        "momentum": momentum,
        "dampening": 0 if nesterov else dampening,
        "weight_decay": weight_decay,
        "nesterov": nesterov,
        "maximize": maximize,
    }
    mine_p = torch.tensor(p, dtype=dtype).requires_grad_()
    theirs_p = mine_p.detach().clone().requires_grad_()
    mine = FusedSGD([mine_p], fused=True, **options)
    theirs = torch.optim.SGD([theirs_p], foreach=foreach, **options)
    for step in range(3):
        values = (grads[step:] + grads[:step]) * len(p)
        for q in (mine_p, theirs_p):
            q.grad = torch.tensor(values[: len(p)], dtype=dtype)
        mine.step()
        theirs.step()
        assert_same(mine, theirs, [mine_p], [theirs_p], f"{options} at step {step}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(f"{k}={v}" for k, v in options.items() if v))
def test_16_bit_within_one_rounding_of_float64(isa: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    params = make_params(SHAPES, dtype)
    optimizer = FusedSGD(params, lr=0.1, fused=True, **options)
    epsilon = torch.finfo(dtype).eps / 2
    for step in range(4):
        set_grads(params, seed=step)
        before = [(p.detach().clone(), p.grad, _buffer(optimizer, p)) for p in params]
        optimizer.step()
        for p, (old, grad, buffer) in zip(params, before, strict=True):
            model, model_buffer, size = float64_step(old, grad, buffer, lr=0.1, **options)
            for got, want in ((p.detach(), model), (_buffer(optimizer, p), model_buffer)):
                if want is not None and want.numel():
                    # half a step of the storage format, and what float32 loses on the way
                    allowed = epsilon * want.abs() + 2**-21 * size + torch.finfo(dtype).smallest_normal * epsilon
                    assert ((got.double() - want).abs() <= allowed).all(), f"step {step}"


def _buffer(optimizer: FusedSGD, p: torch.Tensor) -> torch.Tensor | None:
    buffer = optimizer.state.get(p, {}).get("momentum_buffer")
    return None if buffer is None else buffer.clone()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", OPTIONS[::3], ids=str)
def test_16_bit_kernel_equals_reference_to_the_bit(isa: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    params = make_params(SHAPES, dtype)
    expected = copies(params)
    mine = FusedSGD(params, lr=0.1, fused=True, **options)
    reference = FusedSGD(expected, lr=0.1, fused=False, **options)
    for step in range(3):
        set_grads(params, expected, seed=step)
        mine.step()
        reference.step()
        assert_same(mine, reference, params, expected, f"at step {step}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_gradient_of_another_dtype(isa: str, dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
    """torch's fused path refuses `p.grad_dtype` other than the parameter's (TypeError in 2.15)."""
    params = make_params([(4097,)], dtype)
    expected = copies(params)
    mine = FusedSGD(params, lr=0.1, momentum=0.9, weight_decay=0.01, fused=True)
    reference = FusedSGD(expected, lr=0.1, momentum=0.9, weight_decay=0.01, fused=False)
    for step in range(3):
        grad = seeded((4097,), step, torch.float64).to(grad_dtype)
        for p in (params[0], expected[0]):
            p.grad_dtype = grad_dtype
            p.grad = grad.clone()
        mine.step()
        reference.step()
        assert_same(mine, reference, params, expected, f"at step {step}")


@pytest.mark.cpu_only
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_results_do_not_depend_on_threads(threads: int) -> None:
    shapes = [(100_003,), (1,), (70, 1000), (5,), (0,), (50_001,)]
    params = make_params(shapes)
    expected = copies(params)
    mine = FusedSGD(params, lr=0.1, momentum=0.9, fused=True)
    theirs = torch.optim.SGD(expected, lr=0.1, momentum=0.9, foreach=False)
    torch.set_num_threads(threads)
    for step in range(2):
        set_grads(params, expected, seed=step)
        mine.step()
        theirs.step()
    assert_same(mine, theirs, params, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", range(41))
def test_misaligned_views_leave_their_neighbours_alone(isa: str, offset: int, dtype: torch.dtype) -> None:
    length, sentinel = 173, 42.0
    storages = [torch.full((300,), sentinel, dtype=dtype) for _ in range(2)]
    storages[0][offset : offset + length] = torch.randn(length)
    p = storages[0][offset : offset + length].requires_grad_()
    storages[1][40 - offset : 40 - offset + length] = torch.randn(length)
    p.grad = storages[1][40 - offset : 40 - offset + length]
    expected = p.detach().clone()
    sgd_update(expected, p.grad, None, lr=0.1)
    FusedSGD([p], lr=0.1, fused=True).step()
    assert same_bits(p, expected)
    assert (storages[0][:offset] == sentinel).all()
    assert (storages[0][offset + length :] == sentinel).all()


def test_many_tensors_of_every_dtype_in_one_table() -> None:
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.float16]
    params = [p for i in range(40) for p in make_params([(i * 37 % 2000 + 1,)], dtypes[i % 4], seed=i)]
    groups = [{"params": [p], "lr": 0.1 / (i % 5 + 1), "momentum": 0.9 * (i % 3)} for i, p in enumerate(params)]
    expected = copies(params)
    mine = FusedSGD(groups, fused=True)
    reference = FusedSGD([{**g, "params": [q]} for g, q in zip(groups, expected, strict=True)], fused=False)
    for step in range(3):
        set_grads(params, expected, seed=step)
        mine.step()
        reference.step()
    assert_same(mine, reference, params, expected)


def test_more_than_2_to_the_31_elements(device: str) -> None:
    """Apex truncates sizes to int. 8.6 GB: bfloat16, no momentum, and only the ends are looked at."""
    if device != "cpu" and torch.cuda.mem_get_info()[0] < 10e9:
        pytest.skip("the GPU has less than 10 GB free")
    length = 2**31 + 4099
    p = torch.zeros(length, dtype=torch.bfloat16).requires_grad_()
    p.grad = torch.ones(length, dtype=torch.bfloat16)
    FusedSGD([p], lr=0.5, fused=True).step()
    with torch.no_grad():
        for at in (0, 2**31 - 1, 2**31, length - 1):
            assert p[at].item() == -0.5
        assert p[-4096:].sum().item() == -2048
