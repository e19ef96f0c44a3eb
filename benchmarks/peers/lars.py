"""LARS a tensor at a time: timm's own where it is installed, elsewhere the published algorithm in torch's operators.

You et al., `Large Batch Training of Convolutional Networks <https://arxiv.org/abs/1708.03888>`_. Both write gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

TRUST_COEFF = 0.001
EPS = 1e-8


class PlainLars(Optimizer):
    """The paper's algorithm, operator by operator as timm's ``Lars`` runs it: two norms and the update of each tensor.

    As usual, tensors without weight decay do not adapt.
    """

    def __init__(self, params: Any, lr: float, momentum: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Steps the tensors in turn."""
        for group in self.param_groups:
            one = torch.tensor(1.0, device=group["params"][0].device)
            for param in group["params"]:
                self._step_one(param, group, one)

    def _step_one(self, param: Tensor, group: dict[str, Any], one: Tensor) -> None:
        grad, decay = param.grad, group["weight_decay"]
        assert grad is not None
        if decay != 0:
            param_norm, grad_norm = param.norm(2.0), grad.norm(2.0)
            ratio = TRUST_COEFF * param_norm / (grad_norm + param_norm * decay + EPS)
            ratio = torch.where(param_norm > 0, torch.where(grad_norm > 0, ratio, one), one)
            grad.add_(param, alpha=decay).mul_(ratio)
        state = self.state[param]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = grad.clone()
        else:
            state["momentum_buffer"].mul_(group["momentum"]).add_(grad)
        param.add_(state["momentum_buffer"], alpha=-group["lr"])


def torch_lars() -> tuple[str, Callable[..., Optimizer]]:
    """What it is, and the class."""
    try:
        import timm
        from timm.optim import Lars
    except ImportError:
        return "the published algorithm in torch's operators, a tensor at a time as timm runs it", PlainLars
    return f"timm {timm.__version__}", Lars
