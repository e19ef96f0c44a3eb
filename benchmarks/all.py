"""Runs every measurement in turn (step, curves, training) and makes the report: what `make bench` does.

python -m benchmarks all            10 minutes at most
python -m benchmarks all --quick    about one
"""

from __future__ import annotations

import argparse
import importlib

from . import options as shared

HELP = "step, curves, training and the report, one after the other"

_SHARES = {"step": 0.55, "curves": 0.27, "training": 0.15}  # of the time; what is left is starting and the report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options."""
    shared.add_arguments(parser, minutes=9.5, quick_minutes=0.8)


def run(given: argparse.Namespace) -> int:
    """Runs the benchmarks; returns the exit status."""
    minutes = given.minutes if given.minutes is not None else given.default_minutes[given.quick]
    for name, share in _SHARES.items():
        module = importlib.import_module(f".{name}", __package__)
        status: int = module.run(
            argparse.Namespace(
                **{**vars(given), "minutes": share * minutes, "shapes": None, "curves": None, "models": None}
            )
        )
        if status:
            return status
    from . import report

    return report.run(argparse.Namespace(results=given.output, check=False))
