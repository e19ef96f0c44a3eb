"""Momentum in another format than is asked for, and checkpoints that another optimizer had in its hands."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from fused_sgd import FusedSGD
from precision_support import FUSED, saved_and_loaded, train

from support import make_params, same_bits, set_grads

pytestmark = pytest.mark.usefixtures("device")

SPLIT = {"master_weights": "split"}
INT8 = {"momentum_dtype": torch.int8}


@pytest.mark.parametrize("momentum", [0, 0.9])
@pytest.mark.parametrize("fused", [None, False])
def test_a_complex_buffer_keeps_its_imaginary_part(fused: bool | None, momentum: float) -> None:
    """momentum_dtype is for real parameters: what is there waits, also while there is no momentum."""
    (p,) = make_params([(5,)], torch.complex64)
    optimizer = FusedSGD([p], lr=0.1, momentum=0.9, fused=fused)
    set_grads([p], seed=0)
    optimizer.step()
    before = optimizer.state[p]["momentum_buffer"].clone()
    saved = optimizer.state_dict()
    other = FusedSGD([p], lr=0.1, momentum=momentum, momentum_dtype=torch.bfloat16, fused=fused)
    other.load_state_dict(saved)
    assert same_bits(other.state[p]["momentum_buffer"], before)
    optimizer.param_groups[0].update(momentum=0, momentum_dtype=torch.bfloat16)
    optimizer.step()
    assert same_bits(optimizer.state[p]["momentum_buffer"], before)
    optimizer.param_groups[0].update(momentum=0.9, momentum_dtype=None)
    optimizer.step()


@pytest.mark.parametrize("fused", [True, False])
def test_momentum_in_another_format_waits_for_momentum(fused: bool) -> None:
    (p,) = make_params([(2, 64)])
    optimizer = FusedSGD([p], lr=0.1, momentum=0.9, fused=fused)
    set_grads([p], seed=0)
    optimizer.step()
    optimizer.param_groups[0].update(momentum=0, momentum_dtype=torch.int8)
    optimizer.step()
    assert optimizer.state[p]["momentum_buffer"].dtype == torch.float32
    optimizer.param_groups[0]["momentum"] = 0.9
    with pytest.warns(UserWarning, match="converted momentum from torch.float32 to int8 blocks"):
        optimizer.step()
    assert optimizer.state[p]["momentum_codes"].dtype == torch.int8


THERE_AND_BACK: list[tuple[torch.dtype, dict[str, Any], list[str]]] = [
    (torch.float32, INT8, ["momentum_codes", "momentum_scale"]),
    (torch.bfloat16, INT8, ["momentum_codes", "momentum_scale"]),
    (torch.bfloat16, SPLIT, ["remainder"]),
    (torch.bfloat16, {"master_weights": torch.float32}, ["master"]),
    (torch.bfloat16, {"stochastic_rounding": True}, ["rounding"]),
    (torch.bfloat16, {"ema_decay": 0.9}, ["ema"]),
]


@FUSED
@pytest.mark.parametrize(("dtype", "options", "dropped"), THERE_AND_BACK, ids=str)
def test_a_checkpoint_that_went_through_torch(
    dtype: torch.dtype, options: dict[str, Any], dropped: list[str], fused: bool
) -> None:
    """It holds torch's momentum, and beside it what torch has loaded, cast and never touched since."""
    (p,) = make_params([(2, 64)], dtype)
    first = FusedSGD([p], lr=0.1, momentum=0.9, fused=fused, **options)
    train(first, [p], range(2))
    between = torch.optim.SGD([p], lr=0.1, momentum=0.9)
    between.load_state_dict(first.state_dict())
    between.param_groups[0].update(fused=None, foreach=None)
    train(between, [p], range(2, 4))
    expected = between.state[p]["momentum_buffer"].clone()
    for again in (options, {}):
        last = FusedSGD([p], lr=0.1, momentum=0.9, fused=fused, **again)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            last.load_state_dict(saved_and_loaded(between.state_dict()))
        texts = [str(warning.message) for warning in caught]
        for key in dropped:
            assert f"fused_sgd: dropped {key}, which another optimizer has cast, of 1 parameter" in texts
        if again.get("momentum_dtype") != torch.int8:
            torch.testing.assert_close(last.state[p]["momentum_buffer"].to(dtype), expected, rtol=0, atol=0)
        assert not set(dropped) & last.state[p].keys() - {"momentum_codes", "momentum_scale"}
        train(last, [p], range(4, 6))
