"""Times one step of FusedSGD in each storage mode, against its float32 step and against the bytes that it must move.

    python -m benchmarks precision                                     all of it
    python -m benchmarks precision --modes split,split-int8            lists are separated by commas

A mode is the dtype of parameters and gradients, how a bfloat16 weight is kept or rounded, and the momentum's dtype.
Its floor is what one pass must read and write: state twice, the gradient once, the weight twice, or once where a
float32 master makes it write-only. It is counted on the optimizer's own state, so tensors that stay wide beside int8
count as they are. The ceiling is the plain loop of a float32 step over one flat array (20 bytes an element), timed in
the same rounds: a mode reaches it when it moves its own bytes as fast. Before it is timed, each mode is held against
float64. `one100m` is one matrix here, since vectors have no int8 momentum.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from . import options as shared
from . import tables, turns
from .clocks import Clock
from .footprint import state_bytes
from .machine import available_bytes
from .measure import Effort, Quartiles
from .peers import CEILING, CannotRun, Contender
from .report_precision import report_section
from .shapes import SHAPE_SETS, ShapeSet
from .turns import FLAT_BYTES, TimedRow, Turns, WrongError, ceiling, failed, take_turns
from .verify import MAX_ELEMENTS, STEPS, TOLERANCE, largest_error, sgd_in_float64
from .workload import LR, MOMENTUM, TIMED_LR, WEIGHT_DECAY, Workload, make_workload

__all__ = ["HELP", "add_arguments", "report_section", "run"]

HELP = "one step of FusedSGD in each storage mode: bfloat16 weights, master weights, narrow momentum"

BASE = "float32"
_SHAPES = ("one100m", "resnet50")
_QUICK_SHAPES = ("resnet50",)
_MATRIX = ShapeSet("one100m", "one matrix of 100 M", ((12_500, 8_000),))


@dataclass(frozen=True)
class Mode:
    """How parameters and their state are kept."""

    name: str
    dtype: torch.dtype  # of parameters and gradients
    options: Mapping[str, Any] = field(default_factory=dict)  # of FusedSGD
    wide: str | None = None  # the same mode with float32 momentum, for one in int8


_INT8, _F32, _BF16 = ({"momentum_dtype": dtype} for dtype in (torch.int8, torch.float32, torch.bfloat16))
_SPLIT, _MASTER = {"master_weights": "split"}, {"master_weights": torch.float32}
_STOCHASTIC = {"stochastic_rounding": True}

MODES = {
    mode.name: mode
    for mode in (
        Mode(BASE, torch.float32),
        Mode("float32-int8", torch.float32, _INT8, wide=BASE),
        Mode("bfloat16", torch.bfloat16),
        Mode("bfloat16-float32", torch.bfloat16, _F32),
        Mode("split", torch.bfloat16, _SPLIT),
        Mode("split-bfloat16", torch.bfloat16, {**_SPLIT, **_BF16}),
        Mode("split-int8", torch.bfloat16, {**_SPLIT, **_INT8}, wide="split"),
        Mode("master", torch.bfloat16, _MASTER),
        Mode("stochastic", torch.bfloat16, _STOCHASTIC),
        Mode("stochastic-float32", torch.bfloat16, {**_STOCHASTIC, **_F32}),
        Mode("stochastic-int8", torch.bfloat16, {**_STOCHASTIC, **_INT8}, wide="stochastic-float32"),
    )
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options."""
    shared.add_list(parser, "--modes", "mode", MODES)
    shared.add_list(parser, "--shapes", "shape set", SHAPE_SETS)
    shared.add_arguments(parser, minutes=2, quick_minutes=0.3)


@dataclass(frozen=True, kw_only=True)
class Row(TimedRow):
    """One mode, timed on one shape set. ``peer`` is its name."""

    error: float | None = None  # of its result against float64
    state_bytes_per_parameter: float | None = None
    bytes_per_parameter: float | None = None  # the weight and the state, without the gradient
    floor_bytes_per_element: float | None = None
    gb_per_second: float | None = None  # of the mode's floor
    percent_of_ceiling: Quartiles | None = None
    ratio_to_float32: Quartiles | None = None  # above 1: slower
    wide: str | None = None
    ratio_to_wide: Quartiles | None = None


def run(given: argparse.Namespace) -> int:
    """Runs the benchmark; returns the exit status."""

    def cases(options: shared.Options) -> dict[str, tuple[ShapeSet, list[Mode]]]:
        names = given.shapes or (_QUICK_SHAPES if options.quick else _SHAPES)
        chosen = [MODES[name] for name in given.modes or MODES]
        return {name: (_MATRIX if name == _MATRIX.name else SHAPE_SETS[name], chosen) for name in names}

    return turns.run("precision", given, cases, run_case, _show)


def run_case(
    case: tuple[ShapeSet, Sequence[Mode]], options: shared.Options, clocks: Sequence[Clock], effort: Effort
) -> Iterator[list[Row]]:
    """One table for each number of threads and clock."""
    shapes, modes = case
    torch.set_num_threads(max(options.threads))
    works = {dtype: make_workload(shapes, dtype, options.device) for dtype in {mode.dtype for mode in modes}}
    flat_work = works.get(torch.float32) or make_workload(shapes, torch.float32, options.device)
    flat, no_flat = ceiling(flat_work)
    contenders: dict[str, Contender] = {}
    rows = [_set_up(mode, shapes, options.device, works[mode.dtype], no_flat, contenders) for mode in modes]
    steps = {name: contender.step for name, contender in contenders.items()}
    if flat is not None:
        steps[CEILING] = flat.step
    for clock in clocks:
        for threads in options.threads:
            torch.set_num_threads(threads)
            found = take_turns(steps, clock, effort)
            yield [_timed(replace(row, threads=threads, clock=clock.name), found) for row in rows]


