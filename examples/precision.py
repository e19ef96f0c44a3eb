"""Final losses and loss curves of bfloat16 training against float32, in FusedSGD's storage modes: docs/precision.md.

    python examples/precision.py             # 50 minutes of one core; rewrites tables, plot and JSON in docs
    python examples/precision.py --redraw    # tables and plot alone, from the JSON that is there

Two tasks: scikit-learn's digits, as in train.py, and a character language model over the text of Python's standard
library (characters.py). Each mode trains with several seeds; a seed means the same initial weights (rounded, for
bfloat16) and the same batches in every mode. All bfloat16 modes have bfloat16 weights and gradients and compute in
float32 between them: they differ in the optimizer alone. A third part counts how far a weight gets where the step is
below half of what bfloat16 can tell apart. Needs what train.py needs.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import fused_sgd
import torch
from fused_sgd import FusedSGD
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (its usual name)
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

import characters
from image_data import Data, load_digits
from large_batch import END, START
from narrow import PRECISIONS, storage_options, with_precision
from precision_plot import draw
from precision_tables import MODES, STALL_LR, STALL_STEPS, TASKS, write_tables
from report import describe_machine
from sequences import FusedSequence
from train import COLUMNS, build_parser, number, prepare
from training import train, warmup_cosine

POINTS = 50  # of a loss curve: each a mean over as many steps
CHARACTER_LR, CHARACTER_CLIP, CHARACTER_BATCH = 1.0, 1.0, 16
Start = Callable[[nn.Module], nn.Module]


class Study:
    """Trains modes on tasks."""

    def __init__(self, args: argparse.Namespace, bar: Progress) -> None:
        self.args, self.bar = args, bar
        self.digits = load_digits()
        self.text = characters.Text()

    def options(self, mode: str, seed: int) -> argparse.Namespace:
        """A mode as train.py's command line has it."""
        precision, momentum_dtype, *_ = MODES[mode]
        words = ["--precision", precision, "--seed", str(seed), "--threads", str(self.args.threads)]
        words += ["--epochs", str(self.args.epochs), "--width", str(self.args.width)]
        args = build_parser().parse_args(words + (["--momentum-dtype", momentum_dtype] if momentum_dtype else []))
        prepare(args)
        return args

    def run(self, task: str, mode: str, seed: int) -> dict[str, Any]:
        """Trains once; returns what is to be kept of it."""
        start = time.monotonic()
        args = self.options(mode, seed)
        trained = self._digits if task == "digits" else self._characters
        losses, test = trained(args, rounded if MODES[mode].rounded_start else lambda model: model)
        size = max(1, len(losses) // POINTS)
        curve = [statistics.fmean(losses[at : at + size]) for at in range(0, len(losses), size)]
        found = {"task": task, "mode": mode, "seed": seed, "steps": len(losses), "seconds": time.monotonic() - start}
        return {**found, "test_loss": test, "train_losses": curve}

    def _digits(self, args: argparse.Namespace, start: Start) -> tuple[list[float], float]:
        run = train(lambda model, args: FusedSequence(start(model), args), self.digits, args, self.bar)
        return run.losses, digits_loss(run.model, self.digits)

    def _characters(self, args: argparse.Namespace, start: Start) -> tuple[list[float], float]:
        torch.manual_seed(args.seed)
        model = start(with_precision(characters.CharacterModel(), args))
        optimizer = FusedSGD(
            model.parameters(),
            CHARACTER_LR,
            momentum=0.9,
            nesterov=True,
            max_grad_norm=CHARACTER_CLIP,
            **storage_options(args),
        )
        steps = self.args.steps
        scheduler = LambdaLR(optimizer, warmup_cosine(steps, max(1, steps // 10)))
        generator = torch.Generator().manual_seed(args.seed)
        losses: list[Tensor] = []
        task = self.bar.add_task("characters", total=steps)
        for _ in range(steps):
            optimizer.zero_grad()
            loss = characters.loss_of(model, self.text.batch(CHARACTER_BATCH, generator))
            loss.backward()
            optimizer.step()
            scheduler.step()
            losses.append(loss.detach())
            self.bar.advance(task)
        return torch.stack(losses).tolist(), characters.test_loss(model, self.text)


@torch.no_grad()
def rounded(model: nn.Module) -> nn.Module:
    """The model with weights that are bfloat16's, in float32."""
    for param in model.parameters():
        param.copy_(param.bfloat16())
    return model


@torch.no_grad()
def digits_loss(model: nn.Module, data: Data) -> float:
    """The mean cross entropy of the test set, in nats; the model is in evaluation mode."""
    sums = [F.cross_entropy(model(images), labels, reduction="sum") for images, labels in DataLoader(data.test, 256)]
    return torch.stack(sums).sum().item() / len(data.test)  # type: ignore[arg-type]


def state_bytes(mode: str) -> dict[str, float]:
    """Bytes a parameter, of a real optimizer that has stepped: of the weight, its gradient, and all of the state."""
    precision, momentum_dtype, *_ = MODES[mode]
    args = argparse.Namespace(precision=precision, momentum_dtype=momentum_dtype)
    dtype = torch.float32 if precision == "float32" else torch.bfloat16
    param = nn.Parameter(torch.zeros(1024, 1024, dtype=dtype))
    param.grad = torch.ones_like(param)
    optimizer = FusedSGD([param], momentum=0.9, **storage_options(args))
    optimizer.step()
    state = {key: kept.nbytes for key, kept in optimizer.state[param].items() if isinstance(kept, Tensor)}
    sizes = {"weight": param.nbytes, "gradient": param.grad.nbytes, "state": sum(state.values())}
    return {key: size / param.numel() for key, size in sizes.items()}


def stall(precision: str) -> float:
    """Where a weight of 1 gets, on average over 4096 of them, in steps that are below half of its ulp."""
    options = storage_options(argparse.Namespace(precision=precision, momentum_dtype=None))
    dtype = torch.float32 if precision == "float32" else torch.bfloat16
    param = nn.Parameter(torch.ones(4096, dtype=dtype))
    param.grad = torch.ones_like(param)
    optimizer = FusedSGD([param], STALL_LR, **options)
    for _ in range(STALL_STEPS):
        optimizer.step()
    return param.detach().double().mean().item()


def measure(study: Study) -> dict[str, Any]:
    """Everything, for the JSON."""
    args = study.args
    order = [(task, mode, seed) for seed in range(args.seeds) for task in TASKS for mode in MODES]
    total = study.bar.add_task("all runs", total=len(order))
    trained = commit()  # before the runs: a checkout may move on meanwhile
    runs = []
    for entry in order:
        runs.append(study.run(*entry))
        study.bar.remove_task(study.bar.task_ids[-1])
        study.bar.advance(total)
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "machine": describe_machine("cpu"),
        "commit": trained,
        "fused_sgd": fused_sgd.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),  # whose sources are the text
        "text": {"files": study.text.files, "characters": study.text.characters},
        "arguments": {key: getattr(args, key) for key in ("epochs", "width", "steps", "seeds", "threads")},
        "bytes": {mode: state_bytes(mode) for mode in MODES},
        "stall": {precision: stall(precision) for precision in PRECISIONS},
        "runs": runs,
    }


def commit() -> str | None:
    """Of the checkout, as the benchmarks tell it; None without one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()  # noqa: S603
    except (OSError, subprocess.CalledProcessError):
        return None


def main() -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        description="Measure losses of bfloat16 training in FusedSGD's storage modes, for docs/precision.md.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--epochs", type=number(int, 1), default=20, help="of every run on digits")
    add("--width", type=number(int, 1), default=32, help="of the model for digits, as in train.py")
    add("--steps", type=number(int, 1), default=400, help="of every run on characters")
    add("--seeds", type=number(int, 1), default=8, help="runs of each mode on each task")
    add("--threads", type=number(int, 1), default=1, help="CPU threads")
    add(
        "--guide",
        type=Path,
        default=Path("docs/precision.md"),
        help="its tables are replaced; the plot and the JSON lie beside it",
    )
    add("--redraw", action="store_true", help="trains nothing: the tables and the plot from the JSON that is there")
    args = parser.parse_args()
    data = args.guide.with_suffix(".json")
    try:
        before, rest = args.guide.read_text(encoding="utf-8").split(START)
        _, after = rest.split(END)
    except (OSError, ValueError) as error:
        parser.error(f"--guide: {args.guide} is no text with the lines {START.strip()} and {END.strip()}: {error}")
    if args.redraw:
        try:
            found = json.loads(data.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            parser.error(f"--redraw: {data} cannot be read: {error}")
    else:
        with Progress(*COLUMNS, console=Console(), transient=True) as bar:
            found = measure(Study(args, bar))
        data.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    measured = write_tables(found)
    print(measured)
    args.guide.write_text(f"{before}{START}{measured}{END}{after}", encoding="utf-8")
    draw(args.guide.with_suffix(".png"), found)
    print(f"{args.guide}, its plot and its JSON")
    return 0


if __name__ == "__main__":
    sys.exit(main())
