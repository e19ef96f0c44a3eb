"""The process that runs optax: reads pickled messages, steps, answers. It knows nothing of the rest; see optax_peer.py.

The whole step is one jitted function whose inputs are donated, so that parameters and momentum are updated in place.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Steps:
    """The state of a set-up optimizer."""

    def __init__(
        self, bfloat16: bool, params: list[Any], grads: list[Any], lr: float, momentum: float, weight_decay: float
    ) -> None:
        import jax
        import jax.numpy as jnp
        import optax

        def as_jax(array: Any) -> Any:
            # A copy: jax may otherwise share the memory, which cannot be donated.
            return jnp.array(array.view(jnp.bfloat16) if bfloat16 else array, copy=True)

        self._jax, self._bfloat16 = jax, bfloat16
        optimizer = optax.chain(optax.add_decayed_weights(weight_decay), optax.sgd(lr, momentum))
        self._params, self._grads = [as_jax(a) for a in params], [as_jax(a) for a in grads]
        self._state = optimizer.init(self._params)

        def update(params: Any, state: Any, grads: Any) -> Any:
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        self._update = jax.jit(update, donate_argnums=(0, 1))

    def step(self, repeats: int, threads: int) -> float:
        """Runs so many steps on so many cores; returns the seconds of one."""
        _hold_to_cores(threads)
        begin = time.perf_counter_ns()
        for _ in range(repeats):
            self._params, self._state = self._update(self._params, self._state, self._grads)
        self._jax.block_until_ready((self._params, self._state))
        return (time.perf_counter_ns() - begin) * 1e-9 / repeats

    def results(self) -> list[Any]:
        """Parameters, then momentum buffers."""
        import numpy as np

        shapes = [param.shape for param in self._params]
        buffers = [leaf for leaf in self._jax.tree_util.tree_leaves(self._state) if getattr(leaf, "ndim", 0)]
        if [buffer.shape for buffer in buffers] != shapes:
            buffers = []  # optax keeps its state in another form than this knows
        arrays = [np.asarray(array) for array in (*self._params, *buffers)]
        return [array.view(np.int16) for array in arrays] if self._bfloat16 else arrays


_CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def _hold_to_cores(threads: int) -> None:
    """Every thread of this process to the first cores: the runtime has no number of threads to set."""
    if not _CORES or not Path("/proc/self/task").exists():
        return
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # a thread may have ended in the meantime
            os.sched_setaffinity(int(task.name), _CORES[:threads])


def main() -> None:
    """Answers until the pipe is closed."""
    steps: Steps | None = None
    # Libraries print; what they print must not get between the answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    while True:
        try:
            what, *arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            if what == "set_up":
                steps, answer = Steps(*arguments), None
            else:
                work: Callable[..., Any] = getattr(steps, what)
                answer = work(*arguments)
            pickle.dump((True, answer), answers)
        except Exception as error:
            pickle.dump((False, f"{type(error).__name__}: {error}"), answers)
        answers.flush()


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main()
