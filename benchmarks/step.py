"""Times one optimizer step: shape sets x dtypes x thread counts x clocks x peers.

    python -m benchmarks step                             all of it
    python -m benchmarks step --quick                     less than a minute
    python -m benchmarks step --shapes gpt2 --threads 2   lists are separated by commas

Every peer's result is compared with float64 before it is timed. Peers are timed in turn, round after round, in one
process; figures are medians and quartiles, and ratios are taken round by round. A short sample has an untimed one
before it, so small shapes tell what steps cost that find the caches as the last one left them. The floor (`nothing`) is
an optimizer whose step is empty. The ceilings are the same arithmetic over one flat array (`flat`) and a plain copy of
as many bytes (`copy`). On a GPU there are four clocks: device time with a cold L2 cache, replay of a CUDA graph with
buffers in turn, host time until step() returns, and wall time. The file is written anew after each configuration,
so that a run that is interrupted, fails or is ended from outside leaves what it found.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from . import options as shared
from . import tables
from .report_step import report_section
from .runner import Case, File, clocks_for, make_header, run_cases
from .shapes import SHAPE_SETS

__all__ = ["HELP", "add_arguments", "report_section", "run"]

HELP = "times one optimizer step of every peer on the shapes of real models"

# The models whose set-up alone takes long are left out of a quick run, unless they are named.
_QUICK_SHAPES = ("resnet20", "resnet50", "tiny161_groups", "many1000", "odd")
_QUICK_FOOTPRINTS = ("resnet20", "resnet50")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options."""
    shared.add_list(parser, "--shapes", "shape set", SHAPE_SETS)
    shared.add_arguments(parser, minutes=6, quick_minutes=0.5)


def run(given: argparse.Namespace) -> int:
    """Runs the benchmark; returns the exit status."""
    options = shared.read(given)
    console = tables.make_console()
    clocks = clocks_for(options.device)
    header = make_header("step", options, clocks)
    tables.show_header(console, header)
    file = File(options, header)
    outcome = run_cases(_cases(given.shapes, options), options, clocks, console, file)
    tables.show_summary(console, outcome.rows)
    file.finish([row.as_json() for row in outcome.rows], outcome.left_out, console)
    return options.budget.status


def _cases(shapes: Sequence[str] | None, options: shared.Options) -> list[Case]:
    # Float32 before bfloat16, and small ones first: if the time is up, few are left out.
    by_size = sorted(SHAPE_SETS, key=lambda name: SHAPE_SETS[name].elements)
    names = shapes or (_QUICK_SHAPES if options.quick else by_size)
    return [
        Case(SHAPE_SETS[name], dtype, options.threads, footprints=not options.quick or name in _QUICK_FOOTPRINTS)
        for dtype in options.dtypes
        for name in names
    ]
