"""Compares two result files: how much faster or slower each row became, and whether that is more than noise.

    python -m benchmarks compare before.json after.json
    python -m benchmarks compare before.json after.json --repeats again1.json again2.json

The noise band is measured: runs of the same benchmark, machine, torch and commit (those given, and those that lie in
the folders of the two files) are compared with each other, row by row, and 95 of 100 such changes lie within the band.
Make repeated runs by running the benchmark again. Without any, the band is made of the quartiles inside the two runs,
which do not know what differs from one process to the next; the output says so.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import UserError
from .files import Run, read
from .tables import make_console, make_table, show_time

HELP = "ratios between two result files, with a band of noise measured from repeated runs"

_KEY = ("task", "shapes", "model", "dtype", "threads", "clock", "curve", "x", "peer")
_WITHIN = 0.95
Key = tuple[Any, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options."""
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--repeats", type=Path, nargs="+", default=[], metavar="FILE", help="more runs of either")
    parser.add_argument("--all-peers", action="store_true", help="not only ours")


def run(given: argparse.Namespace) -> int:
    """Prints the comparison; returns the exit status."""
    before, after = read(given.before), read(given.after)
    if before.benchmark != after.benchmark:
        raise UserError(
            f"{given.before} is a run of {before.benchmark}, {given.after} one of {after.benchmark}: nothing to compare"
        )
    repeats = [read(file) for file in given.repeats]
    foreign = [it for it in repeats if not (same_setting(it, before) or same_setting(it, after))]
    if foreign:
        raise UserError(f"{foreign[0].file}: is a repeated run of neither: {foreign[0]}")
    repeats += _beside(before, after)
    band, source = noise_band(before, after, repeats)
    changes = compare(before, after, band, given.all_peers)
    if not changes:
        raise UserError(f"{given.before} and {given.after} have no timed row in common")
    _show(before, after, changes, band, source)
    return 0


@dataclass(frozen=True)
class Change:
    """One row in both files; above 1, it became slower."""

    key: Key
    before: float  # microseconds
    after: float
    verdict: str

    @property
    def ratio(self) -> float:
        """After over before."""
        return self.after / self.before


def same_setting(a: Run, b: Run) -> bool:
    """Whether two files are repeated runs: differences between them are noise."""
    keys = ("benchmark", "torch", "commit", "dirty", "quick")
    return a.machine == b.machine and all(a.header.get(key) == b.header.get(key) for key in keys)


def times(run: Run) -> dict[Key, dict[str, float]]:
    """Microseconds by what identifies a row, for those that were timed."""
    found = {}
    for row in run.rows:
        quartiles = row.get("microseconds") or row.get("step_microseconds")
        if quartiles:
            found[_key(row)] = quartiles
    return found


def _key(row: Mapping[str, Any]) -> Key:
    return tuple(row.get(key) for key in _KEY)


def noise_band(before: Run, after: Run, repeats: Sequence[Run]) -> tuple[float, str]:
    """By what factor a row may change for no reason, and how that is known."""
    runs = {run.file.resolve(): run for run in (before, after, *repeats)}.values()
    pairs = [(a, b) for a, b in itertools.combinations(runs, 2) if same_setting(a, b)]
    if before.file.resolve() != after.file.resolve() and same_setting(before, after):
        pairs = [pair for pair in pairs if pair != (before, after)]  # what is asked about proves nothing of itself
    changes = [abs(math.log(mine["median"] / theirs["median"])) for a, b in pairs for mine, theirs in _both(a, b)]
    if changes:
        return math.exp(_quantile(changes)), f"{len(pairs)} pairs of repeated runs, {len(changes)} rows"
    spreads = [math.log(q["q3"] / q["q1"]) for run in (before, after) for q in times(run).values()]
    band = math.exp(_quantile(spreads)) if spreads else 1.0
    return (
        band,
        "quartiles within the two runs alone, for want of repeated runs: run the benchmark again for a real one",
    )


def compare(before: Run, after: Run, band: float, all_peers: bool) -> list[Change]:
    """The rows of both files that were timed in both."""
    theirs = times(after)
    ours = {_key(row) for row in before.rows if row["role"] == "ours"}  # of storage modes, all
    changes = []
    for key, mine in times(before).items():
        if key in theirs and (all_peers or key in ours):
            ratio = theirs[key]["median"] / mine["median"]
            verdict = "slower" if ratio > band else "faster" if ratio < 1 / band else "within the noise"
            changes.append(Change(key, mine["median"], theirs[key]["median"], verdict))
    return changes


def _both(a: Run, b: Run) -> Iterable[tuple[dict[str, float], dict[str, float]]]:
    mine, theirs = times(a), times(b)
    return [(mine[key], theirs[key]) for key in mine if key in theirs]


def _quantile(values: list[float]) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, math.ceil(_WITHIN * len(ordered)) - 1)]


def _beside(before: Run, after: Run) -> list[Run]:
    """Repeated runs in the folders of the two; files that cannot be read are none."""
    found = []
    for folder in {before.file.resolve().parent, after.file.resolve().parent}:
        for file in sorted(folder.glob("*.json")):
            try:
                run = read(file)
            except UserError:
                continue
            # Of runs with changes nobody knows whether the changes were the same.
            if not run.header["dirty"] and (same_setting(run, before) or same_setting(run, after)):
                found.append(run)
    return found


def _show(before: Run, after: Run, changes: list[Change], band: float, source: str) -> None:
    console = make_console()
    console.print(f"before: {before}\nafter:  {after}", highlight=False, soft_wrap=True)
    if before.machine != after.machine or before.header["torch"] != after.header["torch"]:
        console.print("[yellow]Not the same machine and torch: the ratios tell of those as well.")
    table = make_table("row", "before", "after", "after / before", "", left=("row", ""))
    colours = {"slower": "red", "faster": "green"}
    for change in changes:
        row = " · ".join(str(part) for part in change.key if part is not None)
        times_ = show_time(change.before), show_time(change.after)
        table.add_row(row, *times_, f"{change.ratio:.3f}", change.verdict, style=colours.get(change.verdict, ""))
    console.print(table)
    mean = statistics.geometric_mean([change.ratio for change in changes])
    console.print(f"Geometric mean {mean:.3f} over {len(changes)} rows.", highlight=False)
    console.print(f"Noise: {1 / band:.3f} to {band:.3f}, from {source}.", highlight=False, soft_wrap=True)
