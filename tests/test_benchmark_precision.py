"""The benchmark of storage modes: that each mode is SGD, and what a row holds. Not how fast anything is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("rich")
from benchmark_support import benchmarks

SHAPES = ((7,), (33, 65), (40, 64), (4097,))
ELEMENTS = 7 + 33 * 65 + 40 * 64 + 4097
BYTES = {  # a parameter that is in whole blocks: weight, state, and what a step must move
    "float32": (4, 4, 20),
    "float32-int8": (4, 1.0625, 14.125),
    "bfloat16": (2, 2, 10),
    "bfloat16-float32": (2, 4, 14),
    "split": (2, 6, 18),
    "split-bfloat16": (2, 4, 14),
    "split-int8": (2, 3.0625, 12.125),
    "master": (2, 8, 20),
    "stochastic": (2, 2, 10),
    "stochastic-float32": (2, 4, 14),
    "stochastic-int8": (2, 1.0625, 8.125),
}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Runs the command on tiny shapes in this process; returns the file it wrote."""
    shapes = benchmarks("shapes")
    monkeypatch.setitem(shapes.SHAPE_SETS, "small", shapes.ShapeSet("small", "a few odd sizes", SHAPES))
    monkeypatch.setitem(shapes.SHAPE_SETS, "blocks", shapes.ShapeSet("blocks", "whole blocks", ((500, 64),)))
    monkeypatch.setattr(benchmarks("precision"), "_QUICK_SHAPES", ("small",))
    threads = torch.get_num_threads()

    def run_command(*arguments: str) -> Any:
        whole = ("precision", "--quick", "--minutes=1", "--device=cpu", "--threads=1", f"--output={tmp_path}")
        assert benchmarks("commands").main([*whole, *arguments]) == 0
        (file,) = tmp_path.iterdir()
        return benchmarks("files").read(file)

    yield run_command
    torch.set_num_threads(threads)


def test_rows(run: Any) -> None:
    found = run()
    assert found.header["benchmark"] == "precision"
    assert [row["peer"] for row in found.rows] == list(BYTES)
    for row in found.rows:
        assert row["status"] == "ok", row["reason"]
        assert (row["shapes"], row["threads"], row["clock"], row["elements"]) == ("small", 1, "wall", ELEMENTS)
        assert row["error"] <= 2e-2
        assert row["microseconds"]["q1"] <= row["microseconds"]["median"] <= row["microseconds"]["q3"]
        assert row["gb_per_second"] == pytest.approx(
            row["floor_bytes_per_element"] * ELEMENTS / row["microseconds"]["median"] * 1e-3, rel=1e-3
        )
        assert row["launches"] is None
        assert (row["ratio_to_wide"] is None) == ("int8" not in row["peer"])
    assert found.rows[0]["ratio_to_float32"]["median"] == 1


def test_bytes_are_those_of_the_state(run: Any) -> None:
    for row in run("--shapes=blocks").rows:
        weight, state, floor = BYTES[row["peer"]]
        # Stochastic rounding keeps 32 bytes beside a tensor, here of 32,000 elements.
        assert row["state_bytes_per_parameter"] == pytest.approx(state, abs=2e-3)
        assert row["bytes_per_parameter"] == pytest.approx(weight + state, abs=2e-3)
        assert row["floor_bytes_per_element"] == pytest.approx(floor, abs=4e-3)


def test_a_mode_that_is_wrong_is_not_timed(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    precision = benchmarks("precision")
    right = precision.make
    monkeypatch.setattr(precision, "make", lambda mode, work, lr: right(mode, work, 2 * lr))
    base, split = run("--modes=float32,split").rows
    assert (base["status"], split["status"]) == ("wrong", "wrong")
    assert base["reason"].startswith("error ")
    assert base["microseconds"] is None


def test_a_mode_that_cannot_run_is_a_row(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmarks("precision"), "available_bytes", lambda device: 10)
    (row,) = run("--modes=split-int8").rows
    assert (row["status"], row["ratio_to_float32"], row["ratio_to_wide"]) == ("skipped", None, None)
    assert "are free" in row["reason"]


def test_report(run: Any) -> None:
    found = run("--modes=float32,split,split-int8")
    text = benchmarks("precision").report_section([found], None)
    assert text.startswith("## Storage modes\n")
    assert "| split-int8 | small | 1 | wall |" in text
    assert "Not timed" not in text
    assert benchmarks("precision").report_section([], None) == ""
