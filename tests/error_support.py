"""What tests of bad input share."""

from __future__ import annotations

from typing import Any

import pytest
from fused_sgd import FusedSGD
from torch import Tensor

from support import make_params, set_grads, snapshot


def ready(count: int = 3, **options: Any) -> tuple[FusedSGD, list[Tensor]]:
    """An optimizer in mid-run."""
    params = make_params([(4, 3)] * count)
    optimizer = FusedSGD(params, **{"lr": 0.1, "momentum": 0.9, **options})
    set_grads(params, seed=0)
    optimizer.step()
    set_grads(params, seed=1)
    return optimizer, params


def assert_refused(optimizer: FusedSGD, message: str, error: type[Exception] = RuntimeError) -> None:
    unchanged = snapshot(optimizer)
    with pytest.raises(error, match=message):
        optimizer.step()
    unchanged()
