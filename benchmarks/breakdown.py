"""Where the microseconds of a step go on a CPU: Python, the plan, the walk.

    python -m benchmarks breakdown
    python -m benchmarks breakdown --shapes resnet50 --threads 1

Three optimizers are timed in turn, and each adds one thing to the one before: FusedSGD over one empty tensor (Python,
the call, what the plan does once), over as many empty tensors in as many param groups (the plan looks at each, and
there is nothing to walk), and over the shapes themselves (the walk). The parts are the differences, round by round; one
below the noise may come out negative. Beside them, a step of torch's base class that does nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

import torch

from . import options as shared
from .clocks import WallClock
from .machine import cores
from .measure import FULL, QUICK, Effort, Quartiles, measure, warm_up
from .peers import FLOOR, OURS, PEERS
from .shapes import SHAPE_SETS, ShapeSet
from .tables import make_console, make_table, show_time
from .workload import TIMED_LR, make_workload

HELP = "where the microseconds of our step go on a CPU"
PARTS = ("Python", "plan", "walk")

_SHAPES = ("tiny161", "tiny161_groups", "many1000", "resnet20", "resnet50")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options."""
    shared.add_list(parser, "--shapes", "shape set", SHAPE_SETS)
    counts = range(1, cores() + 1)
    parser.add_argument("--threads", type=int, default=1, choices=counts, metavar="N", help="default: 1")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")


def run(given: argparse.Namespace) -> int:
    """Prints a table; writes nothing."""
    torch.set_num_threads(given.threads)
    effort = replace(QUICK if given.quick else FULL, min_rounds=20)
    columns = ("shapes", "tensors", "groups", *PARTS, "all", "an empty step", "plan, each")
    table = make_table(*columns, left=("shapes",))
    for name in given.shapes or _SHAPES:
        shapes = SHAPE_SETS[name]
        times = [quartiles.median for quartiles in break_down(shapes, effort)]
        count = len(shapes.shapes)
        table.add_row(
            name,
            str(count),
            str(shapes.param_groups),
            *(show_time(time * 1e6) for time in times),
            f"{times[1] / count * 1e9:.1f} ns",
        )
    make_console().print(table)
    return 0


def break_down(shapes: ShapeSet, effort: Effort) -> list[Quartiles]:
    """Seconds of each part, of all of them, and of a step that does nothing."""
    empty = len(shapes.shapes) * ((0,),)
    stages = [
        (OURS, ShapeSet("one", "", ((0,),))),
        (OURS, ShapeSet("empty", "", empty, param_groups=shapes.param_groups)),
        (OURS, shapes),
        (FLOOR, ShapeSet("one", "", ((0,),))),
    ]
    clock = WallClock()
    contenders = [PEERS[peer].set_up(make_workload(its, torch.float32), TIMED_LR) for peer, its in stages]
    timed = {str(stage): clock.timed([contender.step]) for stage, contender in enumerate(contenders)}
    samples = measure(timed, {name: warm_up(it, clock) for name, it in timed.items()}, effort)
    *ours, nothing = [samples[name].seconds for name in timed]
    return [*_differences(ours), Quartiles.of(ours[-1]), Quartiles.of(nothing)]


def _differences(seconds: Sequence[Sequence[float]]) -> list[Quartiles]:
    before = [[0.0] * len(seconds[0]), *seconds[:-1]]
    return [
        Quartiles.of([b - a for a, b in zip(less, more, strict=True)])
        for less, more in zip(before, seconds, strict=True)
    ]
