"""What every test stands on: the INSTALLED package, with its compiled module."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import fused_sgd
import pytest
import torch
from fused_sgd._native import C, why_missing

CHECKOUT = Path(__file__).resolve().parents[1]


def pytest_sessionstart() -> None:
    if CHECKOUT in Path(fused_sgd.__file__).resolve().parents and ".venv" not in fused_sgd.__file__:
        raise pytest.UsageError(
            f"the tests must run on the installed package, and {fused_sgd.__file__} is the checkout"
        )
    if C is None:
        raise pytest.UsageError(f"the tests need the compiled module: {why_missing}")


def instruction_sets(fast_fma_only: bool = False) -> list[str]:
    assert C is not None
    return [name for name, runs_here, fast in C.instruction_sets() if runs_here and (fast or not fast_fma_only)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "isa" in metafunc.fixturenames:
        metafunc.parametrize("isa", instruction_sets(), indirect=True)
    if "fma_isa" in metafunc.fixturenames:
        metafunc.parametrize("fma_isa", instruction_sets(fast_fma_only=True), indirect=True)


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test once with every instruction set of this machine."""
    assert C is not None
    before = C.instruction_set()
    C.select_instruction_set(request.param)
    yield request.param
    C.select_instruction_set(before)


@pytest.fixture
def fma_isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The same, but only with those that have a fast fma."""
    yield from isa.__wrapped__(request)  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fills memory from torch.empty() with NaN, so that reading it shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
