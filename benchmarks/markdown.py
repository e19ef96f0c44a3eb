"""Markdown tables and numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .files import Run


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A table whose first columns are aligned to the left, and the others to the right."""
    marks = ["---" if index < left else "---:" for index in range(len(headings))]
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [list(headings), marks, *cells]) + "\n"


def microseconds(value: float | None) -> str:
    """With a unit."""
    if value is None:
        return ""
    return f"{value:.1f} µs" if value < 1e3 else f"{value / 1e3:.2f} ms"


def ratio(quartiles: Mapping[str, float] | None) -> str:
    """The median, with the quartiles behind it."""
    if quartiles is None:
        return ""
    return f"{number(quartiles['median'])} ({number(quartiles['q1'])}–{number(quartiles['q3'])})"


def number(value: float) -> str:
    """Two or three digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def median(quartiles: Mapping[str, float] | None, digits: int = 0) -> str:
    """The median alone."""
    return "" if quartiles is None else f"{quartiles['median']:.{digits}f}"


def count(value: float | None) -> str:
    """An integer, with commas."""
    return "" if value is None else f"{value:,.0f}"


def heading(run: Run) -> str:
    """A run's, with what to bear in mind of it."""
    header = run.header
    notes = [f"[{run.file.name}](results/{run.file.name})"]
    if header["quick"]:
        notes.append("a quick run")
    if header["dirty"]:
        notes.append("the sources differed from the commit")
    if (header.get("load_average") or 0) > 0.5:
        notes.append(f"others used the machine (load average {header['load_average']:.1f})")
    if header.get("left_out"):
        notes.append(f"the time was up before: {', '.join(header['left_out'])}")
    for file, shapes in header.get("completed_by", {}).items():
        notes.append(f"of [{file}](results/{file}): {', '.join(shapes)}")
    return f"### {run.machine}, torch {header['torch']}\n\n{'; '.join(notes)}.\n"


def not_timed(rows: Sequence[Mapping[str, Any]], where: str) -> str:
    """Why peers have no figures, each reason once."""
    seen: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if row["status"] != "ok":
            key = (row["peer"], row["status"], (row["reason"] or "").split("\n")[0][:200])
            if row["status"] == "wrong":  # the error's size differs from one configuration to the next
                key = (row["peer"], "wrong", "")
            place = f"{row[where]} {row['dtype']}"
            if place not in seen.setdefault(key, []):
                seen[key].append(place)
    if not seen:
        return ""
    errors = {(row["peer"], f"{row[where]} {row['dtype']}"): row["reason"] for row in rows if row["status"] == "wrong"}
    lines = []
    for (peer, status, reason), places in seen.items():
        why = reason or errors[(peer, places[0])] or ""
        lines.append([peer, status, why, places[0] if len(places) == 1 else f"{places[0]} and {len(places) - 1} more"])
    return "Not timed:\n\n" + table(["peer", "", "reason", "where"], lines, left=4)
