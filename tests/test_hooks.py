"""What torch does around a step: hooks, and a range for the profiler. FusedSGD does it only while someone looks on."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fused_sgd import FusedLARS, FusedSGD
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from support import make_params, set_grads

Calls = list[tuple[Any, ...]]


class Overriding(FusedSGD):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class WrappedByHand(FusedSGD):
    @functools.wraps(FusedSGD.step)
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


CLASSES = [torch.optim.SGD, FusedSGD, FusedLARS, Overriding, WrappedByHand]


def made(cls: type[Optimizer]) -> Optimizer:
    params = make_params([(3,), (2, 2)])
    set_grads(params, seed=0)
    return cls(params, lr=0.1)


@pytest.fixture
def global_calls() -> Iterator[Calls]:
    calls: Calls = []
    before = register_optimizer_step_pre_hook(lambda *got: calls.append(("global before", *got)))
    after = register_optimizer_step_post_hook(lambda *got: calls.append(("global after", *got)))
    yield calls
    before.remove()
    after.remove()


def closure() -> float:
    return 1.0


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize(("args", "kwargs"), [((), {}), ((closure,), {}), ((), {"closure": closure})])
def test_each_hook_is_called_once_with_what_step_was_given(
    cls: type[Optimizer], args: tuple[Any, ...], kwargs: dict[str, Any], global_calls: Calls
) -> None:
    optimizer = made(cls)
    optimizer.register_step_pre_hook(lambda *got: global_calls.append(("before", *got)))
    optimizer.register_step_post_hook(lambda *got: global_calls.append(("after", *got)))
    optimizer.step(*args, **kwargs)
    if cls is WrappedByHand:  # hands its argument on by position
        args, kwargs = (args or tuple(kwargs.values()) or (None,)), {}
    given = (optimizer, (optimizer, *args), kwargs)
    order = ["global before", "before", "after", "global after"]
    assert global_calls == [(name, *given) for name in order]


def test_a_hook_before_may_replace_the_arguments() -> None:
    optimizer = made(FusedSGD)
    optimizer.register_step_pre_hook(lambda optimizer, args, kwargs: ((optimizer, closure), {}))
    assert optimizer.step() == 1.0


def test_a_hook_before_must_return_nothing_or_arguments() -> None:
    optimizer = made(FusedSGD)
    optimizer.register_step_pre_hook(lambda *_: 1)
    with pytest.raises(RuntimeError, match="must return None or a tuple"):
        optimizer.step()


def test_a_hook_that_was_removed_is_not_called() -> None:
    optimizer = made(FusedSGD)
    calls: Calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append(())).remove()
    optimizer.step()
    assert not calls


@pytest.mark.parametrize("cls", CLASSES)
def test_a_profiler_sees_one_range_a_step(cls: type[Optimizer]) -> None:
    optimizer = made(cls)
    optimizer.step()  # not seen
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
        optimizer.step()
    ranges = {event.key: event.count for event in profile.key_averages()}
    assert ranges[f"Optimizer.step#{cls.__name__}.step"] == 2


def test_a_profiler_that_follows_python_sees_the_optimizer(tmp_path: Path) -> None:
    optimizer = made(FusedSGD)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], with_stack=True) as profile:
        optimizer.step()
    profile.export_chrome_trace(str(tmp_path / "trace.json"))
    assert "_optimizer_step_code" in (tmp_path / "trace.json").read_text()


def test_the_wrapper_keeps_the_name_the_words_and_a_scheduler() -> None:
    assert FusedSGD.step.__name__ == "step"
    assert "Performs one step" in (FusedSGD.step.__doc__ or "")
    optimizer = made(FusedSGD)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    optimizer.step()
    scheduler.step()  # warns, which is an error here, unless it has seen the step
    assert optimizer.param_groups[0]["lr"] == 0.05
