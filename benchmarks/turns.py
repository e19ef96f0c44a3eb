"""What commands have in common that time a few steps in turn with the ceiling, and are no list of peers."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import torch
from rich.console import Console

from . import options as shared
from . import tables
from .clocks import Clock, Step, Timed, host_bound
from .footprint import footprint
from .measure import Effort, Quartiles, Samples, measure, warm_up
from .peers import CEILING, PEERS, CannotRun, Contender
from .runner import File, clocks_for, make_header, make_progress
from .workload import TIMED_LR, Workload

FLAT_BYTES = 20  # that the ceiling moves an element, in float32


@dataclass(frozen=True, kw_only=True)
class TimedRow:
    """What the rows of all such commands tell. ``status`` is ok, wrong (its result), failed or skipped."""

    peer: str
    role: str
    shapes: str
    tensors: int
    elements: int
    dtype: str
    threads: int
    clock: str
    status: str = "ok"
    reason: str | None = None
    rounds: int | None = None
    repeats: int | None = None
    microseconds: Quartiles | None = None
    launches: int | None = None
    launches_expected: int | None = None
    host_bound: bool = False


Row = TypeVar("Row", bound=TimedRow)


class WrongError(Exception):
    """A step's result is not what it should be."""


def failed(row: Row, exception: Exception) -> Row:
    """The row of what has no figures."""
    if isinstance(exception, WrongError):
        return replace(row, status="wrong", reason=str(exception))
    if isinstance(exception, (CannotRun, ImportError)):
        return replace(row, status="skipped", reason=str(exception))
    return replace(row, status="failed", reason=f"{type(exception).__name__}: {exception}")


def ceiling(work: Workload) -> tuple[Contender | None, str | None]:
    """The hand-written loop over one flat array, or why there is none."""
    try:
        return PEERS[CEILING].set_up(work, TIMED_LR), None
    except (CannotRun, ImportError) as why:
        return None, str(why)


def launches(contender: Contender, elements: int) -> int | None:
    """Of a step, on a GPU."""
    for _ in range(2):  # state is made
        contender.step()
    return footprint(contender, elements).launches


@dataclass(frozen=True)
class Turns:
    """What was timed, and why the rest was not; each by name."""

    samples: Mapping[str, Samples]
    timed: Mapping[str, Timed]
    why: Mapping[str, Exception]

    def fill(self, row: Row, **figures: Any) -> Row:
        """A row with its times, and with figures made of them."""
        own = self.samples[row.peer]
        return replace(
            row,
            rounds=len(own.seconds),
            repeats=own.repeats,
            microseconds=own.quartiles().scaled(1e6),
            host_bound=host_bound(self.timed[row.peer]),
            **figures,
        )


def take_turns(steps: Mapping[str, Step], clock: Clock, effort: Effort) -> Turns:
    """Times steps in turn, round after round."""
    timed: dict[str, Timed] = {}
    repeats: dict[str, int] = {}
    why: dict[str, Exception] = {}
    for name, step in steps.items():
        try:
            timed[name] = clock.timed([step])
            repeats[name] = warm_up(timed[name], clock)
        except Exception as exception:  # what cannot be captured, for one, can still be timed otherwise
            timed.pop(name, None)
            why[name] = exception
    return Turns(measure(timed, repeats, effort), timed, why)


def run(
    benchmark: str,
    given: argparse.Namespace,
    cases: Callable[[shared.Options], Mapping[str, Any]],
    run_case: Callable[[Any, shared.Options, Sequence[Clock], Effort], Iterator[list[Row]]],
    show: Callable[[Console, list[Row]], None],
) -> int:
    """Runs cases, by their names, as long as the time lasts, and writes the file; returns the exit status."""
    options = shared.read(given)
    console = tables.make_console()
    clocks = clocks_for(options.device)
    header = make_header(benchmark, options, clocks)
    tables.show_header(console, header)
    file = File(options, header)
    rows: list[Row] = []
    left_out = []
    to_do = cases(options)
    with make_progress(console) as progress:
        bar = progress.add_task("", total=len(to_do))
        for done, (name, case) in enumerate(to_do.items()):
            progress.update(bar, description=name, refresh=True)
            if options.budget.left() <= 0:
                left_out.append(name)
                continue
            effort = options.budget.effort_for(1 / ((len(to_do) - done) * len(options.threads) * len(clocks)))
            try:
                for table in run_case(case, options, clocks, effort):
                    show(progress.console, table)
                    rows += table
            except KeyboardInterrupt:
                if not rows:
                    raise
                options.budget.interrupted = True  # what is there is written
                left_out.append(f"{name}, interrupted")
            file.write([asdict(row) for row in rows], [*left_out, *list(to_do)[done + 1 :]])
            progress.advance(bar)
            gc.collect()
            if options.device == "cuda":
                torch.cuda.empty_cache()
    if left_out:
        why = "Interrupted" if options.budget.interrupted else "The time was up"
        console.print(f"[yellow]{why} before: {', '.join(left_out)}", soft_wrap=True)
    file.finish([asdict(row) for row in rows], left_out, console)
    return options.budget.status
