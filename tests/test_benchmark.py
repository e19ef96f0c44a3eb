"""The benchmark's harness: that it runs, what its file holds, and how it refuses. Not how fast anything is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("rich")

STEP = Path(__file__).resolve().parents[1] / "benchmarks" / "step.py"
PEERS = {"ours": "ours", "fused": "peer", "foreach": "peer", "loop": "peer", "nothing": "floor", "flat": "ceiling"}


def run_step(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(STEP), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=120, check=False)


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The file of a run over two small shape sets, of which one has a param group per tensor."""
    folder = tmp_path_factory.mktemp("results")
    sets = "--shapes=tiny161_groups,resnet20"
    done = run_step("--quick", sets, "--threads=1", f"--output={folder}", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "Summary" in done.stdout
    (file,) = folder.iterdir()
    assert str(file) in done.stdout
    return json.loads(file.read_text())


def test_header(result: dict[str, Any]) -> None:
    import fused_sgd
    from fused_sgd import _C

    assert result["protocol"] == 1
    assert result["benchmark"] == "step"
    assert result["torch"] == torch.__version__
    assert result["fused_sgd"] == {
        "version": fused_sgd.__version__,
        "instruction_set": _C.instruction_set(),
        "missing": None,
    }
    assert result["device"]["kind"] == "cpu"
    assert result["device"]["name"]
    assert result["threads"] == [1]
    assert result["quick"] is True
    assert result["hyperparameters"]["momentum"] == 0.9
    assert {"commit", "dirty", "date", "compiler", "cuda", "python", "system", "load_average"} <= result.keys()
    # A second OpenMP runtime would disturb every figure.
    assert result["openmp_runtimes"] == 1


def test_one_row_for_each_peer_of_each_configuration(result: dict[str, Any]) -> None:
    found = [(row["shapes"], row["dtype"], row["threads"], row["peer"]) for row in result["rows"]]
    assert found == [
        (shapes, dtype, 1, peer)
        for shapes in ("tiny161_groups", "resnet20")
        for dtype in ("float32", "bfloat16")
        for peer in PEERS
    ]


def test_rows(result: dict[str, Any]) -> None:
    for row in result["rows"]:
        assert row["role"] == PEERS[row["peer"]]
        assert row["clock"] == "wall"
        item = {"float32": 4, "bfloat16": 2}[row["dtype"]]
        assert row["elements"] == {"tiny161_groups": 161 * 16, "resnet20": 272_474}[row["shapes"]]
        assert row["param_groups"] == {"tiny161_groups": 161, "resnet20": 1}[row["shapes"]]
        assert row["floor_bytes"] == 5 * item * row["elements"]
        if row["peer"] == "fused" and row["dtype"] == "bfloat16" and row["status"] == "wrong":
            continue  # torch 2.13
        assert row["status"] == "ok", row
        time, ratio, percent = row["microseconds"], row["ratio_to_ours"], row["percent_of_ceiling"]
        assert 0 < time["q1"] <= time["median"] <= time["q3"]
        assert 0 < ratio["q1"] <= ratio["median"] <= ratio["q3"]
        assert row["rounds"] >= 3
        if row["role"] == "floor":
            assert percent is None
            assert row["gb_per_second"] is None
        else:
            assert 0 < percent["q1"] <= percent["median"] <= percent["q3"]
            assert row["gb_per_second"] == pytest.approx(row["floor_bytes"] / time["median"] * 1e-3, rel=1e-3)
        if row["peer"] in ("ours", "flat"):
            same = {"ours": ratio, "flat": percent}[row["peer"]]
            assert same["median"] == {"ours": 1, "flat": 100}[row["peer"]]


def test_a_wrong_peer_is_reported_and_never_timed(result: dict[str, Any]) -> None:
    for row in result["rows"]:
        if row["status"] != "ok":
            assert row["status"] == "wrong"
            assert "allowed" in row["reason"]
            assert row["microseconds"] is row["ratio_to_ours"] is row["gb_per_second"] is None


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--shapes=resnet51", "unknown shape set 'resnet51'; choose from resnet50, vit_b16, gpt2,"),
        ("--dtypes=float32,int8", "unknown dtype 'int8'; choose from float32, bfloat16"),
        ("--threads=0", "unknown number of threads '0'; choose from 1"),
        ("--peers=ours,apex", "unknown peer 'apex'; choose from ours, fused, foreach, loop, nothing, flat"),
        (f"--output={STEP}", f"cannot write to {STEP}"),
    ],
)
def test_bad_input(argument: str, message: str, tmp_path: Path) -> None:
    done = run_step(argument, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not any(tmp_path.iterdir())
