"""The update in plain PyTorch: the specification of every option, the oracle of the tests, and the fallback path.

One function per tensor, one operation per line, in the order of the kernel's rule (csrc/core/rule.h). In float32 and
float64 both give the same bits. bfloat16 and float16 are computed in float32 and rounded once, when they are stored.
"""

from __future__ import annotations

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype an update is computed in: float32 for the 16-bit formats, their own for all others."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def sgd_update(
    param: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor | None,
    *,
    lr: float | Tensor,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float | Tensor = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    grad_scale: float | Tensor | None = None,
) -> Tensor | None:
    r"""One step of SGD on one parameter, in place.

    With gradient :math:`g` (divided by ``grad_scale`` if given, negated if ``maximize``), parameter :math:`p`, learning
    rate :math:`\gamma`, weight decay :math:`\lambda`, momentum :math:`\mu`, dampening :math:`\tau` and momentum buffer
    :math:`b`:

    .. math::
        d &= g + \lambda p \\
        b &\leftarrow d \text{ on the first step, else } \mu b + (1 - \tau) d \\
        d &\leftarrow d + \mu b \text{ if Nesterov, else } b \\
        p &\leftarrow p - \gamma d

    The formula is that of :class:`torch.optim.SGD`; its Nesterov form is from Sutskever et al., `On the importance of
    initialization and momentum in deep learning <http://www.cs.toronto.edu/%7Ehinton/absps/momentum.pdf>`_.

    Args:
        param: the parameter, of any shape, written in place.
        grad: its gradient, of the same shape, dense. It is not written.
        momentum_buffer: from the step before, written in place; ``None`` on the parameter's first step.
        lr: learning rate.
        momentum: momentum factor; 0 for none.
        dampening: part of the gradient kept out of the momentum, after the first step.
        weight_decay: L2 penalty.
        nesterov: whether to use Nesterov momentum.
        maximize: whether to ascend instead of descend.
        grad_scale: what gradients are divided by first; a number or 1-element tensor, taken as a float32.

    Returns:
        The momentum buffer to keep for the next step, in ``param``'s dtype and shape, or ``None`` without momentum.
    """
    dtype = accumulation_dtype(param.dtype)
    p = param.to(dtype)
    d = grad.to(dtype)
    if grad_scale is not None:
        d = unscaled(d, grad_scale)
    if maximize:
        d = -d
    if weight_decay != 0:
        d = _add(d, p, weight_decay)
    b = None
    if momentum != 0:
        b = d if momentum_buffer is None else _add(momentum_buffer.to(dtype) * momentum, d, 1 - dampening)
        d = _add(d, b, momentum) if nesterov else b
    if dtype == param.dtype:
        _add(param, d, lr, sign=-1, in_place=True)
    else:
        param.copy_(_add(p, d, lr, sign=-1))
    if b is None:
        return momentum_buffer
    if momentum_buffer is not None:
        return momentum_buffer.copy_(b)
    return torch.empty_like(param).copy_(b)


def unscaled(grad: Tensor, grad_scale: float | Tensor) -> Tensor:
    """The gradient divided by the scale, in its own dtype. (By a Python number, CUDA would multiply by the inverse.)"""
    scale = torch.as_tensor(grad_scale, dtype=torch.float32, device=grad.device).reshape(())
    return grad / scale.to(grad.dtype)


def _add(a: Tensor, b: Tensor, alpha: float | Tensor, sign: int = 1, in_place: bool = False) -> Tensor:
    """``a + sign * alpha * b`` with one rounding; differentiable in ``alpha`` where that is asked for."""
    if isinstance(alpha, Tensor):
        if alpha.requires_grad:
            return (a.addcmul_ if in_place else a.addcmul)(b, alpha, value=sign)
        alpha = alpha.item()
    return (a.add_ if in_place else a.add)(b, alpha=sign * alpha)
