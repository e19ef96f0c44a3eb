"""The subcommands. A new one is a file here and its name in the list below.

A command's module has

    HELP                                  one line for --help
    add_arguments(parser)                 its options
    run(arguments) -> int                 does the work, returns the exit status
    report_section(runs, plots) -> str    optional: its part of REPORT.md, from the result files (see report.py)

and its docstring is what ``python -m benchmarks NAME --help`` prints.
"""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

from .errors import UserError

COMMANDS = (
    "step",
    "curves",
    "training",
    "around",
    "precision",
    "all",
    "report",
    "compare",
    "breakdown",
)


def load(name: str) -> ModuleType:
    """The module of a command."""
    return importlib.import_module(f".{name}", __package__)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measures optimizers, fairly.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    modules = {name: load(name) for name in COMMANDS}
    for name, module in modules.items():
        its = commands.add_parser(
            name, help=module.HELP, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_arguments(its)
    arguments = parser.parse_args(argv)
    arguments.argv = list(sys.argv[1:] if argv is None else argv)
    # A missing module is told once, in the header and in the rows.
    warnings.filterwarnings("ignore", message="fused_sgd runs without its compiled module")
    terminated = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as `timeout` does: an interruption, too
    try:
        status: int = modules[arguments.command].run(arguments)
    except UserError as error:
        print(f"python -m benchmarks {arguments.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nInterrupted. Nothing more was written.", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, terminated)
    return status
