"""The report's section of storage modes."""

from __future__ import annotations

from collections.abc import Sequence

from . import markdown as md
from .files import Run, completed
from .plots import Plots


def report_section(runs: Sequence[Run], plots: Plots) -> str:
    """Of each machine and torch: a table."""
    parts = ["## Storage modes\n"]
    for run in completed(runs, "precision"):
        parts.append(md.heading(run))
        lines = [
            [
                row["peer"],
                row["shapes"],
                str(row["threads"]),
                row["clock"],
                f"{row['bytes_per_parameter']:.3g}",
                f"{row['floor_bytes_per_element']:.4g}",
                md.microseconds(row["microseconds"]["median"]),
                f"{row['gb_per_second']:.1f}",
                md.median(row["percent_of_ceiling"]),
                md.ratio(row["ratio_to_float32"]),
                md.ratio(row["ratio_to_wide"]),
                md.count(row["launches"]),
            ]
            for row in run.rows
            if row["microseconds"] is not None
        ]
        headings = ["mode", "shapes", "threads", "clock", "bytes a parameter", "floor, bytes an element", "time"]
        headings += ["GB/s of its floor", "% of the flat loop", "times float32", "times float32 momentum", "launches"]
        parts.append(md.table(headings, lines, left=2))
        parts.append(md.not_timed(run.rows, "shapes"))
    return "\n".join(part for part in parts if part) if len(parts) > 1 else ""
