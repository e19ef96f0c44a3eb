"""Trains a small convolutional network twice, with torch.optim.SGD and with FusedSGD, and compares the two.

    python examples/train.py                                     # scikit-learn's digits on the CPU, under a minute
    python examples/train.py --data path/to/images --color rgb   # a folder of images, one sub-folder a class
    python examples/train.py --device cuda --amp                 # mixed precision with a GradScaler

Both runs start from the same seed and see the same batches, so in float32 on a CPU their weights must end equal to the
bit; the exit code is 1 if they do not. Needs, beside fused_sgd: scikit-learn, pillow, matplotlib, rich.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fused_sgd import FusedSGD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (its usual name)
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from image_data import CHANNELS, Data, InputError, load_data, shift
from report import OURS, Run, describe_machine, draw, print_report
from timing import Timing, take_turns


def block(channels_in: int, channels_out: int, stride: int = 1) -> nn.Sequential:
    """Convolution, batch norm, ReLU."""
    convolution = nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(channels_out), nn.ReLU(inplace=True))


def build_model(channels: int, classes: int, width: int = 32) -> nn.Sequential:
    """Six convolutions in three stages that halve the image and double the width, a mean, and a linear layer."""
    return nn.Sequential(
        block(channels, width),
        block(width, width),
        block(width, 2 * width, stride=2),
        block(2 * width, 2 * width),
        block(2 * width, 4 * width, stride=2),
        block(4 * width, 4 * width),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, classes),
    )


def warmup_cosine(steps: int) -> Callable[[int], float]:
    """The factor on the learning rate: linear over the first tenth of the steps, then a cosine to zero."""
    warmup = max(1, steps // 10)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return factor


def make_loader(data: Data, args: argparse.Namespace) -> DataLoader[tuple[Tensor, ...]]:
    """Batches of the training set, in an order that depends on the seed alone."""
    size = len(data.train)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(args.seed)
    return DataLoader(data.train, args.batch_size, shuffle=True, drop_last=size >= args.batch_size, generator=generator)


def train(name: str, optimizer_class: Callable[..., Any], data: Data, args: argparse.Namespace, bar: Progress) -> Run:
    """Trains a fresh model from the seed.

    Args:
        name: for the progress bar and the tables.
        optimizer_class: torch.optim.SGD or one with its arguments.
        data: what to train and test on.
        args: the command line.
        bar: where to show how far it is.
    """
    torch.manual_seed(args.seed)
    model = build_model(data.channels, data.classes).to(args.device)
    loader = make_loader(data, args)
    run = Run(name, model, len(loader))
    steps = args.epochs * len(loader)
    optimizer = optimizer_class(model.parameters(), **hyperparameters(args))
    scheduler = LambdaLR(optimizer, warmup_cosine(steps))
    scaler = torch.amp.GradScaler(args.device, enabled=args.amp)
    shifts = torch.Generator().manual_seed(args.seed)
    losses = []
    task = bar.add_task(name, total=steps)
    for _ in range(args.epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            loss = compute_loss(model, shift(images, shifts), labels, args)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            scheduler.step()
            losses.append(loss.detach())  # .item() would wait for the device at every step
            bar.advance(task)
    run.losses = torch.stack(losses).tolist()
    run.accuracy = test_accuracy(model, data, args)
    return run


def hyperparameters(args: argparse.Namespace) -> dict[str, Any]:
    """What every optimizer here is built with."""
    nesterov = args.momentum > 0  # torch refuses one without the other
    return {"lr": args.lr, "momentum": args.momentum, "nesterov": nesterov, "weight_decay": args.weight_decay}


def compute_loss(model: nn.Module, images: Tensor, labels: Tensor, args: argparse.Namespace) -> Tensor:
    """The cross entropy of one batch, under autocast if ``--amp`` says so."""
    images, labels = images.to(args.device), labels.to(args.device)
    with torch.amp.autocast(args.device, enabled=args.amp):  # bfloat16 on a CPU, float16 on a GPU
        return F.cross_entropy(model(images), labels)


@torch.no_grad()
def test_accuracy(model: nn.Module, data: Data, args: argparse.Namespace) -> float:
    """The part of the test set that the model labels right; leaves the model in evaluation mode."""
    model.eval()
    right = [
        model(images.to(args.device)).argmax(dim=1).cpu() == labels
        for images, labels in DataLoader(data.test, args.batch_size)
    ]
    return torch.cat(right).float().mean().item()


def equal_to_the_bit(first: nn.Module, second: nn.Module) -> bool:
    """Whether all weights and running statistics have the same bytes; ``==`` would miss the sign of a zero."""
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(mine.cpu().numpy().tobytes() == other.cpu().numpy().tobytes() for mine, other in pairs)


def time_optimizers(model: nn.Module, data: Data, args: argparse.Namespace) -> list[Timing]:
    """Times four optimizers on copies of the trained model with the gradients of one batch; ours comes first."""
    model.train()
    images, labels = next(iter(make_loader(data, args)))
    compute_loss(model, images, labels, args).backward()
    kinds: dict[str, tuple[Callable[..., Any], dict[str, bool]]] = {
        OURS: (FusedSGD, {}),
        "torch fused": (torch.optim.SGD, {"fused": True}),
        "torch foreach": (torch.optim.SGD, {"foreach": True}),
        "torch for-loop": (torch.optim.SGD, {"foreach": False}),
    }
    optimizers = {
        name: kind(copy_with_gradients(model), **hyperparameters(args), **options)
        for name, (kind, options) in kinds.items()
    }
    return take_turns(optimizers, args.device)


def copy_with_gradients(model: nn.Module) -> list[nn.Parameter]:
    """Copies of a model's parameters and of their gradients."""
    params = list(copy.deepcopy(model).parameters())
    for param, source in zip(params, model.parameters(), strict=True):
        param.grad = None if source.grad is None else source.grad.clone()
    return params


