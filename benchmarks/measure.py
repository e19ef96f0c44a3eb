"""Interleaved timing: what disturbs the machine for a while then disturbs every peer alike."""

from __future__ import annotations

import contextlib
import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from .clocks import Clock, Timed


@dataclass(frozen=True)
class Effort:
    """How long a configuration is measured: rounds until the time is up, but within these bounds.

    On a machine so busy that the fewest rounds take several times as long, it ends after three.
    """

    min_rounds: int
    max_rounds: int
    seconds: float


FULL = Effort(min_rounds=7, max_rounds=100, seconds=6.0)
QUICK = Effort(min_rounds=5, max_rounds=20, seconds=0.7)

_WARM_UP_STEPS = 3  # state is made, caches and plans are filled, threads are started
_PATIENCE = 4
_REHEARSED_SECONDS = 0.02  # shorter samples have an untimed one before them
_SAMPLE_SECONDS = 1e-3  # shorter steps are repeated until a sample takes this long


@dataclass(frozen=True)
class Quartiles:
    """The middle of a distribution, and where its middle half lies."""

    q1: float
    median: float
    q3: float

    @classmethod
    def of(cls, values: list[float]) -> Quartiles:
        """Of at least two values."""
        return cls(*statistics.quantiles(values, n=4, method="inclusive"))

    def scaled(self, factor: float) -> Quartiles:
        """In another unit."""
        return Quartiles(self.q1 * factor, self.median * factor, self.q3 * factor)


@dataclass(frozen=True)
class Samples:
    """Seconds a step took in each round. Round i of one peer belongs to round i of every other."""

    seconds: list[float]
    repeats: int  # steps in a sample

    def quartiles(self) -> Quartiles:
        """Of the step's seconds."""
        return Quartiles.of(self.seconds)

    def ratio_to(self, other: Samples) -> Quartiles:
        """Of this time over the other's, pair by pair."""
        return Quartiles.of([a / b for a, b in zip(self.seconds, other.seconds, strict=True)])


def warm_up(timed: Timed, clock: Clock) -> int:
    """Steps until state is made and caches are filled; returns how many steps make a sample."""
    timed(1)
    if min(timed(1), timed(1)) >= _REHEARSED_SECONDS:  # no caches hold what such a step needs
        return 1
    for _ in range(_WARM_UP_STEPS):
        timed(1)
    fastest = max(min(timed(1) for _ in range(_WARM_UP_STEPS)), 1e-9)
    return max(1, min(math.ceil(_SAMPLE_SECONDS / fastest), clock.max_repeats))


def measure(
    timed: Mapping[str, Timed],
    repeats: Mapping[str, int],
    effort: Effort,
    on_round: Callable[[int], None] = lambda _: None,
) -> dict[str, Samples]:
    """Times every step once a round, in an order drawn anew each time so that none always follows the same one.

    Args:
        timed: by the peer's name.
        repeats: steps in a sample, by the peer's name.
        effort: how many rounds.
        on_round: called after each round with how many are done.

    Returns:
        Samples by the peer's name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    order = list(timed)
    shuffle = random.Random(0).shuffle
    with _no_garbage_collection():
        begin = time.perf_counter()
        for done in range(1, effort.max_rounds + 1):
            shuffle(order)
            for name in order:
                # The peer before has filled the caches, and it takes some steps until they hold what this one needs.
                # Few steps in a sample would be told by those, many would not: so the first sample is not counted.
                if not seconds[name] or seconds[name][-1] * repeats[name] < _REHEARSED_SECONDS:
                    timed[name](repeats[name])
                seconds[name].append(timed[name](repeats[name]))
            on_round(done)
            elapsed = time.perf_counter() - begin
            if elapsed > effort.seconds and done >= effort.min_rounds:
                break
            if elapsed > _PATIENCE * effort.seconds and done >= 3:
                break
    return {name: Samples(seconds[name], repeats[name]) for name in timed}


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
