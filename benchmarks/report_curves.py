"""The report's section of curves."""

from __future__ import annotations

from collections.abc import Sequence

from . import fits
from . import markdown as md
from .files import Run, newest
from .plots import Plots, slug

_AXES = {
    "tensors": ("tensors, of equal bytes together", True),
    "alone": ("tensors, of equal bytes together; no other optimizer's steps between", True),
    "bytes": ("bytes moved a step, one tensor", True),
    "groups": ("param groups of 1000 tensors of 16", True),
    "threads": ("threads, ResNet-50", False),
}


def report_section(runs: Sequence[Run], plots: Plots) -> str:
    """Of each machine and torch: a plot and a table for each curve, and the fits."""
    parts = ["## Cost curves\n"]
    for run in newest(runs, "curves"):
        parts.append(md.heading(run))
        clocks = list(dict.fromkeys(row["clock"] for row in run.rows))
        for clock in clocks:
            parts += [_curve(run, name, clock, plots) for name in _AXES]
            said = fits.sentences(run.rows, clock, run.header["device"]["last_level_cache_bytes"])
            if said:
                parts.append("Straight lines through them:\n\n" + "".join(f"- {sentence}\n" for sentence in said))
    return "\n".join(part for part in parts if part) if len(parts) > 1 else ""


def _curve(run: Run, name: str, clock: str, plots: Plots) -> str:
    peers = dict.fromkeys(row["peer"] for row in run.rows)
    series = {}
    for peer in peers:
        points = fits.curve(run.rows, name, peer, clock)
        if points:
            series[peer] = [(row["x"], row["microseconds"]["median"]) for row in points]
    if not series:
        return ""
    label, log = _AXES[name]
    file = slug(f"{name} {run.machine} {run.header['torch']} {clock}")
    picture = plots.lines(f"curve-{file}", f"{clock} time against {name}", label, "µs a step", series, log)
    xs = sorted({x for points in series.values() for x, _ in points})
    lines = [[f"{x:,.0f}", *(md.microseconds(dict(points).get(x)) for points in series.values())] for x in xs]
    return f"{picture}\n{md.table([label, *series], lines, left=0)}"
