"""What only a GPU can show. Without one these tests are skipped, each with the reason."""

from __future__ import annotations

import os

import pytest
import torch
from fused_sgd._native import C


@pytest.fixture(autouse=True)
def _gpu(request: pytest.FixtureRequest) -> None:
    assert C is not None
    if not torch.cuda.is_available():
        pytest.skip("there is no NVIDIA GPU here, or a torch without CUDA")
    if obstacle := C.cuda_obstacle(0):
        pytest.skip(obstacle)
    if request.node.get_closest_marker("exclusive") and "PYTEST_XDIST_WORKER" in os.environ:
        pytest.skip("it takes the GPU for itself: run it with `-m exclusive`, without -n")
    torch.cuda.synchronize()  # what the test before left running is not this one's
