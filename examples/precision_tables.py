"""The tables of precision.py."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from large_batch import table
from narrow import PRECISIONS

BASE = "float32"
TASKS = ("digits", "characters")
RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
STALL_LR, STALL_STEPS = 1e-3, 500  # half an ulp of a bfloat16 just below 1 is 2e-3


class Mode(NamedTuple):
    """A row of the tables."""

    precision: str  # --precision of train.py
    momentum_dtype: str | None  # its --momentum-dtype
    benchmark: str | None  # the mode's name in `python -m benchmarks precision`
    rounded_start: bool = False  # whether float32 begins with the weights that bfloat16 begins with


MODES = {
    "float32": Mode("float32", None, "float32"),
    "float32, rounded start": Mode("float32", None, None, rounded_start=True),  # a control: what chance does
    "float32, int8 momentum": Mode("float32", "int8", "float32-int8"),
    "bfloat16, nearest": Mode("bfloat16", None, "bfloat16"),
    "bfloat16, nearest, float32 momentum": Mode("bfloat16", "float32", "bfloat16-float32"),
    "split": Mode("bfloat16-split", None, "split"),
    "split, bfloat16 momentum": Mode("bfloat16-split", "bfloat16", "split-bfloat16"),
    "split, int8 momentum": Mode("bfloat16-split", "int8", "split-int8"),
    "float32 master": Mode("bfloat16-master", None, "master"),
    "stochastic": Mode("bfloat16-stochastic", None, "stochastic"),
    "stochastic, int8 momentum": Mode("bfloat16-stochastic", "int8", "stochastic-int8"),
}


def final_losses(found: dict[str, Any], task: str, mode: str) -> list[float]:
    """One a seed."""
    return [run["test_loss"] for run in found["runs"] if (run["task"], run["mode"]) == (task, mode)]


def last_tenth(found: dict[str, Any], task: str, mode: str) -> float:
    """The training loss at the end, less noisy than that of the test."""
    curves = [run["train_losses"] for run in found["runs"] if (run["task"], run["mode"]) == (task, mode)]
    return statistics.fmean(statistics.fmean(curve[-max(1, len(curve) // 10) :]) for curve in curves)


def write_tables(found: dict[str, Any]) -> str:
    """What was measured, in Markdown."""
    sizes = found["bytes"]
    times, where = step_times()
    memory = [
        [name, *(f"{sizes[name][key]:.4g}" for key in ("weight", "state")), total(sizes[name]), times[mode.benchmark]]
        for name, mode in MODES.items()
        if mode.benchmark is not None
    ]
    return (
        "Bytes a parameter, from the state of an optimizer of one 1024 × 1024 weight after a step; the gradient is 4 "
        f"in float32 and 2 in bfloat16, and comes on top. {where}\n\n"
        + table(["mode", "weight", "state", "together", "time of a step, times float32"], memory)
        + f"\nFinal test loss in nats, mean (lowest – highest) of {found['arguments']['seeds']} seeds:\n\n"
        + table(["mode", *TASKS, "within float32's spread"], losses(found))
        + "\nTraining loss in nats over the last tenth of the steps, mean of the seeds:\n\n"
        + table(
            ["mode", *TASKS], [[mode, *(f"{last_tenth(found, task, mode):.4f}" for task in TASKS)] for mode in MODES]
        )
        + f"\nA weight of 1 after {STALL_STEPS} steps of {STALL_LR:g}, of 4096 weights the mean:\n\n"
        + table(list(PRECISIONS), [[f"{value:.3f}" for value in found["stall"].values()]])
        + f"\nMeasured with {found['machine']} · fused_sgd {found['fused_sgd']}, commit {str(found['commit'])[:7]}; "
        f"the text: {found['text']['files']} files of Python {found['python']}, "
        f"{found['text']['characters']:,} characters.\n"
    )


def step_times() -> tuple[dict[str, str], str]:
    """By the benchmark's names, from its newest full run on a CPU; and a sentence that says where that was."""
    nothing = dict.fromkeys((mode.benchmark for mode in MODES.values() if mode.benchmark is not None), "")
    for file in sorted(RESULTS.glob("precision-cpu-*.json"), reverse=True):
        run = json.loads(file.read_text(encoding="utf-8"))
        if run["quick"]:
            continue
        threads = max(run["threads"])
        rows = {row["peer"]: row for row in run["rows"] if (row["shapes"], row["threads"]) == ("one100m", threads)}
        ratios = {name: row["ratio_to_float32"] for name, row in rows.items() if row["ratio_to_float32"]}
        times = {name: f"{ratio['median']:.2f}" for name, ratio in ratios.items()}
        where = (
            f"The time of a step is of 100 M parameters on {run['device']['name']}, {threads} threads, "
            f"{run['date'][:10]}, commit {run['commit'][:7]} ([the report](../benchmarks/REPORT.md#storage-modes))."
        )
        return {**nothing, **times}, where
    return nothing, "The time of a step is not measured yet (`python -m benchmarks precision`)."


def total(sizes: dict[str, float]) -> str:
    """Weight and state together."""
    return f"{sizes['weight'] + sizes['state']:.4g}"


def losses(found: dict[str, Any]) -> Iterable[Sequence[str]]:
    """The rows of the table of losses."""
    for mode in MODES:
        cells, outside = [], []
        for task in TASKS:
            base, own = final_losses(found, task, BASE), final_losses(found, task, mode)
            mean = statistics.fmean(own)
            cells.append(f"{mean:.4f} ({min(own):.4f} – {max(own):.4f})")
            if mean > max(base):
                outside.append(f"{task}: {mean - max(base):.4f} above")
            elif mean < min(base):
                outside.append(f"{task}: {min(base) - mean:.4f} below")
        yield [mode, *cells, "; ".join(outside) or "yes"]
