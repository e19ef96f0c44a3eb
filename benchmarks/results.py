"""What a run found: rows, and the file they are written to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from measure import Quartiles, Samples
from verify import Check
from workload import Workload

PROTOCOL = 1
"""Raised when figures of older files can no longer be compared with new ones."""

OURS, CEILING = "ours", "flat"
ROLES = {OURS: "ours", "nothing": "floor", CEILING: "ceiling"}  # all others are peers


@dataclass(frozen=True)
class Configuration:
    """What the peers of one table have in common."""

    shapes: str
    description: str
    tensors: int
    param_groups: int
    elements: int
    floor_bytes: int  # that a step must move
    working_set_bytes: int
    dtype: str
    threads: int
    clock: str

    @classmethod
    def of(cls, workload: Workload, threads: int, clock: str) -> Configuration:
        """Describes a workload."""
        it = workload.shape_set
        item = workload.dtype.itemsize
        return cls(
            shapes=it.name,
            description=it.description,
            tensors=len(it.shapes),
            param_groups=it.param_groups,
            elements=it.elements,
            floor_bytes=workload.floor_bytes,
            working_set_bytes=3 * item * it.elements,
            dtype=str(workload.dtype).removeprefix("torch."),
            threads=threads,
            clock=clock,
        )

    def __str__(self) -> str:
        return f"{self.shapes} · {self.dtype} · {self.threads} thread{'s' if self.threads > 1 else ''}"


@dataclass(frozen=True)
class Row:
    """One peer in one configuration. ``status`` is ok, wrong (its result) or failed (to run)."""

    configuration: Configuration
    peer: str
    role: str
    status: str
    reason: str | None = None
    error: float | None = None  # of its result against float64
    rounds: int | None = None
    repeats: int | None = None
    microseconds: Quartiles | None = None
    ratio_to_ours: Quartiles | None = None  # above 1: slower than ours
    percent_of_ceiling: Quartiles | None = None
    gb_per_second: float | None = None  # of the floor's bytes, whatever the peer really moves

    @classmethod
    def of(cls, configuration: Configuration, peer: str, check: Check, samples: Mapping[str, Samples]) -> Row:
        """The row of a peer; its figures are empty if it was not timed."""
        role = ROLES.get(peer, "peer")
        row = cls(configuration, peer, role, check.status, check.reason, check.error)
        own = samples.get(peer)
        if own is None:
            return row
        time = own.quartiles()
        row = replace(row, rounds=len(own.seconds), repeats=own.repeats, microseconds=_scaled(time, 1e6))
        if OURS in samples:
            row = replace(row, ratio_to_ours=own.ratio_to(samples[OURS]))
        if role != "floor":  # which moves no bytes
            row = replace(row, gb_per_second=configuration.floor_bytes / time.median * 1e-9)
            if CEILING in samples:
                row = replace(row, percent_of_ceiling=_scaled(samples[CEILING].ratio_to(own), 100))
        return row

    def as_json(self) -> dict[str, Any]:
        """Flat but for the quartiles."""
        row = asdict(self)
        return {**row.pop("configuration"), **row}


def _scaled(quartiles: Quartiles, factor: float) -> Quartiles:
    return Quartiles(quartiles.q1 * factor, quartiles.median * factor, quartiles.q3 * factor)


def write(folder: Path, header: Mapping[str, Any], rows: list[Row]) -> Path:
    """Writes one file for the run: all of it, or none."""
    stamp = header["date"].replace("-", "").replace(":", "")
    name = f"step-{header['device']['kind']}-{stamp}-{(header['commit'] or 'unknown')[:7]}.json"
    text = json.dumps(
        {"protocol": PROTOCOL, **header, "rows": [_rounded(row.as_json()) for row in rows]}, indent=1, allow_nan=False
    )
    unfinished = folder / f".{name}.unfinished"
    try:
        unfinished.write_text(text + "\n")
        return unfinished.replace(folder / name)
    finally:
        unfinished.unlink(missing_ok=True)


def _rounded(value: Any) -> Any:
    """Five digits: more would only pretend."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return float(f"{value:.5g}") if isinstance(value, float) else value
