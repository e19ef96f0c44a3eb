"""Accuracy against batch size, with SGD and with LARS, on scikit-learn's digits: docs/large-batch.md.

    python examples/large_batch.py    # four minutes of one core; rewrites the plot and the tables in docs

Learning rates are tuned first: one seed, a fifth of the training set held out. Then each choice trains on the whole
training set with several seeds and is tested. Needs what train.py needs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import fused_sgd
import matplotlib as mpl
import torch
from rich.console import Console
from rich.progress import Progress
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, Subset

from image_data import Data, load_digits
from report import describe_machine
from sequences import FusedSequence
from train import COLUMNS, build_parser, number, prepare
from training import make_loader, test_accuracy, train

from matplotlib import pyplot as plt  # isort: skip (report chooses the backend)

START, END = "<!-- measured -->\n", "<!-- end -->\n"
SGD_RATES = (0.0125, 0.025, 0.05, 0.1, 0.2)  # at batch 128: scaled linearly with the batch
LARS_RATES = (4.0, 8.0, 16.0, 32.0, 64.0)
LARS_OTHERS = 0.1  # biases and norms under LARS, which do not adapt: at batch 128, scaled linearly
TUNING_SEED = 1000  # no run that is tested has it
LINEAR, TUNED, LARS = "SGD, scaled linearly", "SGD, tuned", "LARS, tuned"
COLORS = {LINEAR: "#c2410c", TUNED: "#7c3aed", LARS: "#0b57d0"}
CARD, TEXT, GRID = "#f6f8fa", "#1f2328", "#d1d9e0"  # a light card: readable on dark and on light pages alike


@dataclass(frozen=True)
class Choice:
    """An optimizer, and its learning rate: for SGD the one at batch 128."""

    optimizer: str  # sgd or lars
    rate: float

    def options(self, batch_size: int) -> list[str]:
        """The choice in words of train.py."""
        if self.optimizer == "sgd":
            return ["--lr", str(self.rate * batch_size / 128)]
        return ["--optimizer", "lars", "--lr", str(self.rate), "--sgd-lr", str(LARS_OTHERS * batch_size / 128)]


class Study:
    """Runs choices, each once."""

    def __init__(self, args: argparse.Namespace, bar: Progress) -> None:
        self.args, self.bar = args, bar
        self.data = load_digits()
        order = torch.randperm(len(self.data.train), generator=torch.Generator().manual_seed(0)).tolist()  # type: ignore[arg-type]
        cut = len(order) // 5
        train_set, held_out = Subset(self.data.train, order[cut:]), Subset(self.data.train, order[:cut])
        self.tuning_data = Data("digits", train_set, held_out, self.data.channels, self.data.classes)
        self.done: dict[tuple[Choice, int, int], float] = {}

    def accuracy(self, choice: Choice, batch_size: int, seed: int) -> float:
        """In [0, 1]: of the test set, or with the tuning seed of what was held out."""
        key = (choice, batch_size, seed)
        if key not in self.done:
            data = self.tuning_data if seed == TUNING_SEED else self.data
            options = {
                "--batch-size": batch_size,
                "--epochs": self.args.epochs,
                "--warmup-epochs": self.args.epochs / 10,
                "--width": self.args.width,
                "--threads": self.args.threads,
                "--seed": seed,
            }
            words = [str(word) for option in options.items() for word in option]
            args = build_parser().parse_args([*choice.options(batch_size), *words])
            prepare(args)
            run = train(FusedSequence, data, args, self.bar)
            # After 20 steps, running statistics still remember how the model began: they are taken anew.
            update_bn(DataLoader(data.train, 256), run.model)
            self.done[key] = test_accuracy(run.model, data, args)
        return self.done[key]

    def best(self, choices: Iterable[Choice], batch_sizes: Sequence[int]) -> Choice:
        """The choice of the best held-out accuracy over batch sizes; of equal ones the middle."""
        scores = {c: statistics.fmean(self.accuracy(c, n, TUNING_SEED) for n in batch_sizes) for c in choices}
        winners = [choice for choice, score in scores.items() if score == max(scores.values())]
        return winners[len(winners) // 2]


def measure(study: Study) -> tuple[dict[str, dict[int, Choice]], dict[str, dict[int, list[float]]]]:
    """Tunes, then tests: for each curve and batch size the choice, and an accuracy a seed."""
    sizes = study.args.batch_sizes
    sgd, lars = [Choice("sgd", rate) for rate in SGD_RATES], [Choice("lars", rate) for rate in LARS_RATES]
    scaled = study.best(sgd, sizes[:1])
    chosen = {
        LINEAR: dict.fromkeys(sizes, scaled),
        TUNED: {size: study.best(sgd, [size]) for size in sizes},
        LARS: {size: study.best(lars, [size]) for size in sizes},
    }
    seeds = range(study.args.seeds)
    found = {
        name: {size: [study.accuracy(choice, size, seed) for seed in seeds] for size, choice in choices.items()}
        for name, choices in chosen.items()
    }
    return chosen, found


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown, numbers to the right."""
    lines = [headings, ["---:"] * len(headings), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write_tables(study: Study, chosen: dict[str, dict[int, Choice]], found: dict[str, dict[int, list[float]]]) -> str:
    """What was measured, in Markdown."""
    args = study.args
    rows = []
    for size in args.batch_sizes:
        steps = len(make_loader(study.data, argparse.Namespace(batch_size=size, seed=0)))
        cells = [describe(chosen[name][size], size, found[name][size]) for name in COLORS]
        rows.append([str(size), str(steps * args.epochs), *cells])

    def sweep(optimizer: str, rates: Iterable[float]) -> Iterable[list[str]]:
        for rate in rates:
            accuracies = [study.accuracy(Choice(optimizer, rate), size, TUNING_SEED) for size in args.batch_sizes]
            yield [f"{rate:g}", *(f"{accuracy:.2%}" for accuracy in accuracies)]

    sizes = [f"batch {size}" for size in args.batch_sizes]
    tested, held_out = len(study.data.test), len(study.tuning_data.test)  # type: ignore[arg-type]
    return (
        f"Test accuracy, mean (lowest – highest) of {args.seeds} seeds, and the learning rate:\n\n"
        + table(["batch", "steps", *COLORS], rows)
        + f"\nOne of the {tested} test images is {1 / tested:.2%}. "
        f"The tuning before it: accuracy on {held_out} images held out of the training set, one seed. "
        "SGD, by learning rate at batch 128, scaled linearly:\n\n"
        + table(["lr at 128", *sizes], sweep("sgd", SGD_RATES))
        + "\nLARS, by learning rate:\n\n"
        + table(["lr", *sizes], sweep("lars", LARS_RATES))
        + f"\nMeasured with {describe_machine('cpu')} · fused_sgd {fused_sgd.__version__}; {args.epochs} epochs, "
        f"width {args.width}.\n"
    )


def describe(choice: Choice, size: int, accuracies: list[float]) -> str:
    """A cell of the first table."""
    rate = choice.rate * size / 128 if choice.optimizer == "sgd" else choice.rate
    spread = f"{100 * min(accuracies):.2f} – {100 * max(accuracies):.2f}"
    return f"{statistics.fmean(accuracies):.2%} ({spread}), lr {rate:.4g}"


def draw(path: Path, found: dict[str, dict[int, list[float]]]) -> None:
    """Mean accuracy by batch size, and each seed as a dot."""
    style = {
        "text.color": TEXT,
        "axes.labelcolor": TEXT,
        "xtick.color": TEXT,
        "ytick.color": TEXT,
        "axes.edgecolor": GRID,
    }
    with mpl.rc_context({**style, "font.size": 10}):
        figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained", facecolor=CARD)
        axes.set_facecolor(CARD)
        for (name, by_size), marker, shift in zip(found.items(), "sD^", (0.96, 1, 1.04), strict=True):
            means = [100 * statistics.fmean(accuracies) for accuracies in by_size.values()]
            places = [shift * size for size in by_size]  # aside, so that none hides another
            axes.plot(places, means, color=COLORS[name], marker=marker, label=name)
            for place, accuracies in zip(places, by_size.values(), strict=True):
                dots = [100 * accuracy for accuracy in accuracies]
                axes.plot([place] * len(dots), dots, ".", color=COLORS[name], alpha=0.6)
        sizes = list(found[LARS])
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.set(xlabel="batch size (images a step; the same number of epochs)", ylabel="test accuracy (%)")
        axes.set_title("Digits: test accuracy by batch size", loc="left", fontweight="bold")
        axes.grid(axis="y", color=GRID)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        figure.savefig(path, dpi=130, metadata={"Software": None})
        plt.close(figure)


def main() -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        description="Measure accuracy against batch size with SGD and LARS, for docs/large-batch.md.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--batch-sizes", type=number(int, 1), nargs="+", default=[32, 256, 1024], help="in this order")
    add("--epochs", type=number(int, 1), default=20, help="of every run")
    add("--seeds", type=number(int, 1), default=3, help="runs of each choice that is tested")
    add("--width", type=number(int, 1), default=16, help="of the model, as in train.py")
    add("--threads", type=number(int, 1), default=1, help="CPU threads")
    add(
        "--guide",
        type=Path,
        default=Path("docs/large-batch.md"),
        help="its tables are replaced; the plot lies beside it",
    )
    args = parser.parse_args()
    try:
        before, rest = args.guide.read_text(encoding="utf-8").split(START)
        _, after = rest.split(END)
    except (OSError, ValueError) as error:
        parser.error(f"--guide: {args.guide} is no text with the lines {START.strip()} and {END.strip()}: {error}")
    start = time.monotonic()
    console = Console()
    with Progress(*COLUMNS, console=console, transient=True) as bar:
        study = Study(args, bar)
        chosen, found = measure(study)
    measured = write_tables(study, chosen, found)
    print(measured)
    args.guide.write_text(f"{before}{START}{measured}{END}{after}", encoding="utf-8")
    draw(args.guide.with_suffix(".png"), found)
    print(f"{args.guide} and its plot, after {time.monotonic() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
