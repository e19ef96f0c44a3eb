"""Times one optimizer step: shape sets x dtypes x thread counts x peers.

    python benchmarks/step.py                             all of it, some 10 minutes on two cores
    python benchmarks/step.py --quick                     about a minute
    python benchmarks/step.py --shapes gpt2 --threads 2   see --help for the names

Every peer's result is compared with float64 before it is timed. Peers are timed in turn, round after round, in one
process; figures are medians and quartiles, and ratios are taken round by round. The floor (`nothing`) is an optimizer
whose step is empty; the ceiling (`flat`) is a plain loop over one flat array with as many elements and threads.
"""

from __future__ import annotations

import gc
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from functools import partial
from typing import Any

try:
    import torch
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
except ImportError as missing:
    sys.exit(f"the benchmarks need torch and rich: {missing}")

import machine
import results
import workload
from arguments import Arguments, parse
from measure import WallClock, measure
from peers import SET_UP
from results import Configuration, Row
from shapes import ShapeSet
from verify import check
from workload import make_workload

import report

CLOCK = WallClock()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    arguments = parse(argv)
    # A missing module is told once, in the header and in the rows.
    warnings.filterwarnings("ignore", message="fused_sgd runs without its compiled module")
    console = report.make_console()
    try:
        header = make_header(arguments)
        report.show_header(console, header)
        rows = run(arguments, console)
    except KeyboardInterrupt:
        console.print("\n[red]Interrupted.[/] Nothing was written.")
        return 130
    header["openmp_runtimes"] = len(machine.openmp_runtimes())  # again, now that all of them are loaded
    report.show_summary(console, rows)
    if header["openmp_runtimes"] > 1:
        files = ", ".join(machine.openmp_runtimes())
        console.print(f"[yellow]Two OpenMP runtimes disturb each other's figures: {files}", soft_wrap=True)
    console.print(f"\nWritten to {results.write(arguments.output, header, rows)}", soft_wrap=True)
    return 0


def make_header(arguments: Arguments) -> dict[str, Any]:
    """What the file tells besides its rows."""
    return {
        "benchmark": "step",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        **machine.describe(),
        "threads": arguments.threads,
        "quick": arguments.quick,
        "hyperparameters": {
            "lr": workload.TIMED_LR,
            "momentum": workload.MOMENTUM,
            "weight_decay": workload.WEIGHT_DECAY,
            "nesterov": False,
        },
    }


def run(arguments: Arguments, console: Console) -> list[Row]:
    """Measures every configuration and shows each when it is done."""
    rows: list[Row] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    total = len(arguments.shape_sets) * len(arguments.dtypes) * len(arguments.threads)
    # Refreshed between rounds only: a thread that draws would take a core from what is timed.
    with Progress(*columns, console=console, auto_refresh=False, transient=True) as progress:
        task = progress.add_task("", total=total)

        def show(text: str) -> None:
            progress.update(task, description=text, refresh=True)

        for shape_set in arguments.shape_sets:
            for dtype in arguments.dtypes:
                for table in run_workload(shape_set, dtype, arguments, show):
                    report.show_configuration(progress.console, table)
                    progress.advance(task)
                    rows += table
                gc.collect()  # before the next one's memory is taken
    return rows


def run_workload(
    shape_set: ShapeSet, dtype: torch.dtype, arguments: Arguments, show: Callable[[str], None]
) -> Iterator[list[Row]]:
    """Checks the peers, sets up those that are right, and measures them with each number of threads."""
    torch.set_num_threads(max(arguments.threads))
    what = f"{shape_set.name} · {str(dtype).removeprefix('torch.')}"
    show(f"{what} · checking results")
    checks = check(arguments.peers, shape_set, dtype)
    show(f"{what} · setting up")
    work = make_workload(shape_set, dtype)
    contenders = {
        peer: SET_UP[peer](work, workload.TIMED_LR) for peer, result in checks.items() if result.status == "ok"
    }
    steps = {peer: contender.step for peer, contender in contenders.items()}
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        configuration = Configuration.of(work, threads, CLOCK.name)
        show(f"{configuration} · measuring")
        samples = measure(steps, CLOCK, arguments.effort, partial(_show_round, show, configuration))
        yield [Row.of(configuration, peer, checks[peer], samples) for peer in arguments.peers]


def _show_round(show: Callable[[str], None], configuration: Configuration, done: int) -> None:
    show(f"{configuration} · round {done}")


if __name__ == "__main__":
    sys.exit(main())
