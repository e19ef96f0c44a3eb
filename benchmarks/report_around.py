"""The report's section of what surrounds a step."""

from __future__ import annotations

from collections.abc import Sequence

from . import markdown as md
from .files import Run, completed
from .plots import Plots


def report_section(runs: Sequence[Run], plots: Plots) -> str:
    """Of each machine and torch: a table."""
    parts = ["## Around the step\n"]
    for run in completed(runs, "around"):
        parts.append(md.heading(run))
        lines = []
        for torchs, ours in zip(run.rows[::2], run.rows[1::2], strict=True):
            if torchs["microseconds"] is None or ours["microseconds"] is None:
                continue
            lines.append(
                [
                    ours["task"],
                    ours["shapes"],
                    str(ours["threads"]),
                    ours["clock"],
                    md.microseconds(torchs["microseconds"]["median"]),
                    md.microseconds(ours["microseconds"]["median"]),
                    md.ratio(torchs["ratio_to_ours"]),
                    str(ours["floor_bytes_per_element"]),
                    md.median(ours["bytes_per_element"], 1),
                    md.ratio(ours["ratio_to_floor"]),
                    md.count(torchs["launches"]),
                    md.count(ours["launches"]),
                ]
            )
        headings = ["task", "shapes", "threads", "clock", "torch's way", "ours", "torch's way, times ours"]
        headings += ["floor, bytes an element", "ours, in bytes of the ceiling", "over the floor"]
        headings += ["launches, torch's way", "launches, ours"]
        parts.append(md.table(headings, lines, left=2))
        tasks = {row["task"]: f"{row['task']}: {row['description']} ({row['peer_is']})" for row in run.rows[::2]}
        parts.append("Torch's ways. " + "; ".join(tasks.values()) + ".\n")
        parts.append(md.not_timed(run.rows, "shapes"))
    return "\n".join(part for part in parts if part) if len(parts) > 1 else ""
