"""Times what training does around a step: torch's sequence of passes against ONE step of FusedSGD or FusedLARS.

    python -m benchmarks around                                  all of it
    python -m benchmarks around --tasks lars --shapes resnet50   lists are separated by commas

The tasks, in float32:

    full            GradScaler's unscale_, clip_grad_norm_, fused SGD, AveragedModel against FusedSGD with max_grad_norm
                    and ema_decay under the same GradScaler, whose own check reads and writes all gradients in both ways
    without-scaler  the same without GradScaler
    clip-step       clip_grad_norm_ and fused SGD against FusedSGD with max_grad_norm
    lars            timm's Lars, or where timm is missing the same algorithm in torch's operators, against FusedLARS

Both ways are compared with each other before they are timed: parameters, momentum buffers and averages. They are timed
in turn with the ceiling, the plain loop of an SGD step over one flat array, which moves 20 bytes an element. What that
loop would have moved in a way's time stands beside the floor: the bytes that one pass for all of it must move. Below
the floor is possible: LARS meets a tensor in the cache that it has just measured.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass, replace

import torch
from rich.console import Console
from torch import Tensor

from . import options as shared
from . import tables, turns
from .clocks import Clock, GraphClock
from .machine import available_bytes
from .measure import Effort, Quartiles
from .peers import CEILING, CannotRun, Contender
from .report_around import report_section
from .sequences import TASKS, Sequence, Task
from .shapes import SHAPE_SETS, ShapeSet
from .turns import FLAT_BYTES, TimedRow, Turns, WrongError, ceiling, failed, take_turns
from .verify import MAX_ELEMENTS
from .workload import LR, TIMED_LR, make_workload

__all__ = ["HELP", "add_arguments", "report_section", "run"]

HELP = "what surrounds a step (GradScaler, clipping, averages, LARS) against one step that does it"

WAYS = ("torch", "ours")

_SHAPES = ("resnet50", "one100m")
_QUICK_SHAPES = ("resnet50",)
_CHECK_STEPS = 3
_CHECK_SCALE = 1024.0  # a power of two, so that dividing by it is exact
_TOLERANCE = 1e-5  # of values near 1: torch sums norms in float32
# Two ways with parameters, gradients, momentum and averages, the workload and the ceiling; some room.
_TENSORS_HELD = 2 * 4 + 2 + 3 + 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options."""
    shared.add_list(parser, "--tasks", "task", TASKS)
    shared.add_list(parser, "--shapes", "shape set", SHAPE_SETS)
    shared.add_arguments(parser, minutes=2, quick_minutes=0.3)


@dataclass(frozen=True, kw_only=True)
class Row(TimedRow):
    """One way to do one task."""

    task: str
    description: str
    peer_is: str
    floor_bytes_per_element: int
    largest_difference: float | None = None  # between the two ways' results
    ratio_to_ours: Quartiles | None = None
    bytes_per_element: Quartiles | None = None  # what the ceiling moves in this time
    ratio_to_floor: Quartiles | None = None


def run(given: argparse.Namespace) -> int:
    """Runs the benchmark; returns the exit status."""

    def cases(options: shared.Options) -> dict[str, tuple[ShapeSet, Task]]:
        names = given.shapes or (_QUICK_SHAPES if options.quick else _SHAPES)
        tasks = [TASKS[name] for name in given.tasks or TASKS]
        return {f"{task.name} on {name}": (SHAPE_SETS[name], task) for name in names for task in tasks}

    return turns.run("around", given, cases, run_case, _show)


def run_case(
    case: tuple[ShapeSet, Task], options: shared.Options, clocks: AbstractSequence[Clock], effort: Effort
) -> Iterator[list[Row]]:
    """One table for each number of threads and clock."""
    shapes, task = case
    torch.set_num_threads(max(options.threads))
    empty = [
        Row(
            task=task.name,
            description=task.description,
            peer=way,
            peer_is=task.torch_is() if way == "torch" else "FusedLARS" if task.name == "lars" else "FusedSGD",
            role="ours" if way == "ours" else "peer",
            shapes=shapes.name,
            tensors=len(shapes.shapes),
            elements=shapes.elements,
            dtype="float32",
            threads=max(options.threads),
            clock=clocks[0].name,
            floor_bytes_per_element=task.floor_bytes_per_element,
            launches_expected=task.launches if way == "ours" and options.device == "cuda" else None,
        )
        for way in WAYS
    ]
    try:
        difference = check(task, shapes, options.device)
        if not difference <= _TOLERANCE:  # so that NaN is wrong as well
            raise WrongError(f"the two ways differ by {difference:.2g}, {_TOLERANCE:.0e} allowed")
        needed, available = 4 * _TENSORS_HELD * shapes.elements, available_bytes(options.device)
        if available is not None and needed > available:
            raise CannotRun(f"needs {needed / 1e9:.2g} GB of memory and {available / 1e9:.2g} GB are free")
        work = make_workload(shapes, torch.float32, options.device).with_own_grads()
        ways = {"torch": task.torch(work, TIMED_LR, 1.0), "ours": task.ours(work, TIMED_LR, 1.0)}
        flat, why = ceiling(work)
    except Exception as exception:
        yield [failed(row, exception) for row in empty]
        return
    empty = [replace(row, largest_difference=difference) for row in empty]
    if options.device == "cuda":
        empty = [
            replace(row, launches=turns.launches(Contender(way.step, way.params), shapes.elements))
            for row, way in ((row, ways[row.peer]) for row in empty)
        ]
    for clock in clocks:
        for threads in options.threads:
            torch.set_num_threads(threads)
            rows = [replace(row, threads=threads, clock=clock.name) for row in empty]
            if clock.name == GraphClock.name and task.scaled:
                no_graph = CannotRun("GradScaler waits for the GPU, which a graph cannot hold")
                yield [failed(row, no_graph) for row in rows]
                continue
            yield _time(rows, ways, flat, why, clock, effort)


