"""Reads result files: those of this protocol, older ones where they can be, and refuses the rest with a reason."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .errors import UserError
from .results import PROTOCOL

_HEADER: dict[str, type | tuple[type, ...]] = {
    "benchmark": str,
    "date": str,
    "commit": (str, type(None)),
    "dirty": bool,
    "device": dict,
    "torch": str,
    "threads": list,
    "quick": bool,
    "rows": list,
}
_DEVICE: dict[str, type | tuple[type, ...]] = {"kind": str, "name": str, "cores": int}
_ADDED_BY_2 = {
    "curve": None,
    "x": None,
    "writes_gradients": False,
    "percent_of_copy": None,
    "host_bound": False,
    "buffer_sets": 1,
    "launches": None,
    "copies": None,
    "operators": None,
    "peak_extra_bytes": None,
    "state_bytes_per_parameter": None,
}


@dataclass(frozen=True)
class Run:
    """One result file: its header and its rows, in the form of this protocol."""

    file: Path
    header: dict[str, Any]
    rows: list[dict[str, Any]]

    @property
    def benchmark(self) -> str:
        """The command that made it."""
        name: str = self.header["benchmark"]
        return name

    @property
    def machine(self) -> str:
        """Device, a CPU's vectors and number of cores: what makes two runs comparable."""
        device, vectors = self.header["device"], self.header.get("torch_instruction_set")
        # Virtual machines tell no more of a processor than its maker, and what it has of AVX differs.
        name = f"{device['name']} ({vectors})" if device["kind"] == "cpu" and vectors else device["name"]
        return f"{name}, {device['cores']} cores"

    def __str__(self) -> str:
        header = self.header
        quick = ", quick" if header["quick"] else ""
        return f"{self.machine}, torch {header['torch']}, {(header['commit'] or 'unknown')[:7]}{quick}"


def read(file: Path) -> Run:
    """Reads one file.

    Raises:
        UserError: it cannot be read, is no result file, or is of a protocol this program does not know.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from error
    except ValueError as error:  # json's and utf-8's errors alike
        raise UserError(f"{file}: is no JSON ({error}); was it cut short?") from error
    if not isinstance(content, dict) or "protocol" not in content:
        raise UserError(f"{file}: is no result file: it names no protocol")
    protocol = content["protocol"]
    if protocol not in range(1, PROTOCOL + 1):
        raise UserError(
            f"{file}: is of protocol {protocol}, and this program reads 1 to {PROTOCOL}; use the version that wrote it"
        )
    missing = [key for key in _HEADER if key not in content]
    if missing:
        raise UserError(f"{file}: is no complete result file: it lacks {', '.join(missing)}")
    for where, kinds in ((content, _HEADER), (content["device"], _DEVICE)):
        wrong = [key for key, kind in kinds.items() if not isinstance(where.get(key), kind)]
        if wrong:
            raise UserError(f"{file}: is no result file: {wrong[0]} cannot be {where.get(wrong[0])!r}")
    rows = content.pop("rows")
    if not all(isinstance(row, dict) and "peer" in row and _is_time(row.get("microseconds")) for row in rows):
        raise UserError(f"{file}: is no result file: its rows are not a list of peers and their times")
    if protocol == 1:
        rows = [{**_ADDED_BY_2, **row} for row in rows]
    return Run(file, content, rows)


def _is_time(value: Any) -> bool:
    """Whether it is quartiles, or nothing."""
    return value is None or (isinstance(value, dict) and all(isinstance(part, (int, float)) for part in value.values()))


def read_folder(folder: Path) -> list[Run]:
    """All result files of a folder, the oldest first.

    Raises:
        UserError: as ``read``; or the folder has none.
    """
    runs = [read(file) for file in sorted(folder.glob("*.json"))]
    if not runs:
        raise UserError(f"{folder}: there is no result file")
    return sorted(runs, key=lambda run: (run.header["date"], run.file.name))


def completed(runs: Sequence[Run], benchmark: str) -> list[Run]:
    """The newest runs, each with the configurations that it lacks, from the newest full run that has them.

    Those runs stand under ``completed_by`` in the header: what they add, by the file's name.
    """
    found = []
    for run in newest(runs, benchmark):
        alike = [
            other
            for other in reversed(runs)
            if (other.benchmark, other.machine, other.header["torch"]) == (benchmark, run.machine, run.header["torch"])
            and other is not run
            and not other.header["quick"]
        ]
        rows, added = list(run.rows), dict[str, dict[str, None]]()
        shapes = {(row["shapes"], row["dtype"]) for row in rows}
        for other in alike:
            there = {_configuration(row) for row in rows}
            for row in other.rows:
                if _configuration(row) not in there:
                    rows.append(row)
                    threads = f" · {row['threads']} threads" if (row["shapes"], row["dtype"]) in shapes else ""
                    added.setdefault(other.file.name, {})[f"{row['shapes']} · {row['dtype']}{threads}"] = None
        found.append(replace(run, rows=rows, header={**run.header, "completed_by": added}))
    return found


def _configuration(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row.get("task"), row["shapes"], row["dtype"], row["threads"]


def newest(runs: Iterable[Run], benchmark: str) -> list[Run]:
    """Of each machine, device and torch the newest run of a benchmark; a full one rather than a quick one."""
    best: dict[tuple[str, str], Run] = {}
    for run in runs:  # the oldest first
        if run.benchmark != benchmark:
            continue
        key = (run.machine, run.header["torch"])
        if key not in best or not run.header["quick"] or best[key].header["quick"]:
            best[key] = run
    return list(best.values())
