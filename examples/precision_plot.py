"""The plot of precision.py: loss curves over each other, and every final loss beside float32's spread."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import matplotlib as mpl

from large_batch import CARD, GRID, TEXT

from matplotlib import pyplot as plt  # isort: skip (report chooses the backend)

# float32 thick and pale below, pure bfloat16 red, the others thin: where they are hidden by each other, all is well.
_COLORS = (
    "#f4b46a",
    "#57534e",
    "#a16207",
    "#dc2626",
    "#f472b6",
    "#0b57d0",
    "#0891b2",
    "#17365c",
    "#15803d",
    "#7c3aed",
    "#c026d3",
)


def draw(path: Path, found: dict[str, Any]) -> None:
    """Two columns, one a task: training loss by step above, final test losses below."""
    style: dict[Any, Any] = {
        "text.color": TEXT,
        "axes.labelcolor": TEXT,
        "xtick.color": TEXT,
        "ytick.color": TEXT,
        "axes.edgecolor": GRID,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "font.size": 9,
    }
    tasks = list(dict.fromkeys(run["task"] for run in found["runs"]))
    modes = list(dict.fromkeys(run["mode"] for run in found["runs"]))
    colors = dict(zip(modes, _COLORS, strict=True))
    with mpl.rc_context(style):
        figure, axes = plt.subplots(2, 2, figsize=(11, 8), layout="constrained", facecolor=CARD)
        for (above, below), task in zip(axes.T, tasks, strict=True):
            runs = {mode: [r for r in found["runs"] if (r["task"], r["mode"]) == (task, mode)] for mode in modes}
            _draw_curves(above, task, runs, colors)
            _draw_final(below, task, runs, colors)
        for panel in axes.flat:
            panel.set_facecolor(CARD)
            panel.grid(color=GRID)
            panel.set_axisbelow(True)
        axes[1, 1].tick_params(labelleft=False)
        axes[0, 0].legend(frameon=False, fontsize=8)
        figure.savefig(path, dpi=120, metadata={"Software": None})
        plt.close(figure)


def _draw_curves(axes: Any, task: str, runs: dict[str, list[dict[str, Any]]], colors: dict[str, str]) -> None:
    for place, (mode, seeds) in enumerate(runs.items()):
        means = [statistics.fmean(values) for values in zip(*(run["train_losses"] for run in seeds), strict=True)]
        steps = [(point + 1) * seeds[0]["steps"] / len(means) for point in range(len(means))]
        width, dashes = (6, "-") if place == 0 else (1.2, "-" if place < 6 else "--")
        axes.plot(steps, means, dashes, color=colors[mode], linewidth=width, label=mode)
    axes.set(xlabel="step", ylabel="training loss (nats), mean of seeds", yscale="log")
    axes.set_title(task, loc="left", fontweight="bold")


def _draw_final(axes: Any, task: str, runs: dict[str, list[dict[str, Any]]], colors: dict[str, str]) -> None:
    base = [run["test_loss"] for run in next(iter(runs.values()))]
    axes.axvspan(min(base), max(base), color="#f4b46a", alpha=0.35)
    for row, (mode, seeds) in enumerate(runs.items()):
        values = [run["test_loss"] for run in seeds]
        axes.plot(values, [row] * len(values), "o", markersize=4, color=colors[mode], alpha=0.7)
        axes.plot(statistics.fmean(values), row, "|", markersize=16, markeredgewidth=2, color=colors[mode])
    axes.set_yticks(range(len(runs)), list(runs))
    axes.invert_yaxis()
    axes.set(xlabel="final test loss (nats): seeds and mean; shaded: float32's")
    axes.set_title(task, loc="left", fontweight="bold")
