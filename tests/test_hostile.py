"""Python code that runs in the middle of a step, several threads, and values that change in place.

Found by hunting for inputs that crash the plan or fool it; each once did.
"""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from fused_sgd import FusedSGD
from torch import Tensor

from support import make_params, same_bits, set_grads, snapshot

pytestmark = pytest.mark.usefixtures("device")


def ready(count: int = 3, **options: Any) -> tuple[FusedSGD, list[Tensor]]:
    params = make_params([(5,)] * count)
    set_grads(params, seed=0)
    return FusedSGD(params, **{"lr": 0.1, "momentum": 0.9, **options}), params


def test_threads_that_step_the_same_fresh_optimizer() -> None:
    """Hashing a parameter runs Python code, where another thread may take over."""
    optimizer, params = ready(1000)
    errors: list[str] = []

    def step() -> None:
        try:
            optimizer.step()
        except RuntimeError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=step) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all("already running" in error or "admit" in error for error in errors)
    optimizer.step()
    assert not any(p.isnan().any() for p in params)


def test_a_finalizer_that_collects_garbage_during_a_step() -> None:
    params = make_params([(3,)] * 50)
    set_grads(params, seed=0)
    optimizer = FusedSGD([{"params": [p]} for p in params], lr=0.1)
    optimizer.step()
    for p in params:
        weakref.finalize(p, gc.collect)
    del params, p
    optimizer.param_groups[:] = optimizer.param_groups[:1]
    optimizer.step()


def test_a_finalizer_that_steps() -> None:
    optimizer, params = ready(4)
    optimizer.step()
    calls: list[int] = []
    weakref.finalize(params[3], lambda: calls.append(optimizer.step() is None))
    optimizer.state.pop(params[3])
    optimizer.param_groups[0]["params"] = params[:3]
    del params[3]
    optimizer.step()
    optimizer.step()
    assert calls == [True]


def test_a_number_that_changes_the_groups_while_it_is_read() -> None:
    class Number:
        def __float__(self) -> float:
            del optimizer.param_groups[1:]
            gc.collect()
            return 0.1

    params = make_params([(3,)] * 4)
    set_grads(params, seed=0)
    optimizer = FusedSGD([{"params": [p]} for p in params], lr=0.1)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = Number()
    with pytest.raises(RuntimeError, match="param_groups changed during the step"):
        optimizer.step()


@pytest.mark.parametrize("value", ["abc", None, 1j, float("nan")])
def test_a_bad_value_is_refused_every_time(value: Any) -> None:
    optimizer, _ = ready()
    optimizer.step()
    optimizer.param_groups[0]["lr"] = value
    unchanged = snapshot(optimizer)
    for _ in range(3):
        with pytest.raises((TypeError, ValueError)):
            optimizer.step()
    unchanged()


def test_a_path_option_changed_together_with_an_error() -> None:
    optimizer, _ = ready()
    optimizer.step()
    group = optimizer.param_groups[0]
    group["fused"] = False
    differentiable = group.pop("differentiable")
    with pytest.raises(KeyError):
        optimizer.step()
    group["differentiable"] = differentiable
    optimizer.step()
    assert optimizer.explain()[0].path == "reference"


def test_values_that_change_in_place() -> None:
    lr, maximize = np.array(0.5), torch.tensor(False)
    p = torch.zeros(3).requires_grad_()
    p.grad = torch.ones(3)
    optimizer = FusedSGD([p], lr=lr, maximize=maximize, fused=True)  # type: ignore[arg-type]
    optimizer.step()
    assert (p == -0.5).all()
    lr *= 2
    maximize.fill_(True)
    optimizer.step()
    assert (p == 0.5).all()


@pytest.mark.parametrize("key", ["lr", "weight_decay"])
def test_a_value_beyond_float32(key: str) -> None:
    """torch refuses it too; float64 parameters take it."""
    optimizer, _ = ready()
    optimizer.param_groups[0][key] = 1e39
    unchanged = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=f"parameter 0 .*{key} .*without overflow"):
        optimizer.step()
    unchanged()
    wide = make_params([(5,)], torch.float64)
    set_grads(wide, seed=0)
    FusedSGD(wide, **{key: 1e39}).step()


@pytest.mark.parametrize("lr", [0, 0.0, torch.tensor(0.0)])
def test_the_sign_of_zero_with_an_integer_learning_rate(lr: Any) -> None:
    p, q = (torch.tensor([-0.0, 0.0]).requires_grad_() for _ in range(2))
    p.grad, q.grad = torch.ones(2), torch.ones(2)
    FusedSGD([p], lr=lr).step()
    torch.optim.SGD([q], lr=lr).step()
    assert same_bits(p, q)


