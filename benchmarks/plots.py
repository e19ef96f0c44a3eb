"""The plots. A light card with dark text, not a transparent one: readable on dark and on light pages alike."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Series = Mapping[str, Sequence[tuple[float, float]]]

_CARD, _TEXT, _GRID = "#f6f8fa", "#1f2328", "#d1d9e0"
# Distinct in lightness too, for eyes that see few colours.
_COLOURS = {
    "ours": "#0b57d0",
    "fused": "#c2410c",
    "foreach": "#15803d",
    "loop": "#7c3aed",
    "compiled": "#b91c5c",
    "optimi": "#0e7490",
    "pytorch-optimizer": "#a16207",
    "timm": "#4d7c0f",
    "flashoptim": "#be123c",
    "bitsandbytes": "#57534e",
    "apex": "#6d28d9",
    "optax": "#0f766e",
    "flat": "#1f2328",
    "copy": "#8c959f",
    "nothing": "#8c959f",
}
_DOTS_PER_INCH = 130


class Plots:
    """Draws into a folder. With ``draw=False`` only the links are made, for which no matplotlib is needed."""

    def __init__(self, folder: Path, draw: bool = True) -> None:
        self._folder, self._draw = folder, draw
        if draw:
            shutil.rmtree(folder, ignore_errors=True)  # what is no longer drawn must not stay
            folder.mkdir(parents=True, exist_ok=True)

    def bars(
        self,
        name: str,
        title: str,
        axis: str,
        groups: Sequence[str],
        values: Mapping[str, Sequence[Mapping[str, float] | None]],
        line: float | None = None,
        log: bool = True,
    ) -> str:
        """Bars by group and peer, with quartiles as whiskers; ``line`` is drawn across."""

        def draw(axes: Any) -> None:
            width = 0.85 / max(len(values), 1)
            for index, (peer, its) in enumerate(values.items()):
                found = [(place, q) for place, q in enumerate(its) if q is not None]
                at = [place + (index - (len(values) - 1) / 2) * width for place, _ in found]
                heights = [q["median"] for _, q in found]
                whiskers = [[q["median"] - q["q1"] for _, q in found], [q["q3"] - q["median"] for _, q in found]]
                axes.bar(at, heights, width, label=peer, color=_COLOURS.get(peer))
                axes.errorbar(at, heights, whiskers, fmt="none", ecolor=_TEXT, elinewidth=0.7)
            axes.set_xticks(range(len(groups)), groups, rotation=20, ha="right")
            axes.set_ylabel(axis)
            if log:
                axes.set_yscale("log")
            if line is not None:
                axes.axhline(line, color=_TEXT, linewidth=1)

        return self._save(name, title, draw, width=max(7.0, 1.1 * len(groups)))

    def lines(self, name: str, title: str, x: str, y: str, series: Series, log: bool = True) -> str:
        """A line for each peer."""

        def draw(axes: Any) -> None:
            for peer, points in series.items():
                axes.plot(*zip(*points, strict=True), marker="o", markersize=3.5, label=peer, color=_COLOURS.get(peer))
            if log:
                axes.set_xscale("log")
                axes.set_yscale("log")
            else:
                axes.set_ylim(bottom=0)
                axes.xaxis.get_major_locator().set_params(integer=True)
            axes.set_xlabel(x)
            axes.set_ylabel(y)

        return self._save(name, title, draw, width=7.0)

    def _save(self, name: str, title: str, draw: Callable[[Any], None], width: float) -> str:
        if self._draw:
            import matplotlib as mpl

            mpl.use("Agg")
            from matplotlib import pyplot

            colours = {
                "axes.edgecolor": _GRID,
                "axes.facecolor": _CARD,
                "axes.labelcolor": _TEXT,
                "figure.facecolor": _CARD,
                "grid.color": _GRID,
                "savefig.facecolor": _CARD,
                "text.color": _TEXT,
                "xtick.color": _TEXT,
                "ytick.color": _TEXT,
                "font.size": 9,
            }
            with mpl.rc_context(colours):
                figure, axes = pyplot.subplots(figsize=(width, 4.2), layout="constrained")
                draw(axes)
                axes.set_title(title, loc="left")
                axes.grid(axis="y", linewidth=0.6)
                axes.set_axisbelow(True)
                if axes.get_legend_handles_labels()[0]:
                    axes.legend(fontsize=8, ncols=2, framealpha=0.8)
                # Without the version of matplotlib inside, which would change the file with nothing to be seen.
                figure.savefig(self._folder / f"{name}.png", dpi=_DOTS_PER_INCH, metadata={"Software": None})
                pyplot.close(figure)
        return f"![{title}](plots/{name}.png)\n"


def slug(text: str) -> str:
    """Part of a file's name."""
    return re.sub("[^a-z0-9]+", "-", text.lower()).strip("-")
