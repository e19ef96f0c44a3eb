"""Straight lines through cost curves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

CACHES = 4  # a working set beyond so many last-level caches lives in memory
# The objects of so many tensors (parameter, gradient, momentum buffer) take 2 MB or less, which stay in a cache between
# steps. Beyond, an extra tensor costs what it takes to fetch them, and the curve is no line.
MANY_TENSORS = 1000
_BENT = 0.3  # so far off, points make no line


@dataclass(frozen=True)
class Line:
    """``y = at_zero + slope * x``, and how far the worst point is from it, relative to itself."""

    at_zero: float
    slope: float
    worst: float
    points: int


def fit_line(xs: Sequence[float], ys: Sequence[float]) -> Line | None:
    """Least squares of the relative errors, since each point's noise is in proportion to it.

    Returns:
        The line, or None with fewer than three points or a single x: two points always lie on a line.
    """
    if len(xs) < 3 or len(set(xs)) < 2:
        return None
    weights = [1 / (y * y) for y in ys]
    total = sum(weights)
    x_mean = sum(w * x for w, x in zip(weights, xs, strict=True)) / total
    y_mean = sum(w * y for w, y in zip(weights, ys, strict=True)) / total
    spread = sum(w * (x - x_mean) ** 2 for w, x in zip(weights, xs, strict=True))
    slope = sum(w * (x - x_mean) * (y - y_mean) for w, x, y in zip(weights, xs, ys, strict=True)) / spread
    at_zero = y_mean - slope * x_mean
    worst = max(abs(at_zero + slope * x - y) / y for x, y in zip(xs, ys, strict=True))
    return Line(at_zero, slope, worst, len(xs))


def curve(rows: Iterable[Mapping[str, Any]], name: str, peer: str, clock: str) -> list[Mapping[str, Any]]:
    """The timed rows of one peer along a curve, in order."""
    found = [
        row
        for row in rows
        if (row["curve"], row["peer"], row["clock"], row["status"]) == (name, peer, clock, "ok") and row["microseconds"]
    ]
    return sorted(found, key=lambda row: float(row["x"]))


def cost_per_tensor(
    rows: Iterable[Mapping[str, Any]], peer: str, clock: str, many: bool = False, alone: bool = False
) -> Line | None:
    """Seconds against the number of tensors, at equal bytes: up to MANY_TENSORS, or from there on.

    ``alone`` or in turn with the other peers.
    """
    points = [
        row
        for row in curve(rows, "alone" if alone else "tensors", peer, clock)
        if (row["x"] >= MANY_TENSORS if many else row["x"] <= MANY_TENSORS)
    ]
    return fit_line([row["x"] for row in points], [row["microseconds"]["median"] * 1e-6 for row in points])


def cost_per_byte(rows: Iterable[Mapping[str, Any]], peer: str, clock: str, cache_bytes: int | None) -> Line | None:
    """Seconds against bytes moved, beyond the cache."""
    points = [
        row for row in curve(rows, "bytes", peer, clock) if row["working_set_bytes"] > CACHES * (cache_bytes or 0)
    ]
    return fit_line([row["x"] for row in points], [row["microseconds"]["median"] * 1e-6 for row in points])


def sentences(rows: Sequence[Mapping[str, Any]], clock: str, cache_bytes: int | None) -> list[str]:
    """What the fits say, a line for each peer and curve."""
    said = []
    peers = dict.fromkeys(row["peer"] for row in rows if row["role"] != "floor")
    for alone, many in ((True, False), (True, True), (False, False), (False, True)):
        for peer in peers:
            line = cost_per_tensor(rows, peer, clock, many, alone)
            if line is not None:
                said.append(
                    f"{peer}, {'alone' if alone else 'in turn with others'}: {line.slope * 1e9:.1f} ns per extra tensor"
                    f" {'beyond' if many else 'up to'} {MANY_TENSORS} ({clock} time, {line.points} points, worst"
                    f" {line.worst:.0%} off the line{', which they hardly make' if line.worst > _BENT else ''})"
                )
    for peer in peers:
        line = cost_per_byte(rows, peer, clock, cache_bytes)
        if line is not None:
            said.append(
                f"{peer}: {1e-9 / line.slope:.1f} GB/s beyond the cache ({clock} time, {line.points} points, worst"
                f" {line.worst:.0%} off the line)"
            )
    return said
