"""The update in plain PyTorch: the specification of every option, the oracle of the tests, and the fallback path.

One function per tensor, one operation per line, in the order of the kernel's rule (csrc/core/rule.h). In float32 and
float64 both give the same bits. bfloat16 and float16 are computed in float32 and rounded once, when they are stored.

What needs every gradient before the first parameter changes stands beside it: the global norm, the clip coefficient,
whether a gradient is finite, and the trust ratio. Those are float64.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

# --- Elements that have accumulated nothing ---------------------------------------------------------------------------

# A quiet NaN with a payload that no arithmetic makes from ordinary NaNs: the same value in every format. (Conversions
# by the CPU keep it, torch's to bfloat16 do not; so it is written and recognised as bits.)
_UNSET_BITS = {
    torch.float64: (torch.int64, 0x7FFDC00000000000),
    torch.float32: (torch.int32, 0x7FEE0000),
    torch.bfloat16: (torch.int16, 0x7FEE),
    torch.float16: (torch.int16, 0x7F70),
}


def unset(dtype: torch.dtype) -> Tensor:
    """The value of an element that has accumulated nothing yet: a NaN known by its bits.

    A momentum buffer with dampening, and a moving average, start filled with it. Their first applied step is then the
    first whatever came before: steps that were skipped on the device, replays of a CUDA graph, a checkpoint.

    Args:
        dtype: float64, float32, bfloat16 or float16, or complex64 or complex128 for a pair of them.

    Returns:
        A 0-dim tensor on the CPU. Only a copy within the dtype is sure to keep its bits.
    """
    return fill_unset(torch.empty((), dtype=dtype, device="cpu"))


def fill_unset(tensor: Tensor) -> Tensor:
    """Fills a tensor of any strides with :func:`unset`, in place, and returns it."""
    with torch.no_grad():
        real = _as_real(tensor)
        integer, bits = _UNSET_BITS[real.dtype]
        real.view(integer).fill_(bits)
    return tensor


def is_unset(tensor: Tensor) -> Tensor:
    """Which elements have accumulated nothing yet: a bool tensor of the same shape. Other NaNs are not meant.

    A complex element is unset if both of its parts are.
    """
    real = _as_real(tensor.detach()).resolve_neg()
    integer, bits = _UNSET_BITS[real.dtype]
    found: Tensor = real.view(integer) == bits
    return found.all(-1) if tensor.is_complex() else found


# --- The update -------------------------------------------------------------------------------------------------------


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
    clip_coefficient: float | Tensor | None = None,
    decoupled_weight_decay: bool = False,
    trust_ratio: float | Tensor | None = None,
    lr_in_momentum: bool = False,
    ema: Tensor | None = None,
    ema_decay: float | None = None,
) -> Tensor | None:
    r"""One step of SGD on one parameter, in place.

    With gradient :math:`g` (divided by ``grad_scale``, multiplied by ``clip_coefficient``, negated if ``maximize``),
    parameter :math:`p`, learning rate :math:`\gamma`, weight decay :math:`\lambda`, trust ratio :math:`\rho` (1 without
    one), momentum :math:`\mu`, dampening :math:`\tau` and momentum buffer :math:`b`:

    .. math::
        p &\leftarrow (1 - \gamma \lambda) p \text{ and } d = g \text{ if decoupled, else } d = g + \lambda p \\
        d &\leftarrow \rho d \text{, or } \gamma \rho d \text{ if the learning rate is in the momentum} \\
        b &\leftarrow d \text{ on the first step, else } \mu b + (1 - \tau) d \\
        d &\leftarrow d + \mu b \text{ if Nesterov, else } b \\
        p &\leftarrow p - \gamma d \text{, or } p - d \text{ if the learning rate is in the momentum}

    The formula is that of :class:`torch.optim.SGD`; its Nesterov form is from Sutskever et al., `On the importance of
    initialization and momentum in deep learning <http://www.cs.toronto.edu/%7Ehinton/absps/momentum.pdf>`_. Decoupled
    weight decay is SGDW of Loshchilov and Hutter, `Decoupled Weight Decay Regularization
    <https://arxiv.org/abs/1711.05101>`_, with the learning rate in the decay as in :class:`torch.optim.AdamW`. The
    trust ratio is that of You et al., `Large Batch Training of Convolutional Networks
    <https://arxiv.org/abs/1708.03888>`_, whose Algorithm 1 has the learning rate in the momentum; timm has it outside.

    Args:
        param: the parameter, of any shape, written in place.
        grad: its gradient, of the same shape, dense. It is not written.
        momentum_buffer: from the step before, written in place; ``None`` on the parameter's first step. Elements that
            are :func:`unset` are at their first step, too.
        lr: learning rate.
        momentum: momentum factor; 0 for none.
        dampening: part of the gradient kept out of the momentum, after the first step.
        weight_decay: L2 penalty, or the decoupled decay.
        nesterov: whether to use Nesterov momentum.
        maximize: whether to ascend instead of descend.
        grad_scale: what gradients are divided by first; a number or 1-element tensor, taken as a float32.
        clip_coefficient: what gradients are multiplied by next; see :func:`clip_coefficient`.
        decoupled_weight_decay: whether ``weight_decay`` shrinks the parameter, before the step, and not the gradient.
        trust_ratio: what the gradient with its L2 penalty is multiplied by; see :func:`trust_ratio`.
        lr_in_momentum: whether the momentum buffer accumulates what was multiplied by the learning rate.
        ema: an exponential moving average of the parameter, written in place: float32, or float64 for float64 (their
            complex peers for complex parameters). It follows the parameter as it is stored; elements that are
            :func:`unset` take its value.
        ema_decay: how much of the average is kept; needed with ``ema``.

    Returns:
        The momentum buffer to keep for the next step, in ``param``'s dtype and shape, or ``None`` without momentum.
    """
    dtype = accumulation_dtype(param.dtype)
    # Autograd keeps what it needs of the parameter as it was, and that is written below.
    p = param.to(dtype, copy=torch.is_grad_enabled())
    d = grad.to(dtype)
    if grad_scale is not None:
        d = unscaled(d, grad_scale)
    if clip_coefficient is not None:
        d = d * _cast(clip_coefficient, d)
    if maximize:
        d = -d
    if weight_decay != 0:
        if decoupled_weight_decay:
            p = p * _cast(1 - _double(lr) * _double(weight_decay), p)
        else:
            d = _add(d, p, weight_decay)
    if lr_in_momentum:
        d = d * _cast(_double(lr) * _double(1.0 if trust_ratio is None else trust_ratio), d)
        lr = 1.0
    elif trust_ratio is not None:
        d = d * _cast(trust_ratio, d)
    b = None
    if momentum != 0:
        b = d if momentum_buffer is None else _accumulated(momentum_buffer, d, momentum, dampening)
        d = _add(d, b, momentum) if nesterov else b
    if p is param:
        _add(param, d, lr, sign=-1, in_place=True)
    else:
        param.copy_(_add(p, d, lr, sign=-1))
    if ema is not None:
        assert ema_decay is not None, "an average needs a decay"
        average(ema, param, ema_decay)
    if b is None:
        return momentum_buffer
    if momentum_buffer is not None:
        return momentum_buffer.copy_(b)
    return torch.empty_like(param).copy_(b)


def unscaled(grad: Tensor, grad_scale: float | Tensor) -> Tensor:
    """The gradient divided by the scale, in its own dtype. (By a Python number, CUDA would multiply by the inverse.)"""
    scale = torch.as_tensor(grad_scale, dtype=torch.float32, device=grad.device).reshape(())
    return grad / scale.to(grad.dtype)


def _accumulated(momentum_buffer: Tensor, d: Tensor, momentum: float, dampening: float) -> Tensor:
    """The momentum buffer after this step, in ``d``'s dtype."""
    b = momentum_buffer.to(d.dtype) * momentum
    b = _add(b, d, 1 - dampening)
    return torch.where(is_unset(momentum_buffer), d, b)


