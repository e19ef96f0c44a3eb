"""What a person sees: a table for each configuration, and the key ratios at the end."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .measure import Quartiles
from .results import Row

_BUSY = 0.5  # load average
_SUMMARY_PEERS = ("fused", "foreach", "loop", "compiled", "optimi")


def make_console() -> Console:
    """As wide as the terminal; where there is none, as wide as the tables."""
    console = Console()
    return console if console.is_terminal else Console(width=120)


def show_header(console: Console, header: Mapping[str, Any]) -> None:
    """What is measured, and where."""
    device, ours = header["device"], header["fused_sgd"]
    commit = f"{(header['commit'] or 'unknown')[:7]}{' with changes' if header['dirty'] else ''}"
    console.print(f"[bold]{device['name']}[/], {device['cores']} cores · torch {header['torch']} · commit {commit}")
    if ours["missing"]:
        console.print(f"[yellow]fused_sgd's compiled module is missing: {escape(ours['missing'])}")
    else:
        console.print(f"fused_sgd {ours['version']} ({ours['instruction_set']})")
    if (header["load_average"] or 0) > _BUSY:
        console.print(
            f"[yellow]Others use this machine (load average {header['load_average']:.1f}): expect wide quartiles, and"
            " with several threads figures many times too large, since each waits for the slowest.",
            soft_wrap=True,
        )


def show_configuration(console: Console, rows: list[Row]) -> None:
    """One table: the peers of a configuration."""
    it = rows[0].configuration
    console.print(
        f"\n[bold]{it}[/]   {it.description}: {it.tensors} tensors, {it.elements / 1e6:.4g} M elements,"
        f" working set {it.working_set_bytes / 1e6:.4g} MB",
        highlight=False,
        soft_wrap=True,
    )
    ceilings = ("% of flat", "% of copy")
    table = make_table("peer", it.clock, "quartiles", "time / ours", "quartiles", "GB/s", *ceilings, left=("peer",))
    for row in rows:
        name = row.peer if row.role in ("peer", "ours") else f"{row.peer} ({row.role})"
        if row.microseconds is None:
            table.add_row(name, f"[dim]{row.status}" if row.status == "skipped" else f"[red]{row.status}")
            continue
        time, times = (
            show_time(row.microseconds.median),
            f"{show_time(row.microseconds.q1)} – {show_time(row.microseconds.q3)}",
        )
        ratio = ratios = ""
        if row.ratio_to_ours is not None and row.role != "ours":
            ratio = _ratio(row.ratio_to_ours.median)
            ratios = f"{_ratio(row.ratio_to_ours.q1)} – {_ratio(row.ratio_to_ours.q3)}"
        speed = "" if row.gb_per_second is None else f"{row.gb_per_second:.1f}"
        percents = [] if row.role == "ceiling" else [_percent(row.percent_of_ceiling), _percent(row.percent_of_copy)]
        time += " (waits for the host)" if row.host_bound else ""
        table.add_row(name, time, times, ratio, ratios, speed, *percents, style="bold" if row.role == "ours" else "")
    console.print(table)
    for row in rows:
        if row.reason:
            colour = "dim" if row.status == "skipped" else "red"
            console.print(f"  [{colour}]{row.peer} {row.status}[/]: {escape(row.reason)}", soft_wrap=True)


def show_summary(console: Console, rows: list[Row]) -> None:
    """One line for each configuration: how many times ours the others take."""
    console.print("\n[bold]Summary[/]   medians; the peers as time / ours")
    table = make_table(
        "shapes", "dtype", "threads", "clock", "ours", "% of flat", *_SUMMARY_PEERS, left=("shapes", "dtype", "clock")
    )
    for it, group in groupby(rows, key=lambda row: row.configuration):
        by_peer = {row.peer: row for row in group}
        ours = by_peer.get("ours")
        time = percent = ""
        if ours is not None:
            time = f"[red]{ours.status}" if ours.microseconds is None else show_time(ours.microseconds.median)
            percent = _percent(ours.percent_of_ceiling)
        ratios = [_summary_ratio(by_peer.get(peer)) for peer in _SUMMARY_PEERS]
        table.add_row(it.shapes, it.dtype, str(it.threads), it.clock, time, percent, *ratios)
    console.print(table)


def make_table(*headings: str, left: tuple[str, ...]) -> Table:
    """An empty table; columns are aligned to the right but for those named."""
    table = Table()
    for heading in headings:
        table.add_column(heading, justify="left" if heading in left else "right", no_wrap=True)
    return table


def _summary_ratio(row: Row | None) -> str:
    if row is None:
        return ""
    if row.status != "ok":
        return f"[dim]{row.status}" if row.status == "skipped" else f"[red]{row.status}"
    return "" if row.ratio_to_ours is None else _ratio(row.ratio_to_ours.median)


def show_time(microseconds: float) -> str:
    """With a unit."""
    return f"{microseconds:.1f} µs" if microseconds < 1e3 else f"{microseconds / 1e3:.2f} ms"


def _ratio(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio >= 0.1 else f"{ratio:.1g}"


def _percent(quartiles: Quartiles | None) -> str:
    return "" if quartiles is None else f"{quartiles.median:.0f}"
