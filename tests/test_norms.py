"""The global norm, clipping by it, and steps that are skipped because a gradient is not finite."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from fused_sgd import FusedSGD
from fused_sgd.reference import is_unset
from torch import Tensor

from support import copies, float64_step, make_params, same_bits, seeded, set_grads, snapshot

pytestmark = pytest.mark.usefixtures("device")

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
WAYS = [{"fused": True}, {"fused": False}]
BAD = [math.inf, -math.inf, math.nan]


def norm_of(optimizer: FusedSGD) -> Tensor:
    assert optimizer.grad_norm is not None
    return optimizer.grad_norm


@pytest.mark.cpu_only
def test_norm_of_ten_million_elements_is_exact_and_deterministic() -> None:
    """A sum in float32 would have stopped growing; values over ten orders of magnitude, in any split over threads."""
    size = 10_000_000
    generator = torch.Generator().manual_seed(3)
    p = torch.zeros(size).requires_grad_()
    p.grad = torch.randn(size, generator=generator) * 10 ** torch.empty(size).uniform_(-5, 5, generator=generator)
    exact = math.sqrt(math.fsum(p.grad[:].double().square().sort().values.reshape(1000, -1).sum(1).tolist()))
    norms = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        optimizer = FusedSGD([p], lr=0.0, max_grad_norm=1.0, fused=True)
        optimizer.step()
        norms.append(norm_of(optimizer))
    assert norms[0].item() == pytest.approx(exact, rel=1e-14)
    assert same_bits(norms[0], norms[1])
    assert same_bits(norms[0], norms[2])


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_norm_covers_groups_and_dtypes_after_unscaling(way: dict[str, Any]) -> None:
    params = [p for index, dtype in enumerate(FLOATS) for p in make_params([(4097,), (3,)], dtype, seed=index)]
    optimizer = FusedSGD([{"params": [p]} for p in params], lr=0.1, max_grad_norm=1.0, **way)
    set_grads(params, seed=0)
    optimizer.grad_scale = 4.0
    params[1].grad = None
    optimizer.step()
    vector = torch.cat([p.grad.double() / 4 for p in params if p.grad is not None])
    norm = norm_of(optimizer)
    assert norm.dtype == torch.float64
    assert norm.shape == ()
    torch.testing.assert_close(norm, vector.norm(), rtol=1e-13, atol=0)
    norm.fill_(7)  # it is a fresh tensor
    assert norm_of(optimizer) != 7


def test_no_norm_is_computed_that_nobody_needs() -> None:
    params = make_params([(5,)])
    optimizer = FusedSGD(params, lr=0.1)
    assert optimizer.grad_norm is None
    set_grads(params, seed=0)
    optimizer.step()
    assert optimizer.grad_norm is None
    optimizer.param_groups[0]["max_grad_norm"] = 1.0
    optimizer.step()
    assert optimizer.grad_norm is not None
    optimizer.param_groups[0]["max_grad_norm"] = None
    optimizer.step()
    assert optimizer.grad_norm is None


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_step_without_gradients(way: dict[str, Any]) -> None:
    params = make_params([(5,)])
    optimizer = FusedSGD(params, lr=0.1, max_grad_norm=1.0, skip_nonfinite=True, **way)
    optimizer.step()
    assert norm_of(optimizer) == 0
    assert optimizer.skipped_steps == 0
    assert not optimizer.state


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize(("dtype", "value"), [(torch.float32, 1e30), (torch.float64, 1e200), (torch.bfloat16, 1e30)])
def test_a_finite_gradient_whose_norm_overflows_is_no_reason_to_skip(
    isa: str, dtype: torch.dtype, value: float, way: dict[str, Any]
) -> None:
    params = make_params([(4099,), (5,)], dtype)
    before = copies(params)
    optimizer = FusedSGD(params, lr=0.5, momentum=0.9, skip_nonfinite=True, max_grad_norm=1.0, **way)
    for p in params:
        p.grad = torch.full_like(p, value)
    optimizer.step()
    assert optimizer.skipped_steps == 0
    exact = float(params[0].grad[0]) * math.sqrt(4104) if dtype != torch.float64 else math.inf  # type: ignore[index]
    assert norm_of(optimizer).item() == pytest.approx(exact, rel=1e-12)
    step = 0.5 / math.sqrt(4104) if dtype != torch.float64 else 0.0
    for p, q in zip(params, before, strict=True):
        torch.testing.assert_close(p.double(), q.double() - step, rtol=2**-7, atol=2**-7)
        assert "momentum_buffer" in optimizer.state[p]


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_bad_element_anywhere_skips_everything(device: str, isa: str, dtype: torch.dtype) -> None:
    """At the ends of lanes, rows and tiles, on the first step and later."""
    params = make_params([(9,), (10_007,), (3, 5)], dtype)
    optimizer = FusedSGD(params, lr=0.1, momentum=0.9, dampening=0.1, ema_decay=0.9, skip_nonfinite=True, fused=True)
    before = 0
    if device != "cpu":  # the host does not wait for the GPU's decision, and so makes state, which holds nothing yet
        set_grads(params, seed=0)
        assert params[1].grad is not None
        params[1].grad[0] = math.nan
        optimizer.step()
        before = 1
    positions = [0, 1, 254, 255, 256, 511, 512, 4095, 4096, 8191, 8192, 10_005, 10_006]
    for count, position in enumerate(positions):
        set_grads(params, seed=0)
        assert params[1].grad is not None
        params[1].grad[position] = BAD[count % 3]
        unchanged = snapshot(optimizer, versions=device == "cpu")
        optimizer.step()
        unchanged()
        assert all(bool(is_unset(t).all()) for p in params for t in optimizer.state.get(p, {}).values())
        assert device != "cpu" or not any(optimizer.state.values())
        assert optimizer.skipped_steps == before + count + 1
    set_grads(params, seed=0)
    optimizer.step()
    assert optimizer.skipped_steps == before + len(positions)
    for bad in BAD:
        for p in params:
            set_grads(params, seed=1)
            assert p.grad is not None
            p.grad.view(-1)[-1] = bad
            unchanged = snapshot(optimizer, versions=device == "cpu")
            optimizer.step()
            unchanged()
            assert not norm_of(optimizer).isfinite()
    assert optimizer.skipped_steps == before + len(positions) + 9


@pytest.mark.parametrize("way", [*WAYS, {"foreach": True}], ids=str)
def test_after_a_skipped_step_the_next_is_the_first(way: dict[str, Any]) -> None:
    params = make_params([(33,), (5,)])
    expected = copies(params)
    mine = FusedSGD(params, lr=0.1, momentum=0.9, dampening=0.5, skip_nonfinite=True, **way)
    theirs = torch.optim.SGD(expected, lr=0.1, momentum=0.9, dampening=0.5, foreach=False)
    for step in range(5):
        set_grads(params, expected, seed=step)
        if step in (0, 1, 3):
            assert params[1].grad is not None
            params[1].grad[2] = math.nan
        else:
            theirs.step()
        mine.step()
        for p, q in zip(params, expected, strict=True):
            assert same_bits(p, q), f"at step {step}"
    assert mine.skipped_steps == 3


@pytest.mark.parametrize("dtype", FLOATS)
def test_without_skip_nonfinite_nothing_is_skipped(dtype: torch.dtype) -> None:
    params = make_params([(33,)], dtype)
    optimizer = FusedSGD(params, lr=0.1, max_grad_norm=1.0, fused=True)
    set_grads(params, seed=0)
    assert params[0].grad is not None
    params[0].grad[3] = math.inf
    optimizer.step()
    assert params[0][3].isnan(), "as with clip_grad_norm_: infinity times 0"
    assert params[0].isnan().sum() == 1
    assert optimizer.skipped_steps == 0


# --- Parameters that no kernel takes ----------------------------------------------------------------------------------


def sparse_and_dense(seed: int) -> list[Tensor]:
    params = make_params([(6, 3), (4097,)], seed=seed)
    set_sparse_grads(params, seed)
    return params


def set_sparse_grads(params: list[Tensor], seed: int) -> None:
    rows = torch.tensor([[0, 4, 4]])  # not coalesced
    params[0].grad = torch.sparse_coo_tensor(rows, seeded((3, 3), seed), params[0].shape)
    params[1].grad = seeded((4097,), seed + 1)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("scale", [None, 4.0])
@pytest.mark.parametrize("momentum", [0, 0.9])
def test_sparse_and_dense_gradients_are_clipped_as_one_vector(
    momentum: float, scale: float | None, fused: bool | None
) -> None:
    params = sparse_and_dense(0)
    optimizer = FusedSGD(params, lr=0.1, momentum=momentum, max_grad_norm=1.0, skip_nonfinite=True, fused=fused)
    if scale is not None:
        optimizer.grad_scale = scale
    models: list[Tensor] = [p.detach().double() for p in params]
    model_buffers: list[Tensor | None] = [None, None]
    for step in range(3):
        set_sparse_grads(params, step)
        grads = [p.grad.to_dense().double() / (scale or 1) for p in params if p.grad is not None]
        norm = torch.cat([g.flatten() for g in grads]).norm()
        optimizer.step()
        torch.testing.assert_close(norm_of(optimizer), norm, rtol=1e-6, atol=0)
        for i, p in enumerate(params):
            coefficient = min(1.0, 1.0 / (norm.item() + 1e-6))
            models[i], model_buffers[i], _ = float64_step(
                models[i], grads[i], model_buffers[i], lr=0.1, momentum=momentum, clip_coefficient=coefficient
            )
            torch.testing.assert_close(p.detach().double(), models[i], rtol=1e-5, atol=1e-5)
    assert params[0].grad is not None
    params[0].grad._values()[1, 1] = math.nan
    unchanged = snapshot(optimizer)
    optimizer.step()
    unchanged()
    assert optimizer.skipped_steps == 1
    set_sparse_grads(params, 5)
    assert params[1].grad is not None
    params[1].grad[4096] = math.inf
    unchanged = snapshot(optimizer)
    optimizer.step()
    unchanged()
    assert optimizer.skipped_steps == 2


def test_groups_on_different_paths_share_one_norm() -> None:
    """Kernel, reference and torch's foreach side by side."""
    params = make_params([(4097,), (33,), (5, 7), (64,)])
    ways: list[dict[str, Any]] = [{"fused": True}, {"fused": False}, {"foreach": True}, {"fused": None}]
    groups = [{"params": [p], **way} for p, way in zip(params, ways, strict=True)]
    expected = copies(params)
    mine = FusedSGD(groups, lr=0.1, momentum=0.9, max_grad_norm=0.5, skip_nonfinite=True)
    theirs = torch.optim.SGD(expected, lr=0.1, momentum=0.9)
    for step in range(4):
        set_grads(params, expected, seed=step)
        if step == 2:
            assert params[2].grad is not None
            params[2].grad[1, 1] = math.nan
            unchanged = snapshot(mine)
            mine.step()
            unchanged()
            continue
        norm = torch.nn.utils.clip_grad_norm_(expected, 0.5)
        mine.step()
        theirs.step()
        torch.testing.assert_close(norm_of(mine).float(), norm)
        for p, q in zip(params, expected, strict=True):
            torch.testing.assert_close(p, q)
    assert [row.path for row in mine.explain()] == ["kernel", "reference", "foreach", "kernel"]


