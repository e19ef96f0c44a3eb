"""The report's section of whole training steps."""

from __future__ import annotations

from collections.abc import Sequence

from . import markdown as md
from .files import Run, newest
from .plots import Plots


def report_section(runs: Sequence[Run], plots: Plots) -> str:
    """Of each machine and torch: a table."""
    parts = ["## Whole training steps\n"]
    for run in newest(runs, "training"):
        parts.append(md.heading(run))
        lines = []
        for row in run.rows:
            if row["share_percent"] is None:
                continue
            lines.append(
                [
                    row["model"],
                    row["peer"],
                    md.microseconds(row["gradients_microseconds"]["median"]),
                    md.microseconds(row["step_microseconds"]["median"]),
                    f"{md.median(row['share_percent'], 1)} %",
                    md.ratio(row["ratio_to_ours"]),
                ]
            )
        headings = ["model", "peer", "forward and backward", "step", "the step's share", "whole step, times ours"]
        parts.append(md.table(headings, lines, left=2))
        models = {row["model"]: f"{row['description']}, batch {row['batch']}" for row in run.rows}
        parts.append("; ".join(f"{name}: {described}" for name, described in models.items()) + ".\n")
        parts.append(md.not_timed(run.rows, "model"))
    return "\n".join(part for part in parts if part) if len(parts) > 1 else ""
