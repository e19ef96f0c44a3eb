"""`make gpu-check` on whatever machine this is: it names what is missing, and runs every stage that was asked for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).resolve().parent / "gpu_check.py"


def check(out: Path, *arguments: str, **environment: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    command = [sys.executable, str(SCRIPT), f"--out={out}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment or None, cwd="/")
    file = out / "gpu-check.json"
    return done, json.loads(file.read_text()) if file.exists() else {}


def test_it_names_what_is_missing_and_goes_on(tmp_path: Path) -> None:
    done, result = check(tmp_path, "--stages=look", PATH="/nowhere", CUDA_HOME="/nowhere")
    assert done.returncode == 1, done.stdout + done.stderr
    (look,) = result["stages"]
    assert look["status"] == "FAILED"
    assert {"nvcc", "compute-sanitizer"} <= set(look["details"]["missing"])
    assert "missing: " in look["summary"]
    assert "compute-sanitizer" in look["summary"]
    if not torch.cuda.is_available():
        assert "sees no GPU" in look["summary"]
    assert "look   FAILED" in done.stdout  # the table
    assert "look   FAILED" in (tmp_path / "gpu-check.log").read_text()


def test_what_the_json_tells(tmp_path: Path) -> None:
    _, result = check(tmp_path, "--stages=look", PATH="/usr/bin:/bin", COMMIT="abc")
    assert result["commit"] == "abc"
    assert result["machine"]["torch"] == torch.__version__
    assert {"python", "packages", "nvcc", "sanitizer", "driver", "cmake"} <= result["machine"].keys()
    assert all({"name", "status", "seconds", "summary", "details"} == stage.keys() for stage in result["stages"])


def test_an_unknown_stage_is_refused(tmp_path: Path) -> None:
    done, result = check(tmp_path, "--stages=look,nonsense")
    assert done.returncode == 2
    assert "unknown: nonsense; there are look, build, " in done.stderr
    assert not result


@pytest.mark.parametrize(
    ("name", "on_cuda"),
    [
        ("tests.cuda.test_bits::test_a[3]", True),
        ("tests.test_equality::test_b[cuda-avx2-True]", True),
        ("tests.test_equality::test_b[True-cuda]", True),
        ("tests.test_equality::test_b[cpu-avx2-True]", False),
        ("tests.test_build::test_cuda_kernels_compile", False),
    ],
    ids=["folder", "first", "last", "cpu", "name"],
)
def test_counting_tests_on_a_gpu(tmp_path: Path, name: str, on_cuda: bool) -> None:
    from gpu_stages import count

    classname, _, test = name.partition("::")
    report = tmp_path / "report.xml"
    passed = f'<testcase classname="{classname}" name="{test}"/>'
    skipped = '<testcase classname="a" name="b"><skipped message="no GPU"/></testcase>'
    failed = '<testcase classname="a" name="c"><failure message="it broke"/></testcase>'
    report.write_text(f"<testsuites><testsuite>{passed}{skipped}{failed}</testsuite></testsuites>")
    counts = count(report)
    assert (counts["passed"], counts["skipped"], counts["failed"]) == (1, 1, 1)
    assert counts["on_cuda"] == on_cuda
    assert counts["failures"] == [{"test": "a::c", "message": "it broke"}]
