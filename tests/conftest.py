"""What every test stands on: the INSTALLED package, with its compiled module."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import fused_sgd
import pytest
import torch
from fused_sgd._native import C, why_missing

CHECKOUT = Path(__file__).resolve().parents[1]
MARKS = {
    "torch_free": "builds or runs what does not depend on torch's version, at length",
    "cpu_only": "of a module whose tests run on every device, one that says nothing about GPUs",
    "exclusive": "takes a GPU for itself; skipped by the workers of pytest-xdist",
    "xdist_group": "pytest-xdist's own, for where it is not installed",
    "sanitizer": "small enough for compute-sanitizer, which makes a kernel 10 to 100 times slower",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--devices", default="", metavar="cpu,cuda", help="where to run; by default wherever one can")


def pytest_configure(config: pytest.Config) -> None:
    for mark, meaning in MARKS.items():
        config.addinivalue_line("markers", f"{mark}: {meaning}")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Puts each failure into the file that $FAILURES names, at once: a machine's time may end before pytest's."""
    if report.failed and (file := os.environ.get("FAILURES")) and "PYTEST_XDIST_WORKER" not in os.environ:
        with Path(file).open("a", encoding="utf-8") as failures:
            failures.write(f"===== {report.nodeid}, {report.when}\n{report.longreprtext}\n\n")


def pytest_sessionstart() -> None:
    if Path(fused_sgd.__file__).resolve().parent == CHECKOUT / "fused_sgd":
        raise pytest.UsageError(
            f"the tests must run on the installed package, and {fused_sgd.__file__} is the checkout"
        )
    if C is None:
        raise pytest.UsageError(f"the tests need the compiled module: {why_missing}")


def instruction_sets(fast_fma_only: bool = False) -> list[str]:
    assert C is not None
    return [name for name, runs_here, fast in C.instruction_sets() if runs_here and (fast or not fast_fma_only)]


def devices(config: pytest.Config) -> list[str]:
    assert C is not None
    if chosen := config.getoption("--devices"):
        return str(chosen).split(",")
    return ["cpu", "cuda"] if torch.cuda.is_available() and not C.cuda_obstacle(0) else ["cpu"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    assert C is not None
    here = ["cpu"] if metafunc.definition.get_closest_marker("cpu_only") else devices(metafunc.config)
    for isa in ("isa", "fma_isa"):
        if isa not in metafunc.fixturenames:
            continue
        sets = instruction_sets(fast_fma_only=isa == "fma_isa")
        if "device" not in metafunc.fixturenames:
            return metafunc.parametrize(isa, sets, indirect=True)
        where = [("cpu", name) for name in sets if "cpu" in here]
        where += [(device, C.instruction_set()) for device in here if device != "cpu"]  # a GPU does not care
        return metafunc.parametrize(("device", isa), where, indirect=True)
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", here, indirect=True)
    return None


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test once on every device; tensors that it makes, and helpers make, are there unless they say otherwise.

    A module takes part with `pytestmark = pytest.mark.usefixtures("device")`. Tests that only make sense on the CPU are
    marked cpu_only; those that only make sense on a GPU are in tests/cuda.
    """
    if request.param != "cpu":
        torch.set_default_device(request.param)
    yield request.param
    torch.set_default_device(None)


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
