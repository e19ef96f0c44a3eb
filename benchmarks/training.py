"""Times whole training steps: what share of forward, backward and step is the optimizer's, with each peer.

    python -m benchmarks training                  both models
    python -m benchmarks training --models gpt     lists are separated by commas

All peers step the same parameters, in turn, each with a state of its own and a tiny learning rate. On a GPU the device
is waited for before and after the optimizer's step, so that its time is not counted into the next forward pass; a loop
that never waits may hide some of it.
"""

from __future__ import annotations

import argparse
import gc
import random
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import Optimizer

from . import options as shared
from . import tables, workload
from .measure import Effort, Samples
from .models import TRAININGS, Training
from .peers import OURS, PEERS, CannotRun
from .report_training import report_section
from .runner import File, Show, make_header, make_progress
from .verify import Check, check_once

__all__ = ["HELP", "add_arguments", "report_section", "run"]

HELP = "the optimizer's share of whole training steps"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options."""
    shared.add_list(parser, "--models", "model", TRAININGS)
    shared.add_arguments(parser, minutes=1.5, quick_minutes=0.2)


def run(given: argparse.Namespace) -> int:
    """Runs the benchmark; returns the exit status."""
    options = shared.read(given)
    console = tables.make_console()
    header = make_header("training", options, [])
    tables.show_header(console, header)
    torch.set_num_threads(max(options.threads))
    peers = [name for name in options.peers if PEERS[name].role in ("ours", "peer")]
    names = given.models or list(TRAININGS)
    file = File(options, header)
    rows: list[dict[str, Any]] = []
    with make_progress(console) as progress:
        task = progress.add_task("", total=len(names))

        def show(text: str) -> None:
            progress.update(task, description=text, refresh=True)

        show("checking results")
        checks = check_once(_trainable(peers), torch.float32, options.device)
        for done, name in enumerate(names):
            effort = options.budget.effort_for(2 / (len(names) - done))
            found = train(TRAININGS[name], peers, checks, options, effort, show)
            _show_table(progress.console, TRAININGS[name], found)
            rows += found
            file.write(rows, names[done + 1 :])
            progress.advance(task)
    file.finish(rows, [], console)
    return 0


def _trainable(peers: list[str]) -> list[str]:
    return [name for name in peers if PEERS[name].make is not None]


def train(
    training: Training, peers: list[str], checks: dict[str, Check], options: shared.Options, effort: Effort, show: Show
) -> list[dict[str, Any]]:
    """One row for each peer of a model."""
    model, gradients = training.make(options.device)
    wait: Callable[[], None] = torch.cuda.synchronize if options.device == "cuda" else lambda: None
    checks = dict(checks)
    optimizers: dict[str, Optimizer] = {}
    for peer in _trainable(peers):
        if checks[peer].status != "ok":
            continue
        try:
            make = PEERS[peer].make
            assert make is not None
            optimizers[peer] = make(list(model.parameters()), workload.TIMED_LR)
            for _ in range(2):
                train_step(model, gradients, optimizers[peer], wait)
        except (CannotRun, ImportError) as why:
            checks[peer] = Check("skipped", str(why))
        except Exception as exception:
            checks[peer] = Check("failed", f"{type(exception).__name__}: {exception}")
        if checks[peer].status != "ok":
            optimizers.pop(peer, None)
    times: dict[str, list[tuple[float, float]]] = {peer: [] for peer in optimizers}
    order, shuffle = list(optimizers), random.Random(0).shuffle
    begin, rounds = time.perf_counter(), 0
    gc.collect()
    while rounds < 3 or (time.perf_counter() - begin < effort.seconds and rounds < effort.max_rounds):
        rounds += 1
        show(f"{training.name} · round {rounds}")
        shuffle(order)
        for peer in order:
            times[peer].append(train_step(model, gradients, optimizers[peer], wait))
    outside = Check("skipped", "cannot be put into torch's loop")
    return [_row(training, options, model, peer, checks.get(peer, outside), times) for peer in peers]


def train_step(
    model: nn.Module, gradients: Callable[[], None], optimizer: Optimizer, wait: Callable[[], None]
) -> tuple[float, float]:
    """Seconds of forward and backward, and of the optimizer's step."""
    model.zero_grad()
    wait()
    begin = time.perf_counter()
    gradients()
    wait()
    between = time.perf_counter()
    optimizer.step()
    wait()
    return between - begin, time.perf_counter() - between


def _row(
    training: Training,
    options: shared.Options,
    model: nn.Module,
    peer: str,
    check: Check,
    times: dict[str, list[tuple[float, float]]],
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "model": training.name,
        "description": training.description,
        "batch": training.batch[options.device],
        "tensors": len(list(model.parameters())),
        "elements": sum(param.numel() for param in model.parameters()),
        "dtype": "float32",
        "threads": max(options.threads),
        "peer": peer,
        "role": PEERS[peer].role,
        "status": check.status,
        "reason": check.reason,
        "error": check.error,
        "rounds": None,
        "step_microseconds": None,
        "gradients_microseconds": None,
        "share_percent": None,
        "ratio_to_ours": None,
    }
    if peer not in times:
        return row
    step = Samples([step for _, step in times[peer]], 1)
    whole = Samples([sum(both) for both in times[peer]], 1)
    row["rounds"] = len(step.seconds)
    row["step_microseconds"] = vars(step.quartiles().scaled(1e6))
    row["gradients_microseconds"] = vars(Samples([grad for grad, _ in times[peer]], 1).quartiles().scaled(1e6))
    row["share_percent"] = vars(step.ratio_to(whole).scaled(100))
    if OURS in times:
        row["ratio_to_ours"] = vars(whole.ratio_to(Samples([sum(both) for both in times[OURS]], 1)))
    return row


def _show_table(console: Any, training: Training, rows: list[dict[str, Any]]) -> None:
    first = rows[0]
    console.print(
        f"\n[bold]{training.name}[/]   {training.description}, batch {first['batch']}: {first['tensors']} tensors,"
        f" {first['elements'] / 1e6:.4g} M elements",
        highlight=False,
        soft_wrap=True,
    )
    table = tables.make_table("peer", "gradients", "step", "step's share", "whole / ours", left=("peer",))
    for row in rows:
        if row["share_percent"] is None:
            table.add_row(row["peer"], row["status"])
            continue
        ratio = row["ratio_to_ours"]
        table.add_row(
            row["peer"],
            tables.show_time(row["gradients_microseconds"]["median"]),
            tables.show_time(row["step_microseconds"]["median"]),
            f"{row['share_percent']['median']:.1f} %",
            "" if ratio is None else f"{ratio['median']:.3f}",
            style="bold" if row["role"] == "ours" else "",
        )
    console.print(table)
