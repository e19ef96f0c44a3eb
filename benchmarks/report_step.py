"""The report's section of steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from . import markdown as md
from .files import Run, completed
from .plots import Plots, slug

Row = Mapping[str, Any]
_FOOTPRINT_SHAPES = ("resnet50", "gpt2", "resnet20", "tiny161")  # the first of them that was measured


def report_section(runs: Sequence[Run], plots: Plots) -> str:
    """Of each machine and torch: times, ratios, bandwidth and footprints."""
    parts = ["## One step\n"]
    for run in completed(runs, "step"):
        parts.append(md.heading(run))
        clocks = list(dict.fromkeys(row["clock"] for row in run.rows))
        parts += [_plots(run, clock, plots) for clock in clocks]
        parts += [_table(run, clock) for clock in clocks]
        parts += [_footprints(run), md.not_timed(run.rows, "shapes")]
    return "\n".join(part for part in parts if part) if len(parts) > 1 else ""


def _key(row: Row) -> tuple[str, str, int]:
    return row["shapes"], row["dtype"], row["threads"]


def _by_key(rows: Sequence[Row], clock: str) -> dict[tuple[str, str, int], dict[str, Row]]:
    found: dict[tuple[str, str, int], dict[str, Row]] = {}
    for row in rows:
        if row["clock"] == clock:
            found.setdefault(_key(row), {})[row["peer"]] = row
    return found


def _peers(rows: Sequence[Row], *roles: str) -> list[str]:
    """Those that have figures somewhere."""
    timed = dict.fromkeys(row["peer"] for row in rows if row["role"] in roles and row["microseconds"])
    return list(timed)


def _table(run: Run, clock: str) -> str:
    peers = _peers([row for row in run.rows if row["clock"] == clock], "peer")
    lines = []
    for (shapes, dtype, threads), by_peer in _by_key(run.rows, clock).items():
        ours = by_peer.get("ours")
        if ours is None:
            continue
        time = ours["microseconds"]
        lines.append(
            [
                shapes,
                dtype,
                str(threads),
                md.microseconds(time and time["median"]) + (" †" if ours["host_bound"] else ""),
                "" if ours["gb_per_second"] is None else md.number(ours["gb_per_second"]),
                md.median(ours["percent_of_ceiling"]),
                md.median(ours["percent_of_copy"]),
                *(_ratio(by_peer.get(peer)) for peer in peers),
            ]
        )
    if not lines:
        return ""
    headings = ["shapes", "dtype", "threads", "ours", "GB/s", "% of flat", "% of copy", *peers]
    text = f"{clock.capitalize()} time of a step; the peers as ratios, with quartiles:\n\n" + md.table(
        headings, lines, 2
    )
    if any(row["host_bound"] and row["clock"] == clock for row in run.rows):
        text += "\n† waits for the host are part of this time.\n"
    return text


def _ratio(row: Row | None) -> str:
    if row is None:
        return ""
    if row["status"] != "ok":
        return str(row["status"])
    return md.ratio(row["ratio_to_ours"]) + (" †" if row["host_bound"] else "")


def _plots(run: Run, clock: str, plots: Plots) -> str:
    rows = [row for row in run.rows if row["clock"] == clock]
    if not any(row["microseconds"] for row in rows):
        return ""
    threads = max(row["threads"] for row in rows)
    parts = []
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        chosen = {
            key[0]: by_peer
            for key, by_peer in _by_key(rows, clock).items()
            if key[1:] == (dtype, threads) and any(row["microseconds"] for row in by_peer.values())
        }
        if not chosen:
            continue
        flat = [row for by_peer in chosen.values() for row in by_peer.values()]
        name = slug(f"{run.machine} {run.header['torch']} {dtype} {clock}")
        where = f"{dtype}, {threads} threads" if run.header["device"]["kind"] == "cpu" else dtype
        shapes = list(chosen)

        def column(peer: str, figure: str, chosen: Mapping[str, Mapping[str, Row]] = chosen) -> list[Any]:
            return [by_peer[peer][figure] if peer in by_peer else None for by_peer in chosen.values()]

        times = {peer: column(peer, "microseconds") for peer in _peers(flat, "ours", "peer")}
        ratios = {peer: column(peer, "ratio_to_ours") for peer in _peers(flat, "peer")}
        speeds = {
            peer: [speed and dict.fromkeys(("q1", "median", "q3"), speed) for speed in column(peer, "gb_per_second")]
            for peer in ("ours", "fused", "foreach", "flat", "copy")
            if any(column(peer, "gb_per_second"))
        }
        parts.append(plots.bars(f"time-{name}", f"{clock} time of a step ({where})", "µs", shapes, times))
        if any(any(its) for its in ratios.values()):
            title = f"{clock} time over FusedSGD's, with quartiles ({where})"
            parts.append(plots.bars(f"ratio-{name}", title, "times ours", shapes, ratios, line=1))
        title = f"bandwidth against the ceilings, {clock} time ({where})"
        parts.append(plots.bars(f"bandwidth-{name}", title, "GB/s", shapes, speeds, log=False))
    return "\n".join(parts)


def _footprints(run: Run) -> str:
    measured = {row["shapes"] for row in run.rows if row["operators"] is not None}
    shapes = next((name for name in _FOOTPRINT_SHAPES if name in measured), None)
    if shapes is None:
        return ""
    lines, seen = [], set()
    for row in run.rows:
        if row["shapes"] != shapes or row["operators"] is None or row["role"] == "ceiling":
            continue
        if (row["dtype"], row["peer"]) in seen:
            continue
        seen.add((row["dtype"], row["peer"]))
        state = row["state_bytes_per_parameter"]
        lines.append(
            [
                row["peer"],
                row["dtype"],
                md.count(row["launches"]),
                md.count(row["copies"]),
                md.count(row["operators"]),
                md.count(row["peak_extra_bytes"]),
                "" if state is None else f"{state:.2f}",
                "yes" if row["writes_gradients"] else "",
            ]
        )
    headings = ["peer", "dtype", "launches", "copies and fills", "torch operators", "peak extra bytes"]
    headings += ["state bytes a parameter", "writes gradients"]
    return f"What one step over {shapes} asks for besides time:\n\n" + md.table(headings, lines, left=2)
