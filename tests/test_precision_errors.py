"""Precision options that make no sense, and state that does not fit them: clear errors, before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fused_sgd import FusedLARS, FusedSGD
from precision_support import FUSED
from torch import Tensor

from support import make_params, same_bits, set_grads, snapshot

pytestmark = pytest.mark.usefixtures("device")

NARROW = torch.bfloat16
REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"momentum_dtype": torch.float64}, ValueError, "Invalid momentum_dtype: torch.float64"),
    ({"momentum_dtype": torch.uint8}, ValueError, "Invalid momentum_dtype: torch.uint8"),
    ({"momentum_dtype": "int8"}, ValueError, "Invalid momentum_dtype: 'int8'"),
    ({"momentum_dtype": 8}, ValueError, "Invalid momentum_dtype: 8"),
    ({"momentum_dtype": [torch.int8]}, ValueError, "Invalid momentum_dtype"),
    ({"master_weights": "fp32"}, ValueError, "Invalid master_weights: 'fp32'"),
    ({"master_weights": True}, ValueError, "Invalid master_weights: True"),
    ({"master_weights": torch.bfloat16}, ValueError, "Invalid master_weights: torch.bfloat16"),
    ({"stochastic_rounding": 1}, ValueError, "Invalid stochastic_rounding: 1"),
    ({"stochastic_rounding": None}, ValueError, "Invalid stochastic_rounding: None"),
    ({"stochastic_rounding": True, "master_weights": "split"}, RuntimeError, "exclude each other"),
    ({"stochastic_rounding": True, "foreach": True}, RuntimeError, "no `stochastic_rounding`"),
    ({"master_weights": "split", "foreach": True}, RuntimeError, "no `master_weights`"),
    ({"momentum_dtype": torch.int8, "foreach": True}, RuntimeError, "no `momentum_dtype`"),
    ({"master_weights": "split", "differentiable": True}, RuntimeError, "not support `master_weights`"),
    ({"stochastic_rounding": True, "differentiable": True}, RuntimeError, "not support `stochastic_rounding`"),
    ({"momentum_dtype": torch.bfloat16, "differentiable": True}, RuntimeError, "not support `momentum_dtype`"),
]


@pytest.mark.parametrize(("options", "kind", "text"), REFUSED, ids=str)
def test_options_that_make_no_sense(options: dict[str, Any], kind: type[Exception], text: str) -> None:
    """By the constructor, for a new param group, and when they are put into a group of a running optimizer."""
    params = make_params([(3, 64)], NARROW)
    for make in (FusedSGD, FusedLARS):
        if make is FusedSGD or "foreach" not in options:
            with pytest.raises(kind, match=text):
                make(params, lr=0.1, momentum=0.9, **options)
    optimizer = FusedSGD(params, lr=0.1, momentum=0.9)
    with pytest.raises(kind, match=text):
        optimizer.add_param_group({"params": make_params([(3,)]), **options})
    assert len(optimizer.param_groups) == 1
    set_grads(params, seed=0)
    optimizer.step()
    optimizer.param_groups[0].update(options)
    unchanged = snapshot(optimizer)
    with pytest.raises(kind, match=text):
        optimizer.step()
    unchanged()


# --- Parameters that the options are not for --------------------------------------------------------------------------

EACH_PATH = pytest.mark.parametrize("fused", [None, False], ids=["kernel", "reference"])


def refused(optimizer: FusedSGD, text: str) -> None:
    """The next step is refused, and leaves no trace."""
    unchanged = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=text):
        optimizer.step()
    unchanged()


@EACH_PATH
@pytest.mark.parametrize(
    ("dtype", "options", "text"),
    [
        (torch.float16, {"master_weights": "split"}, 'master_weights="split" is for bfloat16'),
        (torch.complex64, {"momentum_dtype": torch.bfloat16}, "momentum_dtype=torch.bfloat16 is for real parameters"),
        (torch.complex128, {"momentum_dtype": torch.float32}, "momentum_dtype=torch.float32 is for real parameters"),
    ],
    ids=str,
)
def test_parameters_that_an_option_is_not_for(
    dtype: torch.dtype, options: dict[str, Any], text: str, fused: bool | None
) -> None:
    params = [*make_params([(3, 64)]), *make_params([(5,)], dtype)]
    optimizer = FusedSGD(params, lr=0.1, momentum=0.9, fused=fused, **options)
    set_grads(params, seed=0)
    refused(optimizer, f"param group 0, parameter 1 .*{text}")
    params[1].grad = None
    optimizer.step()


@EACH_PATH
@pytest.mark.parametrize(
    "options",
    [{"master_weights": "split"}, {"master_weights": "float32"}, {"stochastic_rounding": True}]
    + [{"momentum_dtype": dtype} for dtype in (torch.float32, torch.int8)],
    ids=str,
)
def test_sparse_gradients_are_refused(options: dict[str, Any], fused: bool | None) -> None:
    params = make_params([(3, 64), (4, 64)], torch.bfloat16)
    optimizer = FusedSGD(params, lr=0.1, momentum=0.9, fused=fused, **options)
    set_grads(params, seed=0)
    optimizer.step()
    params[1].grad = params[1].grad.to_sparse()
    refused(optimizer, "param group 0, parameter 1 .*not support sparse gradients")


def test_explain_tells_what_a_step_refuses() -> None:
    narrow, sparse = make_params([(3, 64), (3, 64)], torch.bfloat16)
    set_grads([narrow, sparse], seed=0)
    sparse.grad = sparse.grad.to_sparse()
    optimizer = FusedSGD([narrow, sparse], lr=0.1, master_weights="split")
    fine, wrong = optimizer.explain()
    assert (fine.path, wrong.path) == ("kernel", "none")
    refused(optimizer, wrong.reason)
    half = make_params([(3, 64)], torch.float16)
    (row,) = FusedSGD(half, lr=0.1, master_weights="split").explain()
    assert row.path == "none"
    assert "is for bfloat16" in row.reason


def test_no_kernel_for_a_combination() -> None:
    """fused=True says which; fused=None takes the reference."""
    params = make_params([(3, 64)], torch.float64)
    set_grads(params, seed=0)
    optimizer = FusedSGD(params, lr=0.1, momentum=0.9, momentum_dtype=torch.float32, fused=True)
    refused(optimizer, "no kernel for parameter Float64, gradient Float64, momentum Float32")
    optimizer.param_groups[0]["fused"] = None
    optimizer.step()
    assert optimizer.state[params[0]]["momentum_buffer"].dtype == torch.float32
    assert optimizer.explain()[0].path == "reference"


# --- State that someone else put there --------------------------------------------------------------------------------

SPLIT8 = {"master_weights": "split", "momentum_dtype": torch.int8}
MASTER = {"master_weights": "float32"}
STOCHASTIC = {"stochastic_rounding": True}


def reshaped(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1)


def halved(tensor: Tensor) -> Tensor:
    return tensor[:1].clone()


def as_double(tensor: Tensor) -> Tensor:
    return tensor.double()


def expanded(tensor: Tensor) -> Tensor:
    return tensor[:1].expand(tensor.shape)


def strided(tensor: Tensor) -> Tensor:
    return tensor.repeat_interleave(2, 0)[::2]


def as_list(tensor: Tensor) -> Any:
    return tensor.tolist()


WRONG: list[tuple[dict[str, Any], str, Callable[[Tensor], Any], str]] = [
    (SPLIT8, "remainder", reshaped, "remainder has another shape"),
    (SPLIT8, "remainder", as_double, r"remainder must be torch\.int16"),
    (SPLIT8, "remainder", expanded, "elements of its remainder share memory"),
    (SPLIT8, "remainder", as_list, "remainder is .*no tensor"),
    (SPLIT8, "momentum_codes", halved, "momentum_codes has another shape"),
    (SPLIT8, "momentum_codes", as_double, r"momentum_codes must be torch\.int8"),
    (SPLIT8, "momentum_scale", reshaped, "momentum_scale has another shape"),
    (SPLIT8, "momentum_scale", as_double, r"momentum_scale must be torch\.float32"),
    (SPLIT8, "momentum_scale", strided, "momentum_scale is not contiguous"),
    (MASTER, "master", reshaped, "master has another shape"),
    (MASTER, "master", as_double, r"master must be torch\.float32"),
    (MASTER, "master", expanded, "elements of its master share memory"),
    (MASTER, "momentum_buffer", halved, "momentum_buffer has another shape"),
    (STOCHASTIC, "rounding", halved, "rounding has another shape"),
    (STOCHASTIC, "rounding", as_double, r"rounding must be torch\.int64"),
    (STOCHASTIC, "rounding", strided, "rounding is not contiguous"),
]


@EACH_PATH
@pytest.mark.parametrize(("options", "key", "make", "text"), WRONG, ids=lambda it: getattr(it, "__name__", str(it)))
def test_state_that_does_not_fit(
    options: dict[str, Any], key: str, make: Callable[[Tensor], Any], text: str, fused: bool | None
) -> None:
    params = make_params([(3, 64), (4, 64)], torch.bfloat16)
    optimizer = FusedSGD(params, lr=0.1, momentum=0.9, fused=fused, **options)
    for step in range(2):
        set_grads(params, seed=step)
        optimizer.step()
    inner = optimizer.state[params[1]]
    good, inner[key] = inner[key], make(inner[key])
    if isinstance(inner[key], Tensor):
        refused(optimizer, f"param group 0, parameter 1 .*{text}")
    else:
        with pytest.raises(RuntimeError, match=f"param group 0, parameter 1 .*{text}"):
            optimizer.step()
    inner[key] = good
    optimizer.step()


@EACH_PATH
@pytest.mark.parametrize(
    ("key", "shape", "dtype", "options", "text"),
    [
        (
            "momentum_buffer",
            (4, 65),
            torch.float32,
            {"momentum_dtype": torch.int8},
            "momentum_buffer has another shape",
        ),
        ("momentum_buffer", (4, 64), torch.int32, {"momentum_dtype": torch.int8}, "momentum_buffer has a dtype"),
        ("momentum_codes", (4, 64), torch.int8, {}, "momentum_codes cannot be converted"),
        ("momentum_codes", (4, 65), torch.int8, {}, "momentum_codes has another shape"),
    ],
    ids=str,
)
def test_momentum_that_cannot_be_converted_is_not_forgotten(
    key: str, shape: tuple[int, ...], dtype: torch.dtype, options: dict[str, Any], text: str, fused: bool | None
) -> None:
    params = make_params([(3, 64), (4, 64)])
    optimizer = FusedSGD(params, lr=0.1, momentum=0.9, fused=fused, **options)
    optimizer.state[params[1]][key] = torch.zeros(shape, dtype=dtype)
    set_grads(params, seed=0)
    refused(optimizer, f"param group 0, parameter 1 .*{text}")


@EACH_PATH
def test_a_refused_step_converts_nothing(fused: bool | None) -> None:
    """Parameter 0 could be converted; parameter 1 is refused."""
    params = make_params([(3, 64), (4, 64)])
    optimizer = FusedSGD(params, lr=0.1, momentum=0.9, fused=fused)
    set_grads(params, seed=0)
    optimizer.step()
    optimizer.param_groups[0]["momentum_dtype"] = torch.int8
    params[1].grad = params[1].grad.to_sparse()
    refused(optimizer, "param group 0, parameter 1 .*not support sparse gradients")
    params[1].grad = params[1].grad.to_dense()
    with pytest.warns(UserWarning, match="converted momentum from torch.float32 to int8 blocks, of 2 parameters"):
        optimizer.step()


@EACH_PATH
def test_the_dtype_of_no_momentum_excludes_nothing(fused: bool | None) -> None:
    params, expected = make_params([(3, 64)]), make_params([(3, 64)])
    mine = FusedSGD(params, lr=0.1, momentum_dtype=torch.int8, fused=fused)
    theirs = torch.optim.SGD(expected, lr=0.1)
    set_grads(params, expected, seed=0)
    for p in (*params, *expected):
        p.grad = p.grad.to_sparse()
    mine.step()
    theirs.step()
    assert same_bits(params[0], expected[0])
    assert not mine.state


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.complex64])
@pytest.mark.parametrize("momentum_dtype", [torch.float32, torch.float16])
def test_the_dtype_of_no_momentum_needs_no_kernel(dtype: torch.dtype, momentum_dtype: torch.dtype) -> None:
    (p,), (q,) = make_params([(3, 64)], dtype), make_params([(3, 64)], dtype)
    mine = FusedSGD([p], lr=0.1, momentum_dtype=momentum_dtype, fused=True)
    theirs = FusedSGD([q], lr=0.1, fused=True)
    set_grads([p], [q], seed=0)
    assert mine.explain()[0].path == "kernel"
    mine.step()
    theirs.step()
    assert same_bits(p, q)


@FUSED
def test_a_master_of_another_shape_is_refused_by_refresh(fused: bool) -> None:
    params = make_params([(3, 64)], torch.bfloat16)
    optimizer = FusedSGD(params, lr=0.1, master_weights="float32", fused=fused)
    set_grads(params, seed=0)
    optimizer.step()
    optimizer.state[params[0]]["master"] = torch.zeros(64)
    with pytest.raises(RuntimeError, match="master has another shape"):
        optimizer.refresh_master_weights()
