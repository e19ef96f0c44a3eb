"""Bad input: a clear error that names the parameter, and nothing written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from error_support import assert_refused, ready
from fused_sgd import FusedSGD
from fused_sgd._judge import _unsound
from torch import Tensor

from support import make_params, set_grads

pytestmark = pytest.mark.usefixtures("device")


def test_expanded_parameter() -> None:
    """torch's fused path corrupts the heap here and aborts (2.15.0)."""
    optimizer, _ = ready()
    p = torch.randn(4, 1).expand(4, 3).requires_grad_()
    optimizer.add_param_group({"params": [p]})
    p.grad = torch.ones(4, 3)
    assert_refused(
        optimizer, r"param group 1, parameter 0 .*torch.float32, shape \(4, 3\), strides \(1, 0\).*share memory"
    )


def test_self_overlapping_strides() -> None:
    p = torch.as_strided(torch.randn(20), (4, 3), (2, 1)).requires_grad_()
    p.grad = torch.ones(4, 3)
    assert_refused(FusedSGD([p]), "share memory")


@pytest.mark.parametrize("fused", [None, True])
def test_tied_storage(fused: bool | None) -> None:
    memory = torch.randn(30)
    first, second = memory[:20].requires_grad_(), memory[10:].requires_grad_()
    optimizer = FusedSGD([first, second], fused=fused)
    first.grad, second.grad = torch.ones(20), torch.ones(20)
    assert_refused(optimizer, "parameter 0 .*shares memory with the parameter of param group 0, parameter 1")
    second.grad = None  # only one of them is written: fine
    optimizer.step()


def test_a_gradient_in_another_parameters_memory() -> None:
    memory = torch.randn(40)
    first, second = memory[:20].requires_grad_(), torch.randn(20).requires_grad_()
    first.grad, second.grad = torch.ones(20), memory[10:30]
    assert_refused(FusedSGD([first, second]), "shares memory with the gradient of param group 0, parameter 1")


def test_a_gradient_that_moves_into_a_parameter() -> None:
    """Not at the first step, but once everything is settled and only gradients move."""
    optimizer, params = ready()
    params[2].grad = params[0].detach().view(4, 3)
    assert_refused(optimizer, "shares memory with the gradient of param group 0, parameter 2")


def test_a_gradient_in_a_momentum_buffer() -> None:
    optimizer, params = ready()
    params[2].grad = optimizer.state[params[0]]["momentum_buffer"]
    assert_refused(optimizer, "the momentum buffer of param group 0, parameter 0 .*shares memory with the gradient")


def test_two_parameters_with_one_momentum_buffer() -> None:
    optimizer, params = ready()
    optimizer.state[params[0]]["momentum_buffer"] = optimizer.state[params[1]]["momentum_buffer"]
    assert_refused(optimizer, "momentum buffer .*shares memory with the momentum buffer")


def test_interleaved_views_share_nothing() -> None:
    memory = torch.zeros(10, 4)
    params = [memory[:, :2].requires_grad_(), memory[:, 2:].requires_grad_(), torch.zeros(8).requires_grad_()]
    for p in params:
        p.grad = torch.ones(p.shape)
    FusedSGD(params, lr=0.5, fused=True).step()
    assert (memory == -0.5).all()


def test_shared_and_expanded_gradients_are_only_read() -> None:
    params = make_params([(4, 3), (4, 3)])
    grad = torch.ones(1, 3).expand(4, 3)
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = grad
    FusedSGD(params, lr=1.0, fused=True).step()
    assert all(torch.equal(p, b - 1) for p, b in zip(params, before, strict=True))


@pytest.mark.parametrize("fused", [None, False])
def test_integer_parameter(fused: bool | None) -> None:
    optimizer, _ = ready(fused=fused)
    frozen = torch.arange(4)
    optimizer.add_param_group({"params": [frozen]})
    optimizer.step()  # without a gradient it is nobody's business
    frozen.grad = torch.ones(4, dtype=torch.int64)
    assert_refused(optimizer, r"param group 1, parameter 0 \(torch.int64.*floating-point")


@pytest.mark.cpu_only
@pytest.mark.filterwarnings("ignore:.*quantize.*")
def test_quantised_parameter() -> None:
    p = torch.quantize_per_tensor(torch.randn(4), 0.1, 0, torch.qint8)
    optimizer = FusedSGD([p])
    try:
        p.grad = torch.randn(4)
    except RuntimeError:
        pytest.skip("this torch lets no quantised tensor have a gradient")
    assert_refused(optimizer, "torch.qint8.*floating-point")


@pytest.mark.parametrize("fused", [None, True, False])
def test_gradient_of_another_shape(fused: bool | None) -> None:
    optimizer, params = ready(fused=fused)
    params[1].data = torch.randn(3, 4)
    assert_refused(optimizer, r"parameter 1 \(torch.float32, shape \(3, 4\).*its gradient has another shape .*\(4, 3\)")


def test_tensors_on_different_devices() -> None:
    """torch lets nobody assign a gradient on another device, so that one is asked of the judge itself."""
    optimizer, params = ready()
    optimizer.state[params[1]]["momentum_buffer"] = torch.empty(4, 3, device="meta")
    before = params[0].detach().clone()
    with pytest.raises(RuntimeError, match=r"parameter 1 .*momentum_buffer is on another device \(.*meta"):
        optimizer.step()
    assert torch.equal(params[0], before)
    group = optimizer.param_groups[0]
    assert "its gradient is on another device" in _unsound(group, params[0], torch.empty(4, 3, device="meta"), None)


