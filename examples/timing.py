"""Times optimizer steps side by side, for train.py."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

TIMED_ROUNDS = 400


class Steps(Protocol):
    """An optimizer, or one with what goes around its update."""

    def step(self) -> Any:
        """Performs one step."""


@dataclass
class Timing:
    """Times of single optimizer steps, in µs."""

    name: str
    times: list[float] = field(default_factory=list)

    @property
    def quartiles(self) -> tuple[float, float, float]:
        """Lower quartile, median, upper quartile."""
        low, median, high = statistics.quantiles(self.times, n=4, method="inclusive")
        return low, median, high

    def ratio_to(self, other: Timing) -> float:
        """The median ratio of steps of the same round, so that what slows a whole round cancels."""
        return statistics.median(mine / its for mine, its in zip(self.times, other.times, strict=True))


def take_turns(optimizers: Mapping[str, Steps], device: str) -> list[Timing]:
    """Times the steps of optimizers that take turns.

    Each round starts with another one: none is always the first to find the caches cold.
    """
    contestants = [(Timing(name), optimizer) for name, optimizer in optimizers.items()]
    for _ in range(10):
        for _, optimizer in contestants:
            optimizer.step()
    for round_number in range(TIMED_ROUNDS):
        first = round_number % len(contestants)
        for timing, optimizer in contestants[first:] + contestants[:first]:
            timing.times.append(time_once(optimizer, device))
    return [timing for timing, _ in contestants]


def time_once(optimizer: Steps, device: str) -> float:
    """Times one step in µs, until the device has done it."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = time.perf_counter_ns()
    optimizer.step()
    wait()
    return (time.perf_counter_ns() - start) / 1000