def test_memory_shared_across_paths_is_refused() -> None:
    a, b = torch.ones(3).requires_grad_(), torch.ones(3).requires_grad_()
    a.grad, b.grad = b.detach(), torch.ones(3)
    optimizer = FusedSGD([{"params": [a], "fused": False}, {"params": [b]}], lr=0.5)
    with pytest.raises(RuntimeError, match="shares memory with the gradient"):
        optimizer.step()
    optimizer, params = ready(fused=False)
    optimizer.param_groups[0]["params"].append(params[0])
    with pytest.raises(RuntimeError, match="shares memory"):
        optimizer.step()


def test_what_was_left_to_python_is_judged_again_after_an_error() -> None:
    p0, p1 = torch.ones(1).requires_grad_(), torch.ones(4).requires_grad_()
    optimizer = FusedSGD([p0, p1], lr=0.1)
    p0.grad, p1.grad = torch.ones(1).to_sparse(), p1.detach()
    with pytest.raises(RuntimeError, match="shares memory"):
        optimizer.step()
    p1.grad, p0.grad = torch.ones(4), None
    p0.grad = torch.ones(1)
    p0.data = torch.ones(5)
    with pytest.raises(RuntimeError, match=r"parameter 0 .*its gradient has another shape"):
        optimizer.step()
    assert (p1 == 1).all()


def test_momentum_loaded_in_inference_mode_is_refused_before_anything_is_written() -> None:
    optimizer, _ = ready()
    optimizer.step()
    with torch.inference_mode():
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    unchanged = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"parameter 0 .*its momentum_buffer is an inference tensor"):
        optimizer.step()
    unchanged()


def test_a_subclass_with_its_own_gradient_is_stepped() -> None:
    class Own(torch.nn.Parameter):
        @property
        def grad(self) -> Tensor:
            return torch.ones(3)

    p = Own(torch.zeros(3))
    FusedSGD([p], lr=0.5).step()
    assert (p.data == -0.5).all()


def test_many_interleaved_views() -> None:
    """Checked pair by pair, this took minutes."""
    memory = torch.zeros(600, 600)
    params = [column.requires_grad_() for column in memory.unbind(1)]
    for p in params:
        p.grad = torch.ones(600)
    FusedSGD(params, lr=0.5, fused=True).step()
    assert (memory == -0.5).all()


def test_a_strided_parameter_can_still_be_swapped() -> None:
    p = torch.zeros(4, 6)[:, ::2].requires_grad_()
    p.grad = torch.ones(4, 3)
    optimizer = FusedSGD([p], lr=0.5, fused=True)
    optimizer.step()
    other = torch.zeros(4, 3).requires_grad_()
    torch.utils.swap_tensors(p, other)
    p.grad = torch.ones(4, 3)
    optimizer.step()
    assert (p == -0.5).all()


def test_float8_parameters_are_refused_by_name() -> None:
    p = torch.zeros(4).to(torch.float8_e4m3fn)
    p.grad = torch.zeros(4).to(torch.float8_e4m3fn)
    with pytest.raises(RuntimeError, match=r"parameter 0 .*there is no arithmetic in torch.float8_e4m3fn"):
        FusedSGD([p]).step()


@pytest.mark.parametrize("fused", [None, True, False])
@pytest.mark.parametrize("key", ["lr", "momentum", "dampening", "weight_decay"])
def test_a_number_beyond_float32(key: str, fused: bool | None) -> None:
    """Torch, too, finds it, but when parameters before it are written already."""
    params = [*make_params([(5,)], torch.float64), *make_params([(6,)])]
    optimizer = FusedSGD(params, lr=0.1, momentum=0.9, fused=fused)
    optimizer.param_groups[0][key] = 1e300
    set_grads(params, seed=0)
    unchanged = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=rf"parameter 1 .*: {key} \(1e\+300\) cannot be converted to type float"):
        optimizer.step()
    unchanged()


def test_a_differentiable_step_of_a_leaf() -> None:
    params = make_params([(5,), (6,)])
    optimizer = FusedSGD([{"params": [params[0]]}, {"params": [params[1]], "differentiable": True}], lr=0.1)
    set_grads(params, seed=0)
    unchanged = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"param group 1, parameter 0 .*differentiable=True cannot write a leaf"):
        optimizer.step()
    unchanged()
