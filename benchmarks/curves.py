"""Times steps along curves: cost against the number of tensors, bytes, param groups and threads.

python -m benchmarks curves                    all of them, with ours, torch's own three and the ceilings
python -m benchmarks curves --curves tensors   lists are separated by commas

tensors  1 to 10,000 tensors of equal bytes together; lines up to 1000 and beyond give the cost of an extra one
alone    the same without others, whose steps in between empty the caches (on a CPU)
bytes    10^3 to 10^9 bytes moved a step, one tensor; a line through what is beyond the cache gives the bandwidth
groups   1 to 1000 param groups of 1000 small tensors
threads  ResNet-50 on 1 to all cores
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from . import fits, tables
from . import options as shared
from .machine import cores
from .peers import OURS
from .report_curves import report_section
from .runner import Case, File, clocks_for, make_header, run_cases
from .shapes import SHAPE_SETS, ShapeSet

__all__ = ["HELP", "add_arguments", "report_section", "run"]

HELP = "cost against the number of tensors, bytes, param groups and threads"

_PEERS = ("ours", "fused", "foreach", "loop", "nothing", "flat")
_ELEMENTS = 160_000  # of all tensors together: 16 in each of 10,000
_BYTES_AN_ELEMENT = 20  # that a step moves, in float32
_GROUPED = 1000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options."""
    shared.add_list(parser, "--curves", "curve", _CURVES)
    shared.add_arguments(parser, minutes=3, quick_minutes=0.3)


def run(given: argparse.Namespace) -> int:
    """Runs the benchmark; returns the exit status."""
    options = shared.read(given)
    console = tables.make_console()
    clocks = clocks_for(options.device)
    header = make_header("curves", options, clocks)
    tables.show_header(console, header)
    peers = options.peers if options.named else [peer for peer in _PEERS if not (options.quick and peer == "loop")]
    cases = [case for name in given.curves or _CURVES for case in _CURVES[name](options, peers)]
    file = File(options, header)
    outcome = run_cases(cases, options, clocks, console, file)
    rows = [row.as_json() for row in outcome.rows]
    console.print()
    for clock in clocks:
        for sentence in fits.sentences(rows, clock.name, header["device"]["last_level_cache_bytes"]):
            console.print(sentence, soft_wrap=True)
    file.finish(rows, outcome.left_out, console)
    return options.budget.status


def tensor_shapes(count: int) -> ShapeSet:
    """So many tensors whose elements together are always the same."""
    sizes = [_ELEMENTS // count + (index < _ELEMENTS % count) for index in range(count)]
    return ShapeSet(f"tensors_{count}", f"{_ELEMENTS} elements in {count} tensors", tuple((size,) for size in sizes))


def _case(options: shared.Options, peers: list[str], shapes: ShapeSet, curve: str, x: float) -> Case:
    return Case(shapes, options.dtypes[0], [max(options.threads)], curve, x, peers, footprints=False)


def _tensors(options: shared.Options, peers: list[str]) -> Iterator[Case]:
    counts = (1, 100, 1000) if options.quick else (1, 3, 10, 30, 100, 300, 1000, 3000, 10_000)
    for count in counts:
        yield _case(options, peers, tensor_shapes(count), "tensors", count)


def _alone(options: shared.Options, peers: list[str]) -> Iterator[Case]:
    if options.device == "cpu" and OURS in peers:  # a GPU's clocks empty the cache themselves
        for case in _tensors(options, [OURS]):
            yield replace(case, curve="alone")


def _bytes(options: shared.Options, peers: list[str]) -> Iterator[Case]:
    exponents = [3, 4, 5, 6, 7, 8] if options.quick else [3, 3.5, 4, 4.5, 5, 5.5, 6, 6.5, 7, 7.5, 8, 8.5]
    beyond = [] if options.quick else [5e8, 7e8, 1e9]
    for moved in [10**exponent for exponent in exponents] + beyond:
        elements = max(1, round(moved / _BYTES_AN_ELEMENT))
        shapes = ShapeSet(f"bytes_{moved:.0e}".replace("+", ""), "one tensor", ((elements,),))
        yield _case(options, peers, shapes, "bytes", elements * 5 * options.dtypes[0].itemsize)


def _groups(options: shared.Options, peers: list[str]) -> Iterator[Case]:
    for groups in (1, 30, 1000) if options.quick else (1, 3, 10, 30, 100, 300, 1000):
        description = f"{_GROUPED} tensors of 16 in {groups} param groups"
        shapes = ShapeSet(f"groups_{groups}", description, _GROUPED * ((16,),), param_groups=groups)
        yield _case(options, peers, shapes, "groups", groups)


def _threads(options: shared.Options, peers: list[str]) -> Iterator[Case]:
    if options.device != "cpu" or options.quick:  # a quick run of steps has both ends of it
        return
    counts = sorted({1, cores(), *(2**power for power in range(1, cores().bit_length()) if 2**power < cores())})
    for count in counts:
        yield Case(SHAPE_SETS["resnet50"], torch.float32, [count], "threads", count, peers, footprints=False)


_CURVES: dict[str, Callable[[shared.Options, list[str]], Iterator[Case]]] = {
    "tensors": _tensors,
    "alone": _alone,
    "threads": _threads,
    "bytes": _bytes,
    "groups": _groups,
}
