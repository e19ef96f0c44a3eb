"""What a run found: rows, and the file they are written to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from .footprint import Footprint
from .measure import Quartiles, Samples
from .peers import CEILING, COPY, OURS, PEERS
from .verify import Check
from .workload import Workload

PROTOCOL = 2
"""Raised when files change. ``files.py`` reads the older ones.

1   wall time on a CPU; torch's own peers
2   more clocks and peers, a copy as a second ceiling, footprints; curves and training beside steps
"""


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
    curve: str | None = None  # what varies in it, and its value here
    x: float | None = None

    @classmethod
    def of(
        cls, workload: Workload, threads: int, clock: str, curve: str | None = None, x: float | None = None
    ) -> Configuration:
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
            curve=curve,
            x=x,
        )

    def __str__(self) -> str:
        clock = "" if self.clock == "wall" else f" · {self.clock} time"
        return f"{self.shapes} · {self.dtype} · {self.threads} thread{'s' if self.threads > 1 else ''}{clock}"


@dataclass(frozen=True)
class Row:
    """One peer in one configuration. ``status`` is ok, wrong (its result), failed (with an error) or skipped."""

    configuration: Configuration
    peer: str
    role: str
    status: str
    reason: str | None = None
    error: float | None = None  # of its result against float64
    writes_gradients: bool = False
    rounds: int | None = None
    repeats: int | None = None
    microseconds: Quartiles | None = None
    ratio_to_ours: Quartiles | None = None  # above 1: slower than ours
    percent_of_ceiling: Quartiles | None = None
    percent_of_copy: Quartiles | None = None
    gb_per_second: float | None = None  # of the floor's bytes, whatever the peer really moves
    host_bound: bool = False  # a device time that waits for the host are part of
    buffer_sets: int = 1  # stepped in turn
    footprint: Footprint = field(default_factory=Footprint)

    @classmethod
    def of(
        cls, configuration: Configuration, peer: str, check: Check, samples: Mapping[str, Samples], **more: Any
    ) -> Row:
        """The row of a peer; its figures are empty if it was not timed."""
        role = PEERS[peer].role
        row = cls(configuration, peer, role, check.status, check.reason, check.error, check.writes_gradients, **more)
        own = samples.get(peer)
        if own is None:
            return row
        time = own.quartiles()
        row = replace(row, rounds=len(own.seconds), repeats=own.repeats, microseconds=time.scaled(1e6))
        if OURS in samples:
            row = replace(row, ratio_to_ours=own.ratio_to(samples[OURS]))
        if role != "floor":  # which moves no bytes
            row = replace(row, gb_per_second=configuration.floor_bytes / time.median * 1e-9)
            if CEILING in samples:
                row = replace(row, percent_of_ceiling=samples[CEILING].ratio_to(own).scaled(100))
            if COPY in samples:
                row = replace(row, percent_of_copy=samples[COPY].ratio_to(own).scaled(100))
        return row

    def as_json(self) -> dict[str, Any]:
        """Flat but for the quartiles."""
        row = asdict(self)
        return {**row.pop("configuration"), **row, **row.pop("footprint")}


def write(folder: Path, header: Mapping[str, Any], rows: list[dict[str, Any]]) -> Path:
    """Writes one file for the run: all of it, or none."""
    stamp = header["date"].replace("-", "").replace(":", "")
    commit = (header["commit"] or "unknown")[:7]
    name = f"{header['benchmark']}-{header['device']['kind']}-{stamp}-{commit}.json"
    text = json.dumps({"protocol": PROTOCOL, **header, "rows": _rounded(rows)}, indent=1, allow_nan=False)
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
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value
