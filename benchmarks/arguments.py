"""The command line of step.py."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from machine import cores
from measure import FULL, QUICK, Effort
from peers import SET_UP
from shapes import SHAPE_SETS, ShapeSet

RESULTS = Path(__file__).resolve().parent / "results"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# The models whose set-up alone takes long are left out of a quick run, unless they are named.
_QUICK_SHAPES = ("resnet50", "resnet20", "tiny161", "tiny161_groups", "many1000", "odd")


@dataclass(frozen=True)
class Arguments:
    """What to measure, how long, and where to put it."""

    shape_sets: list[ShapeSet]
    dtypes: list[torch.dtype]
    threads: list[int]
    peers: list[str]
    effort: Effort
    quick: bool
    output: Path


def parse(argv: Sequence[str] | None = None) -> Arguments:
    """Reads the command line; bad input ends the process with a message that names what is allowed."""
    parser = argparse.ArgumentParser(
        description="Times one optimizer step: FusedSGD, torch's own SGD, and the floor and ceiling of both.",
        epilog="Lists are separated by commas. Nothing is written unless the whole run succeeds.",
    )
    all_threads = [*range(1, cores() + 1)]

    def add_list(option: str, what: str, allowed: Iterable[object]) -> None:
        names = [str(name) for name in allowed]
        shown = f"1 to {names[-1]}" if option == "--threads" else ", ".join(names)
        parser.add_argument(option, type=_list_of(names, what, shown), metavar="LIST", help=f"from: {shown}")

    add_list("--shapes", "shape set", SHAPE_SETS)
    add_list("--dtypes", "dtype", DTYPES)
    add_list("--threads", "number of threads", all_threads)
    add_list("--peers", "peer", SET_UP)
    parser.add_argument("--quick", action="store_true", help="about a minute: fewer rounds, and no large models")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR", help="default: benchmarks/results")
    given = parser.parse_args(argv)
    try:
        given.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --output: cannot write to {given.output}: {error.strerror}")
    return Arguments(
        shape_sets=[SHAPE_SETS[name] for name in given.shapes or (_QUICK_SHAPES if given.quick else SHAPE_SETS)],
        dtypes=[DTYPES[name] for name in given.dtypes or DTYPES],
        threads=[int(count) for count in given.threads or dict.fromkeys((1, cores()))],
        peers=given.peers or list(SET_UP),
        effort=QUICK if given.quick else FULL,
        quick=given.quick,
        output=given.output,
    )


def _list_of(allowed: list[str], what: str, shown: str) -> Callable[[str], list[str]]:
    def parse_list(text: str) -> list[str]:
        names = [name.strip() for name in text.split(",")]
        for name in names:
            if name not in allowed:
                raise argparse.ArgumentTypeError(f"unknown {what} {name!r}; choose from {shown}")
        return list(dict.fromkeys(names))

    return parse_list
