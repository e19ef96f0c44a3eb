"""Makes benchmarks/REPORT.md and its plots from all result files: the same text from the same files, always.

    python -m benchmarks report            writes them
    python -m benchmarks report --check    only says whether REPORT.md is what the files give; draws nothing

A section shows, of each machine and torch, the newest full run (or the newest quick one where there is no full one).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from . import commands
from .errors import UserError
from .files import Run, read_folder
from .markdown import table
from .options import RESULTS
from .plots import Plots

HELP = "makes REPORT.md and its plots from all result files"

_INTRODUCTION = """\
# Benchmark report

Made by `python -m benchmarks report` from the files in `{folder}`; edit nothing here. How things are measured:
`python -m benchmarks step --help`. Figures are medians; a ratio is another optimizer's time over FusedSGD's, taken
round by round (above 1: FusedSGD is faster). GB/s count the bytes that a step must move, whatever a peer really moves.
A CPU that copies also reads the lines it writes, so that a step can be faster than a copy there. A peer whose result
differs from float64 is shown as wrong and is not timed.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options."""
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="default: benchmarks/results")
    parser.add_argument("--check", action="store_true", help="exit with 1 if REPORT.md is not what the files give")


def run(given: argparse.Namespace) -> int:
    """Writes or checks the report; returns the exit status."""
    runs = read_folder(given.results)
    # Beside the results: a run elsewhere does not overwrite what is committed.
    folder = given.results.resolve().parent if given.results.resolve() == RESULTS else given.results.resolve()
    file = folder / "REPORT.md"
    text = make(runs, Plots(folder / "plots", draw=not given.check))
    if given.check:
        if file.exists() and file.read_text(encoding="utf-8") == text:
            return 0
        print(f"{file} is not what {given.results} gives; run: python -m benchmarks report", file=sys.stderr)
        return 1
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror}") from error
    print(f"Written to {file}")
    return 0


def make(runs: list[Run], plots: Plots) -> str:
    """The report's text; the plots are drawn on the way."""
    parts = [_INTRODUCTION.format(folder="benchmarks/results"), "## Runs\n", _runs(runs)]
    for name in commands.COMMANDS:
        section = getattr(commands.load(name), "report_section", None)
        if section is not None:
            parts.append(section(runs, plots))
    return "\n".join(part.rstrip("\n") + "\n" for part in parts if part)


def _runs(runs: list[Run]) -> str:
    rows = [
        [
            f"[{run.benchmark}](results/{run.file.name})",
            run.header["date"][:10],
            run.machine,
            str(run.header["device"].get("driver") or ""),
            run.header["torch"],
            (run.header["commit"] or "unknown")[:7] + (" + changes" if run.header["dirty"] else ""),
            "quick" if run.header["quick"] else "full",
        ]
        for run in reversed(runs)
    ]
    return table(["run", "date", "device", "driver", "torch", "commit", "kind"], rows, left=7)
