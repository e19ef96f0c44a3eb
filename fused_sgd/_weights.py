"""The weights beside the model's: averages, and the masters of narrow parameters."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from fused_sgd._precision import exact_weights, storage
from fused_sgd._settling import Settling
from fused_sgd.reference import is_unset
from torch import Tensor


class Weights(Settling):
    """The part of FusedSGD that shows them."""

    _holds_averages: bool  # inside swap_ema()

    @contextlib.contextmanager
    def swap_ema(self) -> Iterator[None]:
        """Puts the averages into the parameters, in place; afterwards the parameters are what they were, to the bit.

        For evaluation: ``with optimizer.swap_ema(): evaluate(model)``. Parameters that have no average yet, and those
        of groups without ``ema_decay``, keep their values. Takes as much more memory as the parameters.

        Raises:
            RuntimeError: no param group has an ``ema_decay``; and inside it, for another ``swap_ema()``, ``step()``,
                ``state_dict()``, ``load_state_dict()``, ``master_weights()``, ``refresh_master_weights()`` and copies
                of the optimizer.
        """
        self._refuse_averages("swap_ema()")
        if all(options["ema_decay"] is None for options in self.param_groups):
            raise RuntimeError("swap_ema() needs averages, which the option `ema_decay` keeps")
        averaged = []
        for number, options in enumerate(self.param_groups):
            for index, param in enumerate(options["params"] if options["ema_decay"] is not None else ()):
                average = self._sound_state(number, index, "ema")
                if average is not None:
                    averaged.append((param, average, param.detach().clone()))
        self._holds_averages = True
        try:
            with torch.no_grad():
                for param, average, kept in averaged:
                    param.copy_(torch.where(is_unset(average), kept.to(average.dtype), average))
            yield
        finally:
            self._holds_averages = False
            with torch.no_grad(), contextlib.ExitStack() as restoring:  # all of them, whatever was done to one inside
                for param, _, kept in averaged:
                    restoring.callback(param.copy_, kept)

    def _refuse_averages(self, what: str) -> None:
        if self._holds_averages:
            raise RuntimeError(f"{what} inside swap_ema(): the model holds the averages, not what is trained")

    def refresh_master_weights(self) -> None:
        """Takes over what was written into parameters behind autograd's back, by edits of ``.data``.

        Everything else is seen by itself. Where a float32 master does not round to its parameter, it becomes the
        parameter's value. (With ``master_weights="split"`` the parameter is a part of the master, and edits of it count
        at once. The other part, ``remainder`` in the state, stays: zero it where the written value is to be exact.)

        Raises:
            RuntimeError: inside :meth:`swap_ema`, where parameters hold what is no master's.
        """
        self._refuse_averages("refresh_master_weights()")
        groups = enumerate(self.param_groups)
        self._refresh([(group, index) for group, options in groups for index in range(len(options["params"]))])

    def master_weights(self) -> dict[Tensor, Tensor]:
        """The exact float32 values of the parameters that have master weights, for an export or an evaluation.

        Of the parameters of groups with ``master_weights``, the bfloat16 and float16 ones: fresh float32 tensors of
        their shapes, on their devices, by parameter; empty where there are none. Before a parameter's first step it is
        the parameter's value, and with ``torch.float32`` also where the parameter was written since. (With ``"split"``
        a write leaves the remainder, up to half a bfloat16's last bit; see :meth:`refresh_master_weights`.)

        Example:
            >>> exact = optimizer.master_weights()
            >>> weights = {name: exact.get(p, p.detach()).float() for name, p in model.named_parameters()}

        Raises:
            RuntimeError: inside :meth:`swap_ema`, where parameters hold what is no master's.
        """
        self._refuse_averages("master_weights()")
        found = {}
        for group, options in enumerate(self.param_groups):
            for index, param in enumerate(options["params"]):
                if storage(options, param).has_master:
                    kept = {key: self._sound_state(group, index, key) for key in ("master", "remainder")}
                    found[param] = exact_weights(param, **kept)
        return found