def number(kind: type[int] | type[float], minimum: float) -> Callable[[str], float]:
    """A type for argparse: a finite number that is not below a minimum."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not minimum <= value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not a finite {kind.__name__} of at least {minimum}")
        return value

    return parse


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        description="Train a small convolutional network with torch.optim.SGD and with FusedSGD, and compare.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--data", default="digits", help="'digits', or a folder: PATH/train and PATH/val (or test), or PATH/class")
    add("--image-size", type=number(int, 8), default=32, help="images of a folder are resized to this square")
    add("--color", choices=CHANNELS, default="rgb", help="how images of a folder are read")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where to train")
    add("--batch-size", type=number(int, 1), default=128, help="images a step")
    add("--epochs", type=number(int, 1), default=20, help="passes over the training set")
    add("--lr", type=number(float, 0), default=0.1, help="learning rate after the warm-up")
    add("--momentum", type=number(float, 0), default=0.9, help="momentum factor, of Nesterov's kind")
    add("--weight-decay", type=number(float, 0), default=5e-4, help="L2 penalty")
    add("--amp", action="store_true", help="autocast and a GradScaler")
    add("--seed", type=number(int, 0), default=0, help="of the weights, the batches and the split of a folder")
    add("--threads", type=number(int, 1), default=torch.get_num_threads(), help="CPU threads; 1 on a busy machine")
    add("--output", type=Path, default=Path("runs/demo.png"), help="where the picture goes")
    return parser


def prepare(args: argparse.Namespace) -> None:
    """Finds out before the training, not after, what cannot work; sets up torch."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device cuda: torch {torch.__version__} finds no usable GPU here; use --device cpu")
    if args.output.suffix != ".png":
        raise InputError(f"--output: {args.output} does not end in .png")
    try:
        args.output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output: no folder for {args.output}: {error}") from error
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.deterministic = True  # else two runs differ whatever the optimizer


def compare(args: argparse.Namespace) -> int:
    """Trains twice, times, reports; returns the exit code."""
    prepare(args)
    data = load_data(args)
    console = Console()
    machine = describe_machine(args.device)
    print(machine)
    columns = (TextColumn("{task.description:<16}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        optimizers = {"torch.optim.SGD": torch.optim.SGD, OURS: FusedSGD}
        runs = [train(name, optimizer, data, args, bar) for name, optimizer in optimizers.items()]
    equal = equal_to_the_bit(runs[0].model, runs[1].model)
    timings = time_optimizers(runs[1].model, data, args)
    print_report(console, runs, timings, equal)
    title = f"A small convolutional network on {data.name}: weights {'' if equal else 'NOT '}equal to the bit"
    draw(args.output, title, machine, runs, timings)
    print(f"picture: {args.output}")
    # Under autocast or on a GPU the gradients themselves need not repeat, so there a difference proves nothing.
    return 0 if equal or args.amp or args.device == "cuda" else 1


def main() -> int:
    """Runs the command line."""
    parser = build_parser()
    try:
        return compare(parser.parse_args())
    except InputError as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