class Quiet(torch.utils._python_dispatch.TorchDispatchMode):
    """Does nothing, but no kernel may hide from it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_under_a_dispatch_mode() -> None:
    params = make_params([(4097,), (33,)])
    expected = copies(params)
    mine = FusedSGD(params, lr=0.1, momentum=0.9, max_grad_norm=0.5, skip_nonfinite=True)
    theirs = FusedSGD(expected, lr=0.1, momentum=0.9, max_grad_norm=0.5, skip_nonfinite=True)
    for step in range(4):
        set_grads(params, expected, seed=step)
        if step == 2:
            for p in (params[0], expected[0]):
                assert p.grad is not None
                p.grad[7] = math.nan
        with Quiet():
            mine.step()
        theirs.step()
        torch.testing.assert_close(norm_of(mine), norm_of(theirs), equal_nan=True)
        for p, q in zip(params, expected, strict=True):
            torch.testing.assert_close(p, q)
    assert mine.skipped_steps == theirs.skipped_steps == 1
    set_grads(params, seed=9)
    mine.step()
    vector = torch.cat([p.grad for p in params if p.grad is not None])
    torch.testing.assert_close(norm_of(mine).float(), vector.norm())


# --- Options of the whole optimizer -----------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("key", "value", "other"), [("max_grad_norm", 1.0, 2.0), ("skip_nonfinite", True, False)])
def test_values_that_differ_between_groups(key: str, value: Any, other: Any, fused: bool) -> None:
    params = make_params([(3,), (4,), (5,)])
    groups = [{"params": [params[0]]}, {"params": [params[1]], key: other}]
    message = rf"{key} holds for the whole optimizer, and is {value} in param group 0 and {other} in param group 1"
    with pytest.raises(ValueError, match=message):
        FusedSGD(groups, lr=0.1, fused=fused, **{key: value})
    optimizer = FusedSGD(params[:2], lr=0.1, momentum=0.9, fused=fused, **{key: value})
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [params[2]], key: other})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [params[2]], key: value})
    set_grads(params, seed=0)
    optimizer.step()
    optimizer.param_groups[1][key] = other
    unchanged = snapshot(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    unchanged()
    optimizer.param_groups[0][key] = other
    optimizer.step()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("bad", [0, 0.0, -1.0, math.nan])
def test_max_grad_norm_that_is_not_positive(bad: float, fused: bool) -> None:
    params = make_params([(3,)])
    with pytest.raises(ValueError, match=r"Invalid max_grad_norm: .*; it must be positive"):
        FusedSGD(params, max_grad_norm=bad, fused=fused)
    optimizer = FusedSGD(params, lr=0.1, momentum=0.9, max_grad_norm=1.0, fused=fused)
    set_grads(params, seed=0)
    optimizer.step()
    optimizer.param_groups[0]["max_grad_norm"] = bad
    unchanged = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"Invalid max_grad_norm: .*; it must be positive \(param group 0\)"):
        optimizer.step()
    unchanged()
    with pytest.raises(TypeError, match=r"max_grad_norm must be a number, and is 'one'"):
        FusedSGD(params, max_grad_norm="one")  # type: ignore[arg-type]


def test_an_infinite_max_grad_norm_only_measures() -> None:
    params = make_params([(4097,)])
    expected = copies(params)
    mine = FusedSGD(params, lr=0.1, max_grad_norm=math.inf, fused=True)
    set_grads(params, expected, seed=0)
    mine.step()
    torch.optim.SGD(expected, lr=0.1).step()
    assert same_bits(params[0], expected[0])
    assert params[0].grad is not None
    torch.testing.assert_close(norm_of(mine).float(), params[0].grad.norm())


@pytest.mark.parametrize("fused", [True, False])
def test_gradients_are_divided_in_the_dtype_of_the_update(fused: bool) -> None:
    """Not in their own, where that is narrower than their parameter's."""
    params = make_params([(300,)], torch.float64)
    params[0].grad_dtype = None
    grad = make_params([(300,)])[0].detach()
    params[0].grad = grad.clone()
    optimizer = FusedSGD(params, lr=0.1, max_grad_norm=0.5, fused=fused)
    optimizer.grad_scale = 3.0
    optimizer.step()
    assert optimizer.grad_norm is not None
    assert optimizer.grad_norm.item() == pytest.approx((grad.double() / 3).norm().item(), rel=1e-14)
