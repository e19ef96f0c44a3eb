"""Options that commands share; bad input ends the process with a message that names what is allowed."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from .errors import UserError
from .machine import cores
from .measure import FULL, QUICK, Effort
from .peers import PEERS

RESULTS = Path(__file__).resolve().parent / "results"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class Budget:
    """How long a run may take. What is left is divided among the configurations to come."""

    seconds: float
    effort: Effort
    begin: float = field(default_factory=time.monotonic)
    interrupted: bool = False

    def left(self) -> float:
        """Seconds; negative when the time is up."""
        return -1 if self.interrupted else self.begin + self.seconds - time.monotonic()

    @property
    def status(self) -> int:
        """The exit status of a run whose file was written."""
        return 130 if self.interrupted else 0

    def effort_for(self, share: float) -> Effort:
        """The effort of one configuration, given its share of what is left; a half of it goes to the set-up."""
        seconds = min(self.effort.seconds, max(self.left(), 0) * share / 2)
        return replace(self.effort, seconds=seconds)


@dataclass(frozen=True)
class Options:
    """What is measured, how long, and where it is put."""

    peers: list[str]
    named: bool  # whether somebody asked for just these peers
    dtypes: list[torch.dtype]
    threads: list[int]
    device: str
    quick: bool
    output: Path
    budget: Budget
    argv: list[str]


def add_arguments(parser: argparse.ArgumentParser, minutes: float, quick_minutes: float) -> None:
    """The options that every measuring command has."""
    add_list(parser, "--peers", "peer", PEERS)
    add_list(parser, "--dtypes", "dtype", DTYPES)
    add_list(parser, "--threads", "number of threads", [*range(1, cores() + 1)], f"1 to {cores()}")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default, help=f"default: {default}")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, and nothing whose set-up takes long")
    parser.add_argument(
        "--minutes",
        type=float,
        help=f"how long it may take (default: {minutes:g}, {quick_minutes:g} with --quick); what has not begun by then"
        " is left out, and said to be",
    )
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR", help="default: benchmarks/results")
    parser.set_defaults(default_minutes=(minutes, quick_minutes))


def read(given: argparse.Namespace) -> Options:
    """Options from the command line."""
    if given.device == "cuda" and not torch.cuda.is_available():
        raise UserError("argument --device: torch finds no CUDA device here")
    try:
        given.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"argument --output: cannot write to {given.output}: {error.strerror}") from error
    minutes = given.minutes if given.minutes is not None else given.default_minutes[given.quick]
    if not minutes > 0:
        raise UserError(f"argument --minutes: must be above 0, got {minutes:g}")
    # A GPU's work is one thread's: the number matters on a CPU only.
    default_threads = dict.fromkeys((1, cores())) if given.device == "cpu" else (cores(),)
    return Options(
        peers=given.peers or list(PEERS),
        named=given.peers is not None,
        dtypes=[DTYPES[name] for name in given.dtypes or DTYPES],
        threads=[int(count) for count in given.threads or default_threads],
        device=given.device,
        quick=given.quick,
        output=given.output,
        budget=Budget(60 * minutes, QUICK if given.quick else FULL),
        argv=given.argv,
    )


def add_list(
    parser: argparse.ArgumentParser, option: str, what: str, allowed: Iterable[object], shown: str | None = None
) -> None:
    """An option whose value is a list of names, separated by commas."""
    names = [str(name) for name in allowed]
    shown = shown or ", ".join(names)
    parser.add_argument(option, type=_list_of(names, what, shown), metavar="LIST", help=f"from: {shown}")


def _list_of(allowed: list[str], what: str, shown: str) -> Callable[[str], list[str]]:
    def parse_list(text: str) -> list[str]:
        names = [name.strip() for name in text.split(",")]
        for name in names:
            if name not in allowed:
                raise argparse.ArgumentTypeError(f"unknown {what} {name!r}; choose from {shown}")
        return list(dict.fromkeys(names))

    return parse_list
