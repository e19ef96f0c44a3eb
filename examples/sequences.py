"""What a training step does around the update: unscale, divide, clip, average. Torch's passes, and ours in one."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from fused_sgd import FusedLARS, FusedSGD, param_groups
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from narrow import storage_options


class TorchSequence:
    """torch.optim.SGD, and a pass of its own for each thing around it."""

    name = "torch.optim.SGD"

    def __init__(self, model: nn.Module, args: argparse.Namespace, **options: Any) -> None:
        self.args = args
        self.params = list(model.parameters())
        self.model = model
        self.scaler = torch.amp.GradScaler(args.device, enabled=args.amp)
        self.optimizer = torch.optim.SGD(self.params, args.sgd_lr, **common(args), **options)
        self.average = None
        if args.ema is not None:
            self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(args.ema))

    def step(self) -> None:
        """One step, with the gradients as the backward passes left them: scaled, and summed over ``--accumulate``."""
        grads = [param.grad for param in self.params if param.grad is not None]
        if self.args.clip is not None or self.args.accumulate > 1:
            self.scaler.unscale_(self.optimizer)
        if self.args.accumulate > 1:
            torch._foreach_div_(grads, self.args.accumulate)
        if self.args.clip is not None:
            nn.utils.clip_grad_norm_(self.params, self.args.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.update_parameters(self.model)  # type: ignore[no-untyped-call]

    @contextlib.contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """The model with the averages of its parameters."""
        assert self.average is not None
        yield self.average.module


class FusedSequence:
    """FusedSGD or FusedLARS: everything around the update happens inside the step, and gradients are not written."""

    def __init__(self, model: nn.Module, args: argparse.Namespace) -> None:
        self.args = args
        self.model = model
        self.scaler = torch.amp.GradScaler(args.device, enabled=args.amp)
        self.optimizer: FusedSGD
        options = {**common(args), "max_grad_norm": args.clip, "ema_decay": args.ema, **storage_options(args)}
        if args.optimizer == "lars":
            groups = param_groups(model, options.pop("weight_decay"))
            for group in groups:
                if group["weight_decay"] == 0:  # biases and norms, which do not adapt
                    group["lr"] = args.sgd_lr
            self.optimizer = FusedLARS(groups, args.lr, **options)
        else:
            self.optimizer = FusedSGD(model.parameters(), args.lr, **options)
        self.name = type(self.optimizer).__name__

    def step(self) -> None:
        """One step, with the gradients as the backward passes left them: scaled, and summed over ``--accumulate``."""
        if self.args.accumulate > 1:
            # The step divides by it on the way (a scaler multiplies it by its own scale, and deletes it afterwards). A
            # loss divided by K would do as well, but rounds each part, unless K is a power of two.
            self.optimizer.grad_scale = self.args.accumulate
        self.scaler.step(self.optimizer)
        self.scaler.update()

    @contextlib.contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """The model with the averages of its parameters."""
        with self.optimizer.swap_ema():
            yield self.model


def common(args: argparse.Namespace) -> dict[str, Any]:
    """What every optimizer here is built with, beside its learning rate."""
    nesterov = args.momentum > 0  # torch refuses one without the other
    return {"momentum": args.momentum, "nesterov": nesterov, "weight_decay": args.weight_decay}
