"""What torch does around every optimizer's step(): a range for the profiler, hooks before and after.

Torch's own wrapper opens its range whether or not anything records it, which takes longer than a step over a hundred
tensors. This one asks first, and goes torch's way when a profiler or a hook is there. Under torch.compile a step runs
outside of the graph, as that of torch.optim.SGD does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from fused_sgd._native import C
from torch.compiler import is_dynamo_compiling
from torch.optim import optimizer
from torch.optim.optimizer import Optimizer

Function = TypeVar("Function", bound=Callable[..., Any])

if C is not None:
    _is_recording = C.is_recording
else:

    def _is_recording() -> bool:
        return True


_dynamo_callback = torch._C._dynamo.eval_frame.get_eval_frame_callback  # None unless Dynamo looks at this thread


def with_hooks(step: Function) -> Function:
    """``step`` as :meth:`torch.optim.Optimizer.profile_hook_step` makes it, but free while nobody looks on."""
    watched = Optimizer.profile_hook_step(step)
    # There is nothing in a step that Dynamo could compile, and it would try, frame by frame, with a warning for each.
    # torch.optim uses the same function; torch.compiler.disable() would import Dynamo now, which takes a second.
    outside = torch._disable_dynamo  # type: ignore[attr-defined]
    step_outside, watched_outside = outside(step), outside(watched)
    global_before, global_after = optimizer._global_optimizer_pre_hooks, optimizer._global_optimizer_post_hooks

    def is_torchs(outer: Callable[..., Any]) -> bool:
        # The step() of a subclass, which comes here through super(): torch has wrapped it, and called the hooks.
        return getattr(outer, "__code__", None) is watched.__code__

    @functools.wraps(step)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        self = args[0]
        if is_dynamo_compiling() or _dynamo_callback() is not None:
            run = step_outside if is_torchs(type(self).step) else watched_outside
            return run(*args, **kwargs)
        hooks = self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks or global_before or global_after
        if (hooks or _is_recording()) and not is_torchs(type(self).step):
            return watched(*args, **kwargs)
        return step(*args, **kwargs)

    wrapper.hooked = True  # type: ignore[attr-defined]  # so that torch does not wrap it again
    return wrapper  # type: ignore[return-value]
