"""Measures configurations: checks the peers, sets up those that are right, times them with every clock."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from . import machine, results, tables, workload
from .clocks import Clock, DeviceClock, GpuWallClock, GraphClock, HostClock, Timed, WallClock, host_bound
from .footprint import Footprint, footprint
from .gpu import CudaGpu, Gpu
from .measure import Effort, Samples, measure, warm_up
from .options import Options
from .peers import FLOOR, PEERS, CannotRun, Contender
from .results import Configuration, Row
from .shapes import ShapeSet
from .verify import Check, check
from .workload import Workload, make_workload

_COMPILE_TENSORS = 70  # compiling takes a second for each two or three of them
_MAX_BUFFER_SETS = 16
_L2_FILLS = 3
_MEMORY_SHARE = 0.7
Show = Callable[[str], None]


@dataclass(frozen=True)
class Case:
    """A workload to measure, and where on a curve it lies."""

    shape_set: ShapeSet
    dtype: torch.dtype
    threads: Sequence[int]
    curve: str | None = None
    x: float | None = None
    peers: Sequence[str] | None = None  # None for the options' peers
    footprints: bool = True

    def __str__(self) -> str:
        return f"{self.shape_set.name} · {str(self.dtype).removeprefix('torch.')}"


@dataclass
class Outcome:
    """Rows so far, and which cases had no time."""

    rows: list[Row] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def clocks_for(device: str, gpu: Gpu | None = None) -> list[Clock]:
    """One on a CPU, where a step's work is done when it returns; four on a GPU."""
    if device == "cpu":
        return [WallClock()]
    gpu = gpu or CudaGpu()
    return [DeviceClock(gpu), GraphClock(gpu), HostClock(gpu), GpuWallClock(gpu)]


def make_header(benchmark: str, options: Options, clocks: Sequence[Clock]) -> dict[str, Any]:
    """What a file tells besides its rows."""
    return {
        "benchmark": benchmark,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "command": ["python", "-m", "benchmarks", *options.argv],
        **machine.describe(options.device),
        "threads": options.threads,
        "clocks": [clock.name for clock in clocks],
        "quick": options.quick,
        "hyperparameters": {
            "lr": workload.TIMED_LR,
            "momentum": workload.MOMENTUM,
            "weight_decay": workload.WEIGHT_DECAY,
            "nesterov": False,
        },
    }


class File:
    """A run's file: written anew after each case, since a run may be ended from outside at any moment."""

    def __init__(self, options: Options, header: Mapping[str, Any]) -> None:
        self.options = options
        self.header = header

    def write(self, rows: list[dict[str, Any]], left_out: Sequence[str]) -> Path:
        """Writes what has been found, in place of what it held."""
        runtimes = len(machine.openmp_runtimes())  # known only when everything has been loaded
        header = {**self.header, "left_out": list(left_out), "openmp_runtimes": runtimes}
        return results.write(self.options.output, header, rows)

    def finish(self, rows: list[dict[str, Any]], left_out: Sequence[str], console: Console) -> None:
        """Writes all of it, and says where it is."""
        runtimes = machine.openmp_runtimes()
        if len(runtimes) > 1:
            warning = f"[yellow]Two OpenMP runtimes disturb each other's figures: {', '.join(runtimes)}"
            console.print(warning, soft_wrap=True)
        console.print(f"\nWritten to {self.write(rows, left_out)}", soft_wrap=True)


