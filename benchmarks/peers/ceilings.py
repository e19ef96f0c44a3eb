"""The ceilings: the same arithmetic over one flat array, and a plain copy that moves as many bytes."""

from __future__ import annotations

import torch
from torch import Tensor

from ..workload import MOMENTUM, WEIGHT_DECAY, Workload
from .base import Contender, Peer
from .flat_cuda import flat_cuda
from .flat_loop import flat_loop


def _flat(workload: Workload, lr: float) -> Contender:
    param = torch.cat([param.flatten() for param in workload.params])
    grad = torch.cat([grad.flatten() for grad in workload.grads])
    buffer = torch.zeros_like(param)
    make = flat_cuda if param.is_cuda else flat_loop
    step = make(param, grad, buffer, lr=lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    sizes = [param.numel() for param in workload.params]
    shapes = [param.shape for param in workload.params]

    def tensors(flat: Tensor) -> list[Tensor]:
        return [part.view(shape) for part, shape in zip(torch.split(flat, sizes), shapes, strict=True)]

    return Contender(step, tensors(param), lambda: tensors(buffer))


def _copy(workload: Workload, lr: float) -> Contender:
    # Half of a step's bytes are read and half are written, so that the times of both can be compared as they are.
    source = torch.ones(workload.floor_bytes // 8, dtype=torch.float32, device=workload.device)
    to = torch.empty_like(source)
    return Contender(lambda: to.copy_(source), [])


FLAT = Peer("flat", _flat, role="ceiling")
COPY = Peer("copy", _copy, role="ceiling", computes=False)
