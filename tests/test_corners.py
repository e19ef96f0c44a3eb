"""Where torch.optim.SGD(fused=True) and others are wrong: one regression test each."""

from __future__ import annotations

import pytest
import torch
from fused_sgd import FusedSGD
from torch import Tensor

from support import assert_same, copies, float64_step, make_params, same_bits, seeded, set_grads

pytestmark = pytest.mark.usefixtures("device")


def scaler_step(optimizer: torch.optim.Optimizer, scale: float, found_inf: float) -> None:
    """What GradScaler does around step() for an optimizer that unscales by itself."""
    optimizer.grad_scale = torch.tensor(scale)  # type: ignore[attr-defined]
    optimizer.found_inf = torch.tensor(found_inf)  # type: ignore[attr-defined]
    optimizer.step()
    del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dampening", [0, 0.5])
def test_overflow_on_the_first_scaled_step(dampening: float) -> None:
    """torch leaves the momentum uninitialised, and the next step uses the garbage: |p| went from 4.6 to 8.7e23."""
    params = make_params([(7,), (33,)])
    expected = copies(params)
    mine = FusedSGD(params, lr=0.1, momentum=0.9, dampening=dampening, fused=True)
    theirs = torch.optim.SGD(expected, lr=0.1, momentum=0.9, dampening=dampening)
    set_grads(params, seed=0)
    params[0].grad.fill_(torch.inf)
    scaler_step(mine, 4.0, 1.0)
    assert all(same_bits(p, q) for p, q in zip(params, expected, strict=True))
    for step in range(1, 4):
        set_grads(params, expected, seed=step)
        for p in params:
            p.grad.mul_(4.0)
        scaler_step(mine, 4.0, 0.0)
        theirs.step()
        assert_same(mine, theirs, params, expected, f"at step {step}")


@pytest.mark.parametrize("found_inf", [1.0, 2.0, 0.5, float("nan")])
def test_found_inf_that_is_not_one(device: str, found_inf: float) -> None:
    """GradScaler sums over devices; torch applies infinite gradients at 2.0 (2.15.0)."""
    params = make_params([(7,)])
    before = params[0].detach().clone()
    params[0].grad = torch.full((7,), torch.inf)
    optimizer = FusedSGD(params, lr=0.1, momentum=0.9, fused=True)
    scaler_step(optimizer, 1.0, found_inf)
    assert torch.equal(params[0], before)
    if device == "cpu":
        assert not optimizer.state
    else:  # the host did not know of the overflow: the buffer is there, and as good as none
        assert same_bits(optimizer.state[params[0]]["momentum_buffer"], torch.full((7,), -0.0))


def test_a_first_gradient_that_comes_late() -> None:
    """Unfreezing; torch raises TypeError, None in a TensorList (2.15.0). Each parameter has a first step of its own."""
    params = make_params([(7,), (33,)])
    expected = copies(params)
    mine = FusedSGD(params, lr=0.1, momentum=0.9, dampening=0.3, fused=True)
    theirs = torch.optim.SGD(expected, lr=0.1, momentum=0.9, dampening=0.3, foreach=False)
    for step in range(4):
        set_grads(params, expected, seed=step)
        if step < 2:
            params[1].grad = expected[1].grad = None
        mine.step()
        theirs.step()
        assert_same(mine, theirs, params, expected, f"at step {step}")


def nchw_to_nhwc(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": nchw_to_nhwc,
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "reversed": lambda t: t.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "every second": lambda t: torch.stack([t, t * 0 + 9], dim=-1)[..., 0],
    "column block": lambda t: torch.cat([t, t * 0 + 9], dim=1)[:, : t.shape[1]],
}


