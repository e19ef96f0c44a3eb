"""The model and the training loop of train.py and large_batch.py."""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (its usual name)
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from image_data import Data, shift
from narrow import with_precision
from sequences import FusedSequence, TorchSequence


@dataclass
class Run:
    """One training run."""

    name: str
    model: nn.Module
    steps_per_epoch: int
    losses: list[float] = field(default_factory=list)  # one a step
    accuracy: float = math.nan  # on the test set, in [0, 1]
    averaged_accuracy: float | None = None  # the same with the averages of --ema in the parameters' place

    @property
    def final_loss(self) -> float:
        """The mean loss over the last epoch."""
        return statistics.fmean(self.losses[-self.steps_per_epoch :])


def block(channels_in: int, channels_out: int, stride: int = 1) -> nn.Sequential:
    """Convolution, batch norm, ReLU."""
    convolution = nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(channels_out), nn.ReLU(inplace=True))


def build_model(channels: int, classes: int, width: int) -> nn.Sequential:
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


def warmup_cosine(steps: int, warmup: int) -> Callable[[int], float]:
    """The factor on the learning rate: linear over the first ``warmup`` steps, then a cosine to zero."""

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


def train(
    make_sequence: Callable[[nn.Module, argparse.Namespace], TorchSequence | FusedSequence],
    data: Data,
    args: argparse.Namespace,
    bar: Progress,
) -> Run:
    """Trains a fresh model from the seed.

    Args:
        make_sequence: makes the optimizer and what goes around it.
        data: what to train and test on.
        args: the command line of train.py.
        bar: where to show how far it is.
    """
    torch.manual_seed(args.seed)
    model = build_model(data.channels, data.classes, args.width).to(args.device)
    if make_sequence is not TorchSequence:  # the peer remains float32
        model = with_precision(model, args)
    loader = make_loader(data, args)
    steps = args.epochs * len(loader)
    warmup = max(1, steps // 10) if args.warmup_epochs is None else round(args.warmup_epochs * len(loader))
    sequence = make_sequence(model, args)
    run = Run(sequence.name, model, len(loader))
    scheduler = LambdaLR(sequence.optimizer, warmup_cosine(steps, warmup))
    shifts = torch.Generator().manual_seed(args.seed)
    losses = []
    task = bar.add_task(run.name, total=steps)
    for _ in range(args.epochs):
        for images, labels in loader:
            sequence.optimizer.zero_grad()
            parts = zip(shift(images, shifts).chunk(args.accumulate), labels.chunk(args.accumulate), strict=True)
            loss = torch.stack([backward(model, *part, sequence.scaler, args) for part in parts]).mean()
            sequence.step()
            scheduler.step()
            losses.append(loss)  # .item() would wait for the device at every step
            bar.advance(task)
    run.losses = torch.stack(losses).tolist()
    run.accuracy = test_accuracy(model, data, args)
    if args.ema is not None:
        with sequence.averaged() as averaged:
            run.averaged_accuracy = test_accuracy(averaged, data, args)
    return run


def backward(
    model: nn.Module, images: Tensor, labels: Tensor, scaler: torch.amp.GradScaler, args: argparse.Namespace
) -> Tensor:
    """Adds the gradients of one part of a batch to what is there; returns its mean loss."""
    loss = compute_loss(model, images, labels, args)
    scaler.scale(loss).backward()
    return loss.detach()


def compute_loss(model: nn.Module, images: Tensor, labels: Tensor, args: argparse.Namespace) -> Tensor:
    """The cross entropy of images, under autocast if ``--amp`` says so."""
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
