"""Runs every measurement in turn (step, curves, training, around, precision) and makes the report, for `make bench`.

python -m benchmarks all            10 minutes at most
python -m benchmarks all --quick    about one
"""

from __future__ import annotations

import argparse
import importlib

from . import options as shared

HELP = "step, curves, training, around, precision and the report, one after the other"

# Of the time; what is left is starting and the report.
_SHARES = {"step": 0.42, "curves": 0.23, "training": 0.11, "around": 0.12, "precision": 0.1}
# Of steps, about as many as fit into their time with every peer: small and large, of many tensors and of one. `step` by
# itself has more.
_SHAPES = ["tiny161", "many1000", "resnet50", "gpt2", "one100m"]
_CHOICES = ("shapes", "curves", "models", "tasks", "modes")  # options that only some of them have


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options."""
    shared.add_arguments(parser, minutes=9.5, quick_minutes=0.8)


def run(given: argparse.Namespace) -> int:
    """Runs the benchmarks; returns the exit status."""
    minutes = given.minutes if given.minutes is not None else given.default_minutes[given.quick]
    for name, share in _SHARES.items():
        module = importlib.import_module(f".{name}", __package__)
        own = argparse.Namespace(**{**vars(given), **dict.fromkeys(_CHOICES), "minutes": share * minutes})
        if name == "step" and not given.quick:
            own.shapes = _SHAPES
        status: int = module.run(own)
        if status:
            return status
    from . import report

    return report.run(argparse.Namespace(results=given.output, check=False))