@pytest.mark.parametrize("buffer_layout", [None, "channels_last", "every second"])
@pytest.mark.parametrize("grad_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(4, 3, 5, 2), (4, 1, 5, 1)], ids=str)
def test_any_strides(shape: tuple[int, ...], layout: str, grad_layout: str, buffer_layout: str | None) -> None:
    """Other strides in the gradient: torch is silently wrong on CPU, error 4.9 on unit data. A strided view as a
    parameter: torch writes its neighbours' memory (2.15.0)."""
    values = torch.randn(shape)
    expected = values.clone().requires_grad_()
    p = LAYOUTS[layout](values.clone()).requires_grad_()
    p.grad_dtype = None  # (a view's gradient may then come in any layout)
    strides = p.stride()
    mine = FusedSGD([p], lr=0.1, momentum=0.9, weight_decay=0.01, fused=True)
    theirs = torch.optim.SGD([expected], lr=0.1, momentum=0.9, weight_decay=0.01)
    for step in range(4):
        grad = seeded(shape, step)
        expected.grad = grad
        p.grad = LAYOUTS[grad_layout](grad)
        if step == 2 and buffer_layout is not None:
            mine.state[p]["momentum_buffer"] = LAYOUTS[buffer_layout](mine.state[p]["momentum_buffer"])
        mine.step()
        theirs.step()
        assert_same(mine, theirs, [p], [expected], f"at step {step}")
    assert p.stride() == strides


def test_a_strided_view_leaves_its_neighbours_alone() -> None:
    memory = torch.full((10, 8), 42.0)
    p = memory[1:9:2, 1:6:2].requires_grad_()
    p.grad = torch.ones(4, 3)
    FusedSGD([p], lr=1.0, momentum=0.9, fused=True).step()
    touched = torch.zeros(10, 8, dtype=torch.bool)
    touched[1:9:2, 1:6:2] = True
    assert (memory[touched] == 41).all()
    assert (memory[~touched] == 42).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_updates_every_element(dtype: torch.dtype) -> None:
    """torch 2.13 on CPU updates no whole vector block (pytorch#191763)."""
    params = make_params([(4097,)], dtype)
    set_grads(params, seed=0)
    model, _, _ = float64_step(params[0].detach(), params[0].grad, None, lr=0.5)
    FusedSGD(params, lr=0.5, fused=True).step()
    assert torch.allclose(params[0].double(), model, rtol=torch.finfo(dtype).eps, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("maximize", [False, True])
def test_complex_parameters(isa: str, dtype: torch.dtype, maximize: bool) -> None:
    """torch's fused path refuses them. As pairs of reals they differ from the loop in the last bit at most."""
    params = make_params([(33,), (4, 5)], dtype)
    expected = copies(params)
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "maximize": maximize}
    mine = FusedSGD(params, **options, fused=True)
    theirs = torch.optim.SGD(expected, **options)
    for step in range(4):
        set_grads(params, expected, seed=step)
        mine.step()
        theirs.step()
        for p, q in zip(params, expected, strict=True):
            torch.testing.assert_close(p, q, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("lazy", ["conj", "neg"])
def test_lazy_conjugates_and_negatives(lazy: str) -> None:
    p, q = make_params([(5, 3)], torch.complex64)[0], make_params([(5, 3)], torch.complex64)[0]
    grad = torch.randn(5, 3, dtype=torch.complex64)
    if lazy == "conj":
        p.grad, q.grad = grad.conj(), grad.conj().resolve_conj()
        assert p.grad.is_conj()
        FusedSGD([p], lr=0.1, fused=True).step()
        FusedSGD([q], lr=0.1, fused=True).step()
        assert same_bits(p, q)
    else:
        r, s = make_params([(5, 3)])[0], make_params([(5, 3)])[0]
        r.grad, s.grad = grad.conj().imag, grad.conj().imag.resolve_neg().contiguous()
        assert r.grad.is_neg()
        FusedSGD([r], lr=0.1, fused=True).step()
        FusedSGD([s], lr=0.1, fused=True).step()
        assert same_bits(r, s)


def test_backward_through_a_graph_from_before_the_step_raises() -> None:
    """torch's fused step bumps no version: backward silently uses the changed weights."""
    w = torch.randn(3, requires_grad=True)
    loss = (w * w).sum()
    w.grad = torch.ones(3)
    FusedSGD([w], lr=0.1, fused=True).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_step_that_raises_clears_what_gradscaler_set() -> None:
    """torch leaves grad_scale, and the next step divides by it once more."""
    params = make_params([(7,)])
    optimizer = FusedSGD(params, lr=0.1, fused=True)
    params[0].grad = params[0].detach()  # shares memory: refused
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(0.0)
    with pytest.raises(RuntimeError, match="shares memory"):
        optimizer.step()
    assert not hasattr(optimizer, "grad_scale")
    assert not hasattr(optimizer, "found_inf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_never_written(isa: str, dtype: torch.dtype) -> None:
    """torch's fused path writes the unscaled gradient back."""
    params = make_params([(1000,), (33, 5)], dtype)
    optimizer = FusedSGD(params, lr=0.1, momentum=0.9, weight_decay=0.1, maximize=True, nesterov=True, fused=True)
    set_grads(params, seed=0)
    before = [p.grad.clone() for p in params]
    scaler_step(optimizer, 16.0, 0.0)
    assert all(same_bits(p.grad, b) for p, b in zip(params, before, strict=True))


def test_loading_an_older_checkpoint_keeps_the_path() -> None:
    """A checkpoint without `fused` loses torch's: the scaler's attributes then hit an AssertionError."""
    params = make_params([(7,)])
    optimizer = FusedSGD(params, lr=0.1, momentum=0.9, fused=True)
    set_grads(params, seed=0)
    optimizer.step()
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        for key in ("fused", "foreach", "maximize", "differentiable"):
            del group[key]
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["fused"] is True
    assert optimizer._step_supports_amp_scaling
    set_grads(params, seed=1)
    scaler_step(optimizer, 2.0, 0.0)


def test_first_step_is_decided_per_parameter_not_by_the_last_one() -> None:
    """Apex takes first_run from the last parameter for the whole list."""
    params = make_params([(7,), (9,), (11,)])
    expected = copies(params)
    mine = FusedSGD(params, lr=0.1, momentum=0.9, dampening=0.5, fused=True)
    theirs = torch.optim.SGD(expected, lr=0.1, momentum=0.9, dampening=0.5, foreach=False)
    for step, missing in enumerate([2, 0, 1, None]):
        set_grads(params, expected, seed=step)
        if missing is not None:
            params[missing].grad = expected[missing].grad = None
        mine.step()
        theirs.step()
        assert_same(mine, theirs, params, expected, f"at step {step}")


def test_decay_is_applied_once_whatever_the_mix_of_dtypes() -> None:
    """timm's foreach SGDW once decayed once per dtype group (timm#2750)."""
    params = [make_params([(9,)], dtype)[0] for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float32)]
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.zeros_like(p)
    FusedSGD(params, lr=0.5, weight_decay=0.5, fused=True).step()
    for p, b in zip(params, before, strict=True):
        torch.testing.assert_close(p.detach(), b * 0.75)


@pytest.mark.usefixtures("poisoned_memory")
def test_new_buffers_are_never_read_uninitialised() -> None:
    params = make_params([(7,), (0,), (), (33, 2)])
    set_grads(params, seed=0)
    optimizer = FusedSGD(params, lr=0.1, momentum=0.9, dampening=0.2, nesterov=False, fused=True)
    optimizer.step()
    for p in params:
        assert not optimizer.state[p]["momentum_buffer"].isnan().any()
        assert not p.isnan().any()


def test_a_buffer_whose_first_step_never_came_is_still_right() -> None:
    """Buffers start as -0.0: the formula of later steps then gives the first step's bits, signs of zeros included."""
    p, q = (torch.tensor([0.0, -0.0, 1.5, -2.0]).requires_grad_() for _ in range(2))
    grad = torch.tensor([0.0, -0.0, -0.0, 3.0])
    p.grad, q.grad = grad.clone(), grad.clone()
    mine = FusedSGD([p], lr=0.1, momentum=0.9, fused=True)
    mine.state[p]["momentum_buffer"] = torch.full((4,), -0.0)
    theirs = torch.optim.SGD([q], lr=0.1, momentum=0.9)
    mine.step()
    theirs.step()
    assert_same(mine, theirs, [p], [q])


def test_sparse_gradients_with_dampening(device: str) -> None:
    """The buffer is sparse, too, and never unset: a second step raised, after others had been written."""
    embedding, other = torch.nn.Embedding(5, 3, sparse=True), torch.nn.Parameter(torch.ones(3))
    expected = copies([embedding.weight, other])
    mine = FusedSGD([embedding.weight, other], lr=0.1, momentum=0.9, dampening=0.5)
    theirs = torch.optim.SGD(expected, lr=0.1, momentum=0.9, dampening=0.5)
    for step in range(3):
        mine.zero_grad()
        (embedding(torch.tensor([step, 1])).sum() + other.sum()).backward()
        for p, q in zip((embedding.weight, other), expected, strict=True):
            q.grad = p.grad.clone()
        mine.step()
        theirs.step()
    assert same_bits(embedding.weight, expected[0])
    assert same_bits(other, expected[1])


@pytest.mark.parametrize("fused", [None, True])
def test_a_lazy_module_that_gets_its_shape_after_a_step(fused: bool | None) -> None:
    """Its parameters then are of another class."""
    model = torch.nn.LazyLinear(3)
    optimizer = FusedSGD(model.parameters(), lr=0.1, fused=fused)
    optimizer.step()
    model(torch.ones(2, 4)).sum().backward()
    expected = copies(list(model.parameters()))
    for p, q in zip(model.parameters(), expected, strict=True):
        q.grad = p.grad
    optimizer.step()
    torch.optim.SGD(expected, lr=0.1).step()
    assert all(same_bits(p, q) for p, q in zip(model.parameters(), expected, strict=True))