def _set_up(
    mode: Mode, shapes: ShapeSet, device: str, work: Workload, no_flat: str | None, contenders: dict[str, Contender]
) -> Row:
    """Checks a mode and makes its contender; the row without figures."""
    row = Row(
        peer=mode.name,
        role="ours",
        shapes=shapes.name,
        tensors=len(shapes.shapes),
        elements=shapes.elements,
        dtype=str(mode.dtype).removeprefix("torch."),
        threads=0,
        clock="",
        reason=no_flat,
        wide=mode.wide,
        launches_expected=1 if device == "cuda" else None,
    )
    try:
        row = replace(row, error=check(mode, shapes, device))
        needed, available = shapes.elements * (mode.dtype.itemsize + 8), available_bytes(device)
        if available is not None and needed > available:
            raise CannotRun(f"needs {needed / 1e9:.2g} GB of memory and {available / 1e9:.2g} GB are free")
        contender = make(mode, work, TIMED_LR)
        contender.step()
        assert contender.optimizer is not None
        state = state_bytes(contender.optimizer.state) / shapes.elements
        weight = mode.dtype.itemsize
        passes = 1 if mode.options.get("master_weights") == torch.float32 else 2  # of the weight
        row = replace(
            row,
            state_bytes_per_parameter=state,
            bytes_per_parameter=weight + state,
            floor_bytes_per_element=2 * state + weight + passes * weight,
        )
        if device == "cuda":
            row = replace(row, launches=turns.launches(contender, shapes.elements))
    except Exception as exception:
        return failed(row, exception)
    contenders[mode.name] = contender
    return row


def make(mode: Mode, work: Workload, lr: float) -> Contender:
    """A mode on a workload."""
    from fused_sgd import FusedSGD  # here, so that a broken installation is a row that says why

    params = work.fresh_params()
    hyperparameters: dict[str, Any] = {"lr": lr, "momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY}
    optimizer = FusedSGD(params, fused=True, **hyperparameters, **mode.options)
    return Contender(lambda: optimizer.step(), params, optimizer=optimizer)


def check(mode: Mode, shapes: ShapeSet, device: str) -> float:
    """The largest error of the parameters against float64 after a few steps, relative to the larger of 1 and the value.

    Raises:
        WrongError: it is more than the narrowest format in use can explain.
    """
    work = make_workload(_capped(shapes), mode.dtype, device, seed=1)
    contender = make(mode, work, LR)
    for _ in range(STEPS):
        contender.step()
    results: list[Tensor] = [param.detach() for param in contender.params]
    error = largest_error(results, sgd_in_float64(work, decoupled=False))
    narrow = mode.dtype == torch.bfloat16 or mode.options.get("momentum_dtype") == torch.int8
    tolerance = TOLERANCE[torch.bfloat16 if narrow else torch.float32]
    if not error <= tolerance:  # so that NaN is wrong as well
        raise WrongError(f"error {error:.2g} after {STEPS} steps, {tolerance:.0e} allowed")
    return error


def _capped(shapes: ShapeSet) -> ShapeSet:
    """The same set without large tensors; rows stay whole, and with them int8's blocks."""
    capped = [(max(1, min(rows, MAX_ELEMENTS // torch.Size(rest).numel())), *rest) for rows, *rest in shapes.shapes]
    return ShapeSet(shapes.name, shapes.description, tuple(capped), shapes.offsets, shapes.param_groups)


def _timed(row: Row, found: Turns) -> Row:
    """A row with its figures."""
    if row.peer in found.why:
        return failed(row, found.why[row.peer])
    if row.peer not in found.samples:
        return row
    own = found.samples[row.peer]
    floor = row.floor_bytes_per_element
    assert floor is not None

    def ratio(name: str | None) -> Quartiles | None:
        return own.ratio_to(found.samples[name]) if name in found.samples else None

    of_ceiling = None
    if CEILING in found.samples:
        of_ceiling = found.samples[CEILING].ratio_to(own).scaled(100 * floor / FLAT_BYTES)
    return found.fill(
        row,
        gb_per_second=floor * row.elements / own.quartiles().median * 1e-9,
        percent_of_ceiling=of_ceiling,
        ratio_to_float32=ratio(BASE),
        ratio_to_wide=ratio(row.wide),
    )


def _show(console: Console, rows: list[Row]) -> None:
    first = rows[0]
    console.print(
        f"\n[bold]{first.shapes} · {first.threads} thread{'s' if first.threads > 1 else ''} · {first.clock} time[/]",
        highlight=False,
    )
    headings = ("bytes a parameter", "time", "GB/s", "% of flat", "time / float32", "time / float32 momentum")
    table = tables.make_table("mode", *headings, left=("mode",))
    for row in rows:
        if row.microseconds is None:
            table.add_row(row.peer, "", row.status)
            continue
        table.add_row(
            row.peer,
            f"{row.bytes_per_parameter:.3g}",
            tables.show_time(row.microseconds.median) + (" (waits for the host)" if row.host_bound else ""),
            f"{row.gb_per_second:.1f}",
            *(
                "" if quartiles is None else f"{quartiles.median:.{digits}f}"
                for quartiles, digits in (
                    (row.percent_of_ceiling, 0),
                    (row.ratio_to_float32, 2),
                    (row.ratio_to_wide, 2),
                )
            ),
        )
    console.print(table)
    for reason in dict.fromkeys(row.reason for row in rows if row.reason):
        console.print(f"  {reason}", soft_wrap=True, markup=False)