def average(ema: Tensor, param: Tensor, decay: float) -> None:
    """Moves the average towards the parameter by :func:`torch.lerp`'s formula, in place.

    The formula is the one of :func:`torch.optim.swa_utils.get_ema_multi_avg_fn`, whose first step copies, too.
    """
    with torch.no_grad():
        e = _as_real(ema)
        p = _as_real(param.to(ema.dtype))
        weight = torch.tensor(1 - decay, dtype=e.dtype, device="cpu").item()
        away = p - e
        # Either way the rounding is relative to the end that is nearer to the result; weight - 1 is exact.
        moved = _add(e, away, weight) if weight < 0.5 else _add(p, away, weight - 1)
        e.copy_(torch.where(is_unset(e), p, moved))


# --- What needs every gradient first ----------------------------------------------------------------------------------


def global_norm(grads: Iterable[Tensor], grad_scale: float | Tensor | None = None) -> Tensor:
    """The L2 norm of all gradients, as if they were one vector, accumulated in float64.

    Args:
        grads: gradients, of any shapes, dtypes and devices. For the norm of one tensor, a list of it.
        grad_scale: what they are divided by first, as in :func:`sgd_update`.

    Returns:
        A 0-dim float64 tensor on the first gradient's device; 0 without gradients.
    """
    norms = []
    for grad in grads:
        g = _strided(grad)
        g = g.to(accumulation_dtype(g.dtype))
        if grad_scale is not None:
            g = unscaled(g, grad_scale)
        norms.append(_whole(torch.linalg.vector_norm(_as_real(g), dtype=torch.float64)))
    if not norms:
        return torch.zeros((), dtype=torch.float64, device="cpu")
    norm: Tensor = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))
    return norm