def make_progress(console: Console) -> Progress:
    """Refreshed between rounds only: a thread that draws would take a core from what is timed."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, auto_refresh=False, transient=True)


def run_cases(
    cases: Sequence[Case], options: Options, clocks: Sequence[Clock], console: Console, file: File
) -> Outcome:
    """Measures the cases in turn, as long as the budget lasts; each is shown, and written, when it is done."""
    outcome = Outcome()
    with make_progress(console) as progress:
        task = progress.add_task("", total=len(cases))

        def show(text: str) -> None:
            progress.update(task, description=text, refresh=True)

        for done, case in enumerate(cases):
            if options.budget.left() <= 0:
                outcome.left_out.append(str(case))
                continue
            tables_left = sum(len(later.threads) * len(clocks) for later in cases[done:])
            effort = options.budget.effort_for(1 / tables_left)
            try:
                for rows in run_case(case, options, clocks, effort, show):
                    tables.show_configuration(progress.console, rows)
                    outcome.rows += rows
            except KeyboardInterrupt:
                if not outcome.rows:
                    raise
                options.budget.interrupted = True  # what is there is written
                outcome.left_out.append(f"{case}, interrupted")
            file.write([row.as_json() for row in outcome.rows], [*outcome.left_out, *map(str, cases[done + 1 :])])
            progress.advance(task)
            gc.collect()  # before the next one's memory is taken
            if options.device == "cuda":
                torch.cuda.empty_cache()
    if outcome.left_out:
        why = "Interrupted" if options.budget.interrupted else "The time was up"
        console.print(f"[yellow]{why} before: {', '.join(outcome.left_out)}", soft_wrap=True)
    return outcome


def run_case(case: Case, options: Options, clocks: Sequence[Clock], effort: Effort, show: Show) -> Iterator[list[Row]]:
    """One table for each number of threads and clock."""
    torch.set_num_threads(max(case.threads))
    peers = list(case.peers or options.peers)
    show(f"{case} · checking results")
    checks = _check(peers, case, options)
    show(f"{case} · setting up")
    entrants = Entrants(case, checks, options.device)
    try:
        for clock in clocks:
            entrants.set_up(_buffer_sets(clock, entrants.work, options.device))
            if case.footprints:
                entrants.count_footprints()
            for threads in case.threads:
                torch.set_num_threads(threads)
                configuration = Configuration.of(entrants.work, threads, clock.name, case.curve, case.x)
                show(f"{configuration} · warming up")
                yield _table(configuration, entrants, peers, clock, effort, show)
    finally:
        entrants.close()


def _check(peers: Sequence[str], case: Case, options: Options) -> dict[str, Check]:
    left_out = {}
    too_many = len(case.shape_set.shapes) > _COMPILE_TENSORS
    for peer in peers:
        if PEERS[peer].compiles and not options.named and (options.quick or too_many or case.curve):
            why = "in a quick run" if options.quick else "with so many tensors" if too_many else "for each point"
            left_out[peer] = Check("skipped", f"compiling takes long {why}: name the peer in --peers to have it")
    rest = [PEERS[peer] for peer in peers if peer not in left_out]
    found = {**left_out, **check(rest, case.shape_set, case.dtype, options.device)}
    return {peer: found[peer] for peer in peers}


def _buffer_sets(clock: Clock, work: Workload, device: str) -> int:
    if clock.name != GraphClock.name:
        return 1
    l2_bytes = torch.cuda.get_device_properties(work.device).L2_cache_size if device == "cuda" else 0
    return buffer_sets(l2_bytes, 3 * work.dtype.itemsize * work.shape_set.elements)


def buffer_sets(l2_bytes: int, working_set_bytes: int) -> int:
    """How many sets of buffers fill the cache three times, but no more than can be handled."""
    return min(_MAX_BUFFER_SETS, max(1, math.ceil(_L2_FILLS * l2_bytes / max(working_set_bytes, 1))))


class Entrants:
    """The peers that are right, set up on one or more sets of buffers. What drops out has a check with the reason."""

    def __init__(self, case: Case, checks: dict[str, Check], device: str) -> None:
        self.checks, self.device = checks, device
        self.works = [make_workload(case.shape_set, case.dtype, device)]
        self.contenders: dict[str, list[Contender]] = {}
        self.footprints: dict[str, Footprint] = {}
        self._case = case

    @property
    def work(self) -> Workload:
        """The first set of buffers."""
        return self.works[0]

    def set_up(self, sets: int) -> None:
        """Makes as many sets of each peer as there are not yet."""
        for seed in range(len(self.works), sets):
            self.works.append(make_workload(self._case.shape_set, self._case.dtype, self.device, seed))
        for peer, result in self.checks.items():
            if result.status != "ok":
                continue
            own = self.contenders.setdefault(peer, [])
            try:
                for work in self.works[len(own) : sets]:
                    self._refuse_without_memory()
                    own.append(
                        PEERS[peer].set_up(
                            work.with_own_grads() if result.writes_gradients else work, workload.TIMED_LR
                        )
                    )
            except (CannotRun, ImportError) as why:
                self.drop(peer, "skipped", str(why))
            except Exception as exception:
                self.drop(peer, "failed", f"{type(exception).__name__}: {exception}")

    def count_footprints(self) -> None:
        """Of every peer, once."""
        for peer, sets in list(self.contenders.items()):
            if peer in self.footprints or not PEERS[peer].computes:
                continue
            try:
                for _ in range(2):  # state is made, what is compiled is compiled
                    sets[0].step()
                self.footprints[peer] = footprint(sets[0], self.work.shape_set.elements)
            except Exception as exception:
                self.drop(peer, "failed", f"{type(exception).__name__}: {exception}")

    def drop(self, peer: str, status: str, reason: str) -> None:
        """Takes a peer out of this and all later tables of the case."""
        self.checks[peer] = replace(self.checks[peer], status=status, reason=reason)
        for contender in self.contenders.pop(peer, []):
            contender.close()

    def close(self) -> None:
        """Ends other processes."""
        for sets in self.contenders.values():
            for contender in sets:
                contender.close()

    def _refuse_without_memory(self) -> None:
        # Parameters, momentum, and as much again for what a peer may allocate in a step.
        needed = 4 * self.work.dtype.itemsize * self.work.shape_set.elements
        available = machine.available_bytes(self.device)
        if available is not None and needed > _MEMORY_SHARE * available:
            raise CannotRun(
                f"no memory left beside the others: needs {needed / 1e9:.2g} GB of {available / 1e9:.2g} GB"
            )


def _table(
    configuration: Configuration, entrants: Entrants, peers: Sequence[str], clock: Clock, effort: Effort, show: Show
) -> list[Row]:
    timed: dict[str, Timed] = {}
    repeats: dict[str, int] = {}
    checks = dict(entrants.checks)
    for peer, sets in entrants.contenders.items():
        if peer == FLOOR and clock.name in (DeviceClock.name, GraphClock.name):
            checks[peer] = Check("skipped", "does nothing on the device")
            continue
        try:
            timed[peer] = sets[0].timed or clock.timed([contender.step for contender in sets])
            repeats[peer] = warm_up(timed[peer], clock)
        except Exception as exception:  # a step that cannot be captured, for one, can still be timed otherwise
            timed.pop(peer, None)
            checks[peer] = replace(checks[peer], status="failed", reason=f"{type(exception).__name__}: {exception}")
    samples: dict[str, Samples] = measure(timed, repeats, effort, partial(_show_round, show, configuration))
    return [
        Row.of(
            configuration,
            peer,
            checks[peer],
            samples,
            host_bound=peer in timed and host_bound(timed[peer]),
            buffer_sets=len(entrants.contenders.get(peer, [])) if clock.name == GraphClock.name else 1,
            footprint=entrants.footprints.get(peer, Footprint()),
        )
        for peer in peers
    ]


def _show_round(show: Show, configuration: Configuration, done: int) -> None:
    show(f"{configuration} · round {done}")