@pytest.mark.parametrize("fused", [None, False])
def test_momentum_buffer_of_another_shape(fused: bool | None) -> None:
    optimizer, params = ready(fused=fused)
    optimizer.state[params[1]]["momentum_buffer"] = torch.zeros(12)
    assert_refused(optimizer, "parameter 1 .*momentum_buffer has another shape")


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize(
    ("buffer", "message"),
    [
        (lambda: torch.zeros(4, 3, dtype=torch.int64), "has a dtype that cannot hold it"),
        (lambda: torch.zeros(4, 3, dtype=torch.complex64), "has a dtype that cannot hold it"),
        (lambda: torch.zeros(1, 3).expand(4, 3), "elements of its momentum_buffer share memory"),
        (lambda: torch.zeros(4, 3).to_sparse(), "momentum_buffer is sparse and its gradient is not"),
    ],
    ids=["integer", "complex", "expanded", "sparse"],
)
def test_momentum_buffer_that_no_step_can_use(buffer: Callable[[], Tensor], message: str, fused: bool | None) -> None:
    optimizer, params = ready(fused=fused)
    optimizer.state[params[1]]["momentum_buffer"] = buffer()
    assert_refused(optimizer, f"parameter 1 .*{message}")


def test_momentum_buffer_that_is_no_tensor() -> None:
    optimizer, params = ready()
    optimizer.state[params[1]]["momentum_buffer"] = [1.0]
    with pytest.raises(RuntimeError, match=r"parameter 1 .*momentum_buffer is \[1.0\], no tensor"):
        optimizer.step()


@pytest.mark.parametrize("role", ["parameter", "gradient", "momentum buffer"])
def test_storage_freed_between_steps(role: str) -> None:
    """FSDP1 frees parameters by resizing their storage."""
    optimizer, params = ready()
    victim = {"parameter": params[1], "gradient": params[1].grad}.get(
        role, optimizer.state[params[1]]["momentum_buffer"]
    )
    before = params[0].detach().clone()
    victim.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=f"parameter 1 .*the storage of its {role} is smaller"):
        optimizer.step()
    assert torch.equal(params[0], before)


def test_parameter_in_two_groups_or_twice_in_one() -> None:
    p, q = make_params([(2,), (2,)])
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        FusedSGD([{"params": [p]}, {"params": [p]}])
    with pytest.raises(ValueError, match="parameter 2 of param group 0 is the same tensor as parameter 0"):
        FusedSGD([p, q, p])
    with pytest.raises(ValueError, match="parameter 1 of param group 0 is the same tensor as parameter 0"):
        FusedSGD([("a", p), ("b", p)])
    optimizer = FusedSGD([p])
    p.grad = torch.ones(2)
    optimizer.param_groups[0]["params"].append(p)
    assert_refused(optimizer, "shares memory with")


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda p: p.grad.to_sparse(), "the gradient is sparse"),
    ],
)
def test_fused_true_with_what_no_kernel_takes(make: Any, reason: str) -> None:
    optimizer, params = ready(fused=True)
    params[1].grad = make(params[1])
    assert_refused(optimizer, f"parameter 1 .*`fused=True` cannot be honoured: {reason}.*fused=None")


def test_fused_true_with_a_subclass_or_an_unsupported_device() -> None:
    class Odd(Tensor):
        pass

    odd = torch.randn(3).as_subclass(Odd).requires_grad_()
    odd.grad = torch.ones(3)
    with pytest.raises(RuntimeError, match="is a Odd, a subclass of Tensor"):
        FusedSGD([odd], fused=True).step()
    meta = torch.empty(3, device="meta").requires_grad_()
    meta.grad = torch.empty(3, device="meta")
    with pytest.raises(RuntimeError, match="no kernel for device type meta"):
        FusedSGD([meta], fused=True).step()


def test_the_name_of_a_named_parameter() -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = FusedSGD(model.named_parameters())
    model(torch.ones(1, 3)).sum().backward()
    model.bias.grad = None
    model.bias.data = torch.zeros(5)
    model.bias.grad = torch.zeros(5)
    model.bias.data = torch.zeros(4)
    assert_refused(optimizer, "parameter 1 'bias'")


def test_inference_tensor() -> None:
    optimizer, _ = ready()
    with torch.inference_mode():
        p = torch.randn(3)
    optimizer.param_groups[0]["params"].append(p)
    p.grad = torch.ones(3)
    with pytest.raises(RuntimeError, match=r"parameter 3 .*inference tensor"):
        optimizer.step()


def test_a_broken_params_list() -> None:
    optimizer, _ = ready()
    optimizer.param_groups[0]["params"] = ["weight"]
    with pytest.raises(TypeError, match=r"param_groups\[0\]\['params'\]\[0\] is not a tensor"):
        optimizer.step()
    optimizer.param_groups[0]["params"] = None
    with pytest.raises(TypeError, match=r"param_groups\[0\]\['params'\] must be a list"):
        optimizer.step()


def test_first_step_that_fails_creates_no_state() -> None:
    params = make_params([(4, 3)] * 3)
    optimizer = FusedSGD(params, lr=0.1, momentum=0.9)
    set_grads(params, seed=0)
    params[2].grad = params[0].detach()
    assert_refused(optimizer, "shares memory")
    assert not optimizer.state
    set_grads(params, seed=0)
    optimizer.step()
    assert len(optimizer.state) == 3


@pytest.mark.filterwarnings("ignore:Sparse")
def test_a_layout_without_arithmetic() -> None:
    p = torch.eye(4).to_sparse_bsr((2, 2)).requires_grad_()
    p.grad = torch.eye(4).to_sparse_bsr((2, 2))
    optimizer, _ = ready()
    optimizer.add_param_group({"params": [p]})
    with pytest.raises(RuntimeError, match=r"param group 1, parameter 0 .*no arithmetic for its layout"):
        optimizer.step()
