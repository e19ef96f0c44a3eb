"""Shows what train.py found: tables on the console and a picture. Needs rich and matplotlib."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from rich.console import Console
from rich.table import Table

from timing import Timing
from training import Run

mpl.use("Agg")
from matplotlib import pyplot as plt


def describe_machine(device_type: str) -> str:
    """Device, torch, threads and date: without them a time means nothing."""
    if device_type == "cuda":
        device = torch.cuda.get_device_name()
    else:
        device = f"CPU ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()})"
    date = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %z")
    return f"device {device} · torch {torch.__version__} · threads {torch.get_num_threads()} · {date}"


def print_report(console: Console, runs: Iterable[Run], timings: list[Timing], equal: str) -> None:
    """Prints both tables, and between them the line that scripts look for; of the timings, ours comes first."""
    runs = list(runs)
    averaged = any(run.averaged_accuracy is not None for run in runs)
    results = Table("optimizer", title="Training")
    for heading in ("test accuracy", *(["averaged weights"] if averaged else []), "final train loss"):
        results.add_column(heading, justify="right")
    for run in runs:
        accuracies = [accuracy for accuracy in (run.accuracy, run.averaged_accuracy) if accuracy is not None]
        results.add_row(run.name, *(f"{accuracy:.2%}" for accuracy in accuracies), f"{run.final_loss:.6f}")
    console.print(results)

    print(f"weights equal to the bit: {equal}")

    times = Table("optimizer", title="Optimizer time a step")
    for heading in ("median", "quartiles", f"ratio to {timings[0].name}"):
        times.add_column(heading, justify="right")
    for timing in timings:
        low, median, high = timing.quartiles
        ratio = f"{timing.ratio_to(timings[0]):.2f}"
        style = "bold" if timing is timings[0] else None
        times.add_row(timing.name, f"{median:.1f} µs", f"{low:.1f} – {high:.1f} µs", ratio, style=style)
    console.print(times)


TORCH_COLOR, OUR_COLOR = "#f4b46a", "#17365c"


def draw(path: Path, title: str, machine: str, runs: list[Run], timings: list[Timing]) -> None:
    """Draws the loss curves over each other, and beside them the times a step."""
    style: dict[Any, Any] = {
        "axes.spines.top": False,
        "axes.spines.right": False,
        "font.size": 10,
        "axes.titleweight": "bold",
    }
    with mpl.rc_context(style):
        figure, (left, right) = plt.subplots(
            1, 2, figsize=(12, 5), width_ratios=(1.15, 1), layout="constrained", facecolor="white"
        )
        draw_losses(left, runs)
        draw_times(right, timings)
        figure.suptitle(title, fontsize=13, fontweight="bold")
        figure.supxlabel(machine, fontsize=8, color="0.4")
        figure.savefig(path, dpi=150)
        plt.close(figure)


def draw_losses(axes: Any, runs: list[Run]) -> None:
    """The loss at every step: torch thick and pale, ours thin and dark on top, so that both are seen."""
    for run, color, width in zip(runs, (TORCH_COLOR, OUR_COLOR), (6, 1), strict=True):
        epochs = [step / run.steps_per_epoch for step in range(1, len(run.losses) + 1)]
        label = f"{run.name}: test accuracy {run.accuracy:.2%}"
        axes.plot(epochs, run.losses, color=color, linewidth=width, solid_joinstyle="round", label=label)
    axes.set(title="Training loss, step by step", xlabel="epoch", ylabel="cross entropy (nats)", yscale="log")
    axes.margins(x=0.02)
    axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def draw_times(axes: Any, timings: list[Timing]) -> None:
    """One bar an optimizer: the median, a whisker from quartile to quartile, and the ratio to ours."""
    low, median, high = (list(values) for values in zip(*(timing.quartiles for timing in timings), strict=True))
    whiskers = [
        [middle - lower for middle, lower in zip(median, low, strict=True)],
        [upper - middle for middle, upper in zip(median, high, strict=True)],
    ]
    colors = [OUR_COLOR if timing is timings[0] else TORCH_COLOR for timing in timings]
    rows = range(len(timings))
    # On a busy machine a whisker can be a hundred bars long: let it leave the picture rather than shrink the bars.
    end = min(max(high), 2 * max(median))
    axes.barh(rows, median, xerr=whiskers, height=0.6, color=colors, error_kw={"ecolor": "0.35", "capsize": 4})
    for row, timing in enumerate(timings):
        ratio = "" if timing is timings[0] else f"  ({timing.ratio_to(timings[0]):.1f}×)"
        offset = {"xytext": (8, 0), "textcoords": "offset points", "va": "center"}
        axes.annotate(f"{median[row]:.0f} µs{ratio}", (min(high[row], end), row), **offset)
    axes.set_yticks(rows, [timing.name for timing in timings])
    axes.invert_yaxis()
    axes.set_xlim(right=1.4 * end)
    axes.set(title="Optimizer time a step", xlabel="µs (median; whiskers: quartiles)")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
