"""Adapters of other libraries' SGD. Each imports its library when it is set up, so that a missing one is a row."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.optimizer import Optimizer

from .base import CannotRun, optimizer_peer


def _optimi(groups: Any, **hyperparameters: float) -> Optimizer:
    import optimi

    return optimi.SGD(groups, **hyperparameters)


def _pytorch_optimizer(groups: Any, **hyperparameters: float) -> Optimizer:
    from pytorch_optimizer import SGDW

    return SGDW(groups, weight_decouple=False, **hyperparameters)


def _timm(groups: Any, **hyperparameters: float) -> Optimizer:
    from timm.optim import SGDW

    return SGDW(groups, **hyperparameters)


def _flashoptim(groups: Any, **hyperparameters: float) -> Optimizer:
    from flashoptim import FlashSGD

    # Its plain form: as by default, 8-bit momentum would be another optimizer, with another result and other bytes.
    return FlashSGD(groups, quantize=False, master_weight_bits=None, **hyperparameters)


def _bitsandbytes(groups: Any, **hyperparameters: float) -> Optimizer:
    import bitsandbytes

    return bitsandbytes.optim.SGD(groups, **hyperparameters)


def _apex(groups: Any, **hyperparameters: float) -> Optimizer:
    if not torch.cuda.is_available():
        raise CannotRun("Apex needs CUDA")
    from apex.optimizers import FusedSGD  # PyPI's "apex" is another package, and has no such module

    return FusedSGD(groups, **hyperparameters)


OPTIMI = optimizer_peer("optimi", _optimi, momentum_key="exp_avg")
PYTORCH_OPTIMIZER = optimizer_peer("pytorch-optimizer", _pytorch_optimizer)
TIMM_SGDW = optimizer_peer("timm", _timm, decoupled=True)
FLASHOPTIM = optimizer_peer("flashoptim", _flashoptim, momentum_key=None)
BITSANDBYTES = optimizer_peer("bitsandbytes", _bitsandbytes, momentum_key="state1")
APEX = optimizer_peer("apex", _apex)
