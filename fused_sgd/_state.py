"""The optimizer's outer state dict."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any


def _reporting(name: str) -> Callable[..., Any]:
    """The dict method `name`, reporting to the plan."""
    method = getattr(defaultdict, name)

    def report(self: State, *args: Any, **kwargs: Any) -> Any:
        if self.plan is not None:
            self.plan.forget_state()
        return method(self, *args, **kwargs)

    report.__name__ = name
    return report


class State(defaultdict[Any, Any]):
    """Maps a parameter to its own dict, and tells the plan whenever the mapping itself changes.

    The plan keeps the inner dicts it has found and looks into them at every step. Looking each one up again would hash
    every parameter; this way replaced, added and removed ones are seen all the same. Inner dicts are plain.
    """

    def __init__(self, plan: Any = None, items: Iterable[Any] = ()) -> None:
        super().__init__(dict)
        self.plan: Any = None
        self.update(items)
        self.plan = plan
        if plan is not None:
            plan.watch(self)

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy belongs to another optimizer and gets that one's plan.
        return State, (), None, None, iter(self.items())

    def __missing__(self, key: Any) -> dict[str, Any]:
        inner: dict[str, Any] = {}
        self[key] = inner
        return inner

    __setitem__ = _reporting("__setitem__")
    __delitem__ = _reporting("__delitem__")
    __ior__ = _reporting("__ior__")
    clear = _reporting("clear")
    pop = _reporting("pop")
    popitem = _reporting("popitem")
    setdefault = _reporting("setdefault")
    update = _reporting("update")
