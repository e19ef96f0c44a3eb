"""What `FusedSGD.explain()` returns."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from fused_sgd._judge import choose, name_of, refusal, state_tensors
from fused_sgd._precision import Group, storage
from torch import Tensor


class Row(NamedTuple):
    """Parameters of one group that are stepped in the same way."""

    group: int
    device: str
    dtype: str  # parameter's; the gradient's and momentum buffer's too where they differ
    path: str  # "none" where step() would refuse the parameter
    reason: str
    parameters: int
    names: tuple[str, ...]  # of all of them


class Explanation(list[Row]):
    """A list of rows that prints as a table."""

    def __str__(self) -> str:
        cells = [[*map(str, Row._fields)]]
        for row in self:
            names = ", ".join(row.names[:_SHOWN_NAMES]) + (", …" if row.parameters > _SHOWN_NAMES else "")
            cells.append([*map(str, row[:-1]), names])
        widths = [max(len(line[column]) for line in cells) for column in range(len(Row._fields))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
        return "\n".join(line.rstrip() for line in lines)

    __repr__ = __str__


_SHOWN_NAMES = 3


def explain(groups: list[Group], state: dict[Tensor, Any]) -> Explanation:
    """The rows for these param groups, in their order."""
    members: dict[tuple[int, str, str, str, str], list[str]] = {}
    for number, group in enumerate(groups):
        for index, param in enumerate(group["params"]):
            kept = state_tensors(group, param, state)
            path, reason = "none", refusal(group, param, param.grad)
            if not reason:
                path, reason, *_ = choose(group, param, param.grad, kept)
                if group["fused"] and path != "kernel":
                    path, reason = "none", f"fused=True cannot be honoured: {reason}"
            if param.grad is None:
                reason = f"provisional: no gradient yet{'; ' if reason else ''}{reason}"
            key = (number, str(param.device), _dtypes(group, param, kept.get("momentum_buffer")), path, reason)
            members.setdefault(key, []).append(name_of(group, index) or f"parameter {index}")
    return Explanation(Row(*key, parameters=len(found), names=tuple(found)) for key, found in members.items())


def _dtypes(options: Group, param: Tensor, buffer: Tensor | None) -> str:
    def short(dtype: torch.dtype) -> str:
        return str(dtype).removeprefix("torch.")

    kept = storage(options, param)
    beside = {"master": " with float32 master", "remainder": " with 16-bit remainder", "rounding": " stochastic"}
    text = short(param.dtype) + beside.get(kept.beside, "")
    if param.grad is not None and param.grad.dtype != param.dtype:
        text += f", gradient {short(param.grad.dtype)}"
    momentum = kept.momentum_dtype if buffer is None else buffer.dtype
    if options["momentum"] != 0 and momentum != param.dtype:
        text += f", momentum {short(momentum)}"
    return text