def clip_coefficient(norm: Tensor, max_norm: float) -> Tensor:
    """What gradients are multiplied by, so that their norm is at most ``max_norm``.

    The formula is that of :func:`torch.nn.utils.clip_grad_norm_`: ``min(1, max_norm / (norm + 1e-6))``; a norm that is
    NaN makes the coefficient NaN.
    """
    denominator = norm + 1e-6
    coefficient: Tensor = max_norm / denominator
    return torch.clamp(coefficient, max=1.0)


def any_nonfinite(grads: Iterable[Tensor]) -> Tensor:
    """Whether an element of a gradient, as it stands there, is infinite or NaN: a 0-dim bool tensor.

    Gradients are looked at before any scaling. That their norm overflows is no reason.
    """
    found = [_whole(torch.isfinite(_strided(grad)).all()).logical_not() for grad in grads]
    if not found:
        return torch.zeros((), dtype=torch.bool, device="cpu")
    return torch.stack([one.to(found[0].device) for one in found]).any()


def trust_ratio(
    param_norm: Tensor,
    grad_norm: Tensor,
    *,
    lr: float | Tensor,
    weight_decay: float | Tensor,
    trust_coeff: float = 0.001,
    eps: float = 1e-8,
    trust_clip: bool = False,
    always_adapt: bool = False,
) -> Tensor:
    r"""LARS's trust ratio of one parameter, by which its local learning rate differs from the global one.

    With trust coefficient :math:`\eta` and weight decay :math:`\lambda`, :math:`\eta \|p\| / (\|g\| + \lambda \|p\| +
    \epsilon)`, and 1 where a norm is 0 (or NaN): You et al., `Large Batch Training of Convolutional Networks
    <https://arxiv.org/abs/1708.03888>`_, as in timm's ``Lars``.

    Args:
        param_norm: the parameter's L2 norm, float64.
        grad_norm: its gradient's L2 norm after unscaling and clipping, float64.
        lr: learning rate; for ``trust_clip``.
        weight_decay: L2 penalty. Without one, and without ``always_adapt``, the ratio is 1.
        trust_coeff: trust coefficient.
        eps: added to the denominator.
        trust_clip: whether the ratio is divided by the learning rate and held at 1 (LARC), so that the local learning
            rate never exceeds the global one.
        always_adapt: whether parameters without weight decay adapt, too.

    Returns:
        A float64 tensor of the norms' shape.
    """
    one = torch.ones_like(grad_norm)
    if weight_decay == 0 and not always_adapt:
        return one
    numerator = trust_coeff * param_norm
    decay_norm = param_norm * _double(weight_decay)
    denominator = grad_norm + decay_norm
    denominator = denominator + eps
    ratio = numerator / denominator
    ratio = torch.where(grad_norm > 0, ratio, one)
    ratio = torch.where(param_norm > 0, ratio, one)
    if trust_clip:
        ratio = ratio / _double(lr)
        ratio = torch.clamp(ratio, max=1.0)
    return ratio


# --- Scalars and views ------------------------------------------------------------------------------------------------


def _add(a: Tensor, b: Tensor, alpha: float | Tensor, sign: int = 1, in_place: bool = False) -> Tensor:
    """``a + sign * alpha * b`` with one rounding; differentiable in ``alpha`` where that is asked for."""
    if isinstance(alpha, Tensor):
        if alpha.requires_grad:
            return (a.addcmul_ if in_place else a.addcmul)(b, alpha, value=sign)
        alpha = alpha.item()
    return (a.add_ if in_place else a.add)(b, alpha=sign * alpha)


def _double(value: float | Tensor) -> float | Tensor:
    """A hyperparameter in float64, whatever holds it."""
    return value.to(torch.float64).reshape(()) if isinstance(value, Tensor) else value


def _cast(value: float | Tensor, like: Tensor) -> Tensor:
    """A hyperparameter, cast once to the dtype of what it is multiplied with."""
    return torch.as_tensor(value, dtype=like.dtype, device=like.device).reshape(())


def _as_real(tensor: Tensor) -> Tensor:
    """A complex tensor as pairs of reals; others as they are."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _strided(grad: Tensor) -> Tensor:
    """A sparse gradient made dense; others as they are."""
    return grad if grad.layout == torch.strided else grad.to_dense()


def _whole(reduced: Tensor) -> Tensor:
    """The result of a reduction over all ranks, where the tensor that was reduced is a DTensor."""
    if type(reduced).__name__ != "DTensor":
        return reduced
    full: Tensor = reduced.full_tensor()  # type: ignore[attr-defined]
    return full
