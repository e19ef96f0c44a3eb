"""What became of the stages of gpu_check.py, and of the tests in one."""

from __future__ import annotations

import dataclasses
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any


@dataclasses.dataclass
class Stage:
    """One line of the table."""

    name: str
    status: str = "never run"
    seconds: float = 0.0
    summary: str = ""
    details: dict[str, Any] = dataclasses.field(default_factory=dict)


def table(stages: Sequence[Stage]) -> str:
    rows = [("stage", "status", "seconds", "")]
    rows += [(stage.name, stage.status, f"{stage.seconds:.1f}", stage.summary) for stage in stages]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        f"{name:{widths[0]}}  {status:{widths[1]}}  {seconds:>{widths[2]}}  {summary}".rstrip()
        for name, status, seconds, summary in rows
    )


def count(report: Path) -> dict[str, Any]:
    """What became of the tests in a JUnit report."""
    counts: dict[str, Any] = {"passed": 0, "on_cuda": 0, "failed": 0, "skipped": 0, "failures": []}
    if not report.exists():
        return counts
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname', '')}::{case.get('name', '')}"
        failure = case.find("failure") if case.find("failure") is not None else case.find("error")
        if failure is not None:
            counts["failed"] += 1
            counts["failures"].append({"test": name, "message": (failure.get("message") or "")[:500]})
        elif case.find("skipped") is not None:
            counts["skipped"] += 1
        else:
            counts["passed"] += 1
            parameters = name.partition("[")[2].rstrip("]").split("-")  # of a test in tests/cuda, or …[cuda-…]
            counts["on_cuda"] += name.startswith("tests.cuda.") or "cuda" in parameters
    return counts