def check(task: Task, shapes: ShapeSet, device: str) -> float:
    """The largest difference between the two ways' parameters, momentum buffers and averages after a few steps.

    Relative to the larger of 1 and the value. Each step has its own gradients, scaled where there is a GradScaler.
    """
    work = make_workload(shapes.capped(MAX_ELEMENTS), torch.float32, device, seed=1).with_own_grads()
    scale = _CHECK_SCALE if task.scaled else 1.0
    found: list[list[Tensor]] = []
    for set_up in (task.torch, task.ours):
        sequence = set_up(work, LR, scale)
        for step in range(_CHECK_STEPS):
            for param, grad in zip(sequence.params, work.grads, strict=True):
                assert param.grad is not None
                param.grad.copy_(grad).mul_(scale * (1 + step))  # as a backward pass would
            sequence.step()
        found.append([tensor.detach().double() for tensor in sequence.results()])
    differences = [
        ((ours - torchs).abs() / torchs.abs().clamp(min=1)).amax() for torchs, ours in zip(*found, strict=True)
    ]
    moved = [(param - start).abs().amax() for param, start in zip(found[0], work.params, strict=False)]
    if not torch.stack(moved).amax() > 0:
        raise WrongError("torch's way changed nothing")
    return torch.stack(differences).amax().item()


def _time(
    rows: list[Row],
    ways: Mapping[str, Sequence],
    flat: Contender | None,
    no_flat: str | None,
    clock: Clock,
    effort: Effort,
) -> list[Row]:
    steps = {name: sequence.step for name, sequence in ways.items()}
    if flat is not None:
        steps[CEILING] = flat.step
    found = take_turns(steps, clock, effort)
    return [
        failed(row, found.why[row.peer]) if row.peer in found.why else _with_figures(row, found, no_flat)
        for row in rows
    ]


def _with_figures(row: Row, found: Turns, no_flat: str | None) -> Row:
    own, samples = found.samples[row.peer], found.samples
    row = found.fill(row, ratio_to_ours=own.ratio_to(samples["ours"]) if "ours" in samples else None, reason=no_flat)
    if CEILING not in samples:
        return row
    bytes_ = own.ratio_to(samples[CEILING]).scaled(FLAT_BYTES)
    return replace(row, bytes_per_element=bytes_, ratio_to_floor=bytes_.scaled(1 / row.floor_bytes_per_element))


def _show(console: Console, rows: list[Row]) -> None:
    first = rows[0]
    console.print(
        f"\n[bold]{first.task} · {first.shapes} · {first.threads} thread{'s' if first.threads > 1 else ''}"
        f" · {first.clock} time[/]   {first.description}; floor {first.floor_bytes_per_element} bytes an element;"
        f" torch's way: {first.peer_is}",
        highlight=False,
        soft_wrap=True,
    )
    table = tables.make_table(
        "way", "time", "time / ours", "quartiles", "bytes an element", "of the floor", "launches", left=("way",)
    )
    for row in rows:
        if row.microseconds is None:
            table.add_row(row.peer, row.status)
            continue
        times = row.ratio_to_ours
        table.add_row(
            row.peer,
            tables.show_time(row.microseconds.median) + (" (waits for the host)" if row.host_bound else ""),
            "" if times is None else f"{times.median:.2f}",
            "" if times is None else f"{times.q1:.2f} – {times.q3:.2f}",
            "" if row.bytes_per_element is None else f"{row.bytes_per_element.median:.1f}",
            "" if row.ratio_to_floor is None else f"{row.ratio_to_floor.median:.2f}",
            "" if row.launches is None else str(row.launches),
            style="bold" if row.role == "ours" else "",
        )
    console.print(table)
    for reason in dict.fromkeys(row.reason for row in rows if row.reason):
        console.print(f"  {reason}", soft_wrap=True, markup=False)
