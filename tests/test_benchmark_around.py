"""The benchmark of what surrounds a step: that both ways agree, and what a row holds. Not how fast anything is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("rich")
from benchmark_support import benchmarks

TASKS = ("full", "without-scaler", "clip-step", "lars")
FLOORS = {"full": 40, "without-scaler": 32, "clip-step": 24, "lars": 28}


def small() -> Any:
    return benchmarks("shapes").ShapeSet("small", "a few odd sizes", ((7,), (33, 65), (4097,)))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Runs the command on tiny shapes in this process; returns the file it wrote."""
    monkeypatch.setitem(benchmarks("shapes").SHAPE_SETS, "small", small())
    monkeypatch.setattr(benchmarks("around"), "_QUICK_SHAPES", ("small",))
    threads = torch.get_num_threads()

    def run_command(*arguments: str) -> Any:
        whole = ("around", "--quick", "--minutes=1", "--device=cpu", "--threads=1", f"--output={tmp_path}")
        assert benchmarks("commands").main([*whole, *arguments]) == 0
        (file,) = tmp_path.iterdir()
        return benchmarks("files").read(file)

    yield run_command
    torch.set_num_threads(threads)


@pytest.mark.parametrize("task", TASKS)
def test_both_ways_agree(task: str) -> None:
    around = benchmarks("around")
    assert around.check(benchmarks("sequences").TASKS[task], small(), "cpu") <= 1e-5


def test_a_way_that_differs_is_not_timed(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sequences = benchmarks("sequences")
    monkeypatch.setattr(sequences, "MAX_GRAD_NORM", 1.0)
    right = sequences.nn.utils.clip_grad_norm_
    monkeypatch.setattr(
        sequences.nn.utils, "clip_grad_norm_", lambda params, norm, foreach: right(params, 2 * norm, foreach=foreach)
    )
    torchs, ours = run("--tasks=clip-step").rows
    assert (torchs["status"], ours["status"]) == ("wrong", "wrong")
    assert torchs["reason"].startswith("the two ways differ by ")
    assert torchs["microseconds"] is None


def test_rows(run: Any) -> None:
    found = run()
    assert found.header["benchmark"] == "around"
    assert [(row["task"], row["peer"]) for row in found.rows] == [(t, way) for t in TASKS for way in ("torch", "ours")]
    for row in found.rows:
        assert row["status"] == "ok", row["reason"]
        assert row["floor_bytes_per_element"] == FLOORS[row["task"]]
        assert (row["shapes"], row["threads"], row["clock"], row["elements"]) == (
            "small",
            1,
            "wall",
            7 + 33 * 65 + 4097,
        )
        assert row["largest_difference"] <= 1e-5
        assert row["microseconds"]["q1"] <= row["microseconds"]["median"] <= row["microseconds"]["q3"]
        assert row["launches"] is None
        if row["bytes_per_element"] is not None:  # there is a compiler
            floors = row["bytes_per_element"]["median"] / row["ratio_to_floor"]["median"]
            assert floors == pytest.approx(row["floor_bytes_per_element"], rel=1e-3)
        if row["peer"] == "ours":
            assert row["ratio_to_ours"]["median"] == 1
        elif row["task"] == "lars":
            assert "timm" in row["peer_is"]


def test_report(run: Any) -> None:
    found = run("--tasks=lars,clip-step")
    text = benchmarks("around").report_section([found], None)
    assert text.startswith("## Around the step\n")
    assert "| lars | small | 1 | wall |" in text
    assert "| clip-step | small | 1 | wall |" in text
    assert "Not timed" not in text
    assert benchmarks("around").report_section([], None) == ""
