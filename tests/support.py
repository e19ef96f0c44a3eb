"""Helpers shared by the tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from fused_sgd._native import C
from torch import Tensor

Params = list[Tensor]

# Of float32's eight roundings, or the one that a 16-bit format may make otherwise after a norm's last bit.
CLOSE = {
    torch.float64: 2**-44,
    torch.complex128: 2**-44,
    torch.float32: 2**-17,
    torch.complex64: 2**-17,
    torch.bfloat16: 2**-6,
    torch.float16: 2**-9,
}


def seeded(shape: Sequence[int], seed: int | torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normally distributed values, the same on every device."""
    generator = torch.Generator().manual_seed(seed) if isinstance(seed, int) else seed
    return torch.randn(shape, dtype=dtype, generator=generator, device="cpu").to(torch.get_default_device())


def make_params(shapes: Sequence[Sequence[int]], dtype: torch.dtype = torch.float32, seed: int = 0) -> Params:
    """Parameters on the default device, which the fixture `device` sets."""
    generator = torch.Generator().manual_seed(seed)
    real = torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32
    params = []
    for shape in shapes:
        values = seeded(shape, generator, real)
        if dtype.is_complex:
            values = torch.complex(values, seeded(shape, generator, real))
        params.append(values.to(dtype).requires_grad_())
    return params


def copies(params: Sequence[Tensor]) -> Params:
    """Independent copies with the same strides."""
    return [torch.empty_like(p).copy_(p).detach().requires_grad_() for p in params]


def set_grads(*param_lists: Sequence[Tensor], seed: int) -> None:
    """The same random gradients for all lists; each list gets its own memory."""
    generator = torch.Generator().manual_seed(seed)
    for params in zip(*param_lists, strict=True):
        first = params[0]
        real = first.dtype.to_real() if first.dtype.is_complex else first.dtype
        wide = torch.float64 if real == torch.float64 else torch.float32
        grad = seeded(first.shape, generator, wide)
        if first.dtype.is_complex:
            grad = torch.complex(grad, seeded(first.shape, generator, wide))
        for p in params:
            p.grad = grad.to(p.device, p.dtype, copy=True)


def bits(tensor: Tensor) -> Tensor:
    """A tensor's bits as integers, every NaN made the same."""
    tensor = tensor.detach()
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return tensor
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    tensor = torch.where(tensor.isnan(), torch.full_like(tensor, torch.nan), tensor)
    return tensor.contiguous().view({8: torch.int64, 4: torch.int32, 2: torch.int16}[tensor.element_size()])


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def assert_same(
    mine: torch.optim.Optimizer, theirs: torch.optim.Optimizer, params: Params, expected: Params, what: str = ""
) -> None:
    """Parameters and momentum buffers equal to the bit."""
    for index, (p, q) in enumerate(zip(params, expected, strict=True)):
        assert same_bits(p, q), f"parameter {index} differs {what}"
        a, b = mine.state.get(p, {}).get("momentum_buffer"), theirs.state.get(q, {}).get("momentum_buffer")
        assert (a is None) == (b is None), f"momentum buffer {index}: {a is None=}, {b is None=} {what}"
        if a is not None:
            assert same_bits(a, b), f"momentum buffer {index} differs {what}"


def snapshot(optimizer: torch.optim.Optimizer, versions: bool = True) -> Callable[[], None]:
    """Remembers parameters, gradients and state; the returned function asserts that nothing changed.

    versions: nor was anything written. A step that a GPU decides to skip counts as written on the host.
    """

    def look() -> list[Any]:
        seen: list[Any] = []
        for group in optimizer.param_groups:
            for p in group["params"]:
                seen += [
                    p.detach().clone(),
                    p._version if versions else None,
                    None if p.grad is None else p.grad.clone(),
                ]
                inner = optimizer.state.get(p)
                seen.append(None if inner is None else {k: v.clone() for k, v in inner.items()})
        return seen

    before = look()

    def unchanged() -> None:
        after = look()
        assert len(before) == len(after)
        for a, b in zip(before, after, strict=True):
            if isinstance(a, Tensor):
                assert isinstance(b, Tensor)
                assert same_bits(a.to_dense(), b.to_dense())
            elif isinstance(a, dict):
                assert a.keys() == b.keys()
                assert all(same_bits(a[k].to_dense(), b[k].to_dense()) for k in a)
            else:
                assert a == b

    return unchanged


class Float64Model(NamedTuple):
    """One step in float64, and the magnitudes that rounding errors scale with."""

    param: Tensor
    buffer: Tensor | None
    param_size: Tensor
    buffer_size: Tensor


def float64_model(
    p: Tensor,
    g: Tensor,
    b: Tensor | None,
    *,
    lr: float,
    momentum: float = 0,
    dampening: float = 0,
    weight_decay: float = 0,
    nesterov: bool = False,
    maximize: bool = False,
    grad_scale: float = 1,
    clip_coefficient: float = 1,
    decoupled_weight_decay: bool = False,
    trust_ratio: float = 1,
    lr_in_momentum: bool = False,
) -> Float64Model:
    """The formula of every option in float64."""
    p, d = p.double(), g.double() / grad_scale * clip_coefficient
    d = -d if maximize else d
    size = d.abs()
    if decoupled_weight_decay:
        p = p * (1 - lr * weight_decay)
    else:
        size = size + weight_decay * p.abs()
        d = d + weight_decay * p
    multiplier, step_size = (lr * trust_ratio, 1.0) if lr_in_momentum else (trust_ratio, lr)
    d, size = multiplier * d, multiplier * size
    if momentum:
        if b is not None:
            size = momentum * b.double().abs() + max(1, abs(1 - dampening)) * size
        b = d if b is None else momentum * b.double() + (1 - dampening) * d
        d = d + momentum * b if nesterov else b
    return Float64Model(p - step_size * d, b, p.abs() + (1 + momentum) * step_size * size, size)


def float64_step(p: Tensor, g: Tensor, b: Tensor | None, **options: Any) -> tuple[Tensor, Tensor | None, Tensor]:
    """Of the model: new parameter, new momentum buffer, and the magnitude that rounding errors scale with."""
    model = float64_model(p, g, b, **options)
    return model.param, model.buffer, model.param_size


def float64_ema(e: Tensor | None, p: Tensor, decay: float) -> Tensor:
    """The moving average of a parameter in float64; None before the first step."""
    return p.double() if e is None else decay * e.double() + (1 - decay) * p.double()


def kept(optimizer: torch.optim.Optimizer, param: Tensor) -> dict[str, Tensor]:
    """A parameter's state."""
    return {key: value for key, value in optimizer.state.get(param, {}).items() if value is not None}


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
