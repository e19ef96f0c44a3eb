"""The steps that no kernel takes: by the reference, or by torch's own functions."""

from __future__ import annotations

from typing import Any

import torch
from fused_sgd._judge import Group, gradient, state_tensor
from fused_sgd._new_state import new_average
from fused_sgd.reference import clip_coefficient, global_norm, is_unset, sgd_update, trust_ratio, unscaled
from torch import Tensor
from torch.optim.sgd import sgd as torch_sgd

_HYPERPARAMETERS = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")


def step_elsewhere(
    groups: list[Group],
    state: dict[Tensor, Any],
    entries: list[tuple[int, int]],
    grad_scale: float | Tensor | None,
    totals: Tensor | None,
) -> None:
    """Steps parameters, all of them judged.

    Args:
        groups: the optimizer's param groups.
        state: the optimizer's state.
        entries: the parameters, as (group, index).
        grad_scale: what gradients are divided by.
        totals: the sum of squares of all gradients of the step, where it is needed: float64, of shape (2,).
    """
    for number, options in enumerate(groups):
        params = [options["params"][index] for group, index in entries if group == number]
        clip = None
        if options["max_grad_norm"] is not None:
            assert totals is not None
            clip = clip_coefficient(totals[0].sqrt(), options["max_grad_norm"])
        with torch.set_grad_enabled(bool(options["differentiable"])):
            step = _by_torch if options["foreach"] else _by_reference
            step(options, params, state, grad_scale, clip)


def _by_reference(
    options: Group, params: list[Tensor], state: dict[Tensor, Any], scale: float | Tensor | None, clip: Tensor | None
) -> None:
    for param in params:
        grad = gradient(param)
        if grad.layout != torch.strided or param.layout != torch.strided:
            _by_torch(options, [param], state, scale, clip)
            continue
        average = None
        if options["ema_decay"] is not None:
            average = state_tensor(state, param, "ema")
            if average is None:
                average = state[param]["ema"] = new_average(param)
        buffer = sgd_update(
            param,
            grad,
            state_tensor(state, param, "momentum_buffer"),
            grad_scale=scale,
            clip_coefficient=None if clip is None else clip.to(param.device),
            decoupled_weight_decay=options["decoupled_weight_decay"],
            trust_ratio=_trust_ratio(options, param, grad, scale, clip),
            lr_in_momentum=options.get("lr_in_momentum", False),
            ema=average,
            ema_decay=options["ema_decay"],
            **{key: options[key] for key in _HYPERPARAMETERS},
        )
        if options["momentum"] != 0:
            state[param]["momentum_buffer"] = buffer


def _trust_ratio(
    options: Group, param: Tensor, grad: Tensor, scale: float | Tensor | None, clip: Tensor | None
) -> Tensor | None:
    if "trust_coeff" not in options:
        return None
    norm = global_norm([grad.detach()], scale)
    return trust_ratio(
        global_norm([param.detach()]),
        norm if clip is None else norm * clip.to(norm.device),
        lr=options["lr"],
        weight_decay=options["weight_decay"],
        trust_coeff=options["trust_coeff"],
        eps=options["eps"],
        trust_clip=options["trust_clip"],
        always_adapt=options["always_adapt"],
    )


def _by_torch(
    options: Group, params: list[Tensor], state: dict[Tensor, Any], scale: float | Tensor | None, clip: Tensor | None
) -> None:
    """Torch's own functions: foreach where the group asks for it, else the loop, for sparse tensors."""
    if not params:
        return
    grads = [gradient(param) for param in params]
    if scale is not None:
        grads = [unscaled(grad, scale) for grad in grads]
    if clip is not None:
        grads = [grad * clip.to(grad.device, grad.dtype) for grad in grads]
    buffers = [state_tensor(state, param, "momentum_buffer") for param in params]
    for index, buffer in enumerate(buffers):
        if options["dampening"] != 0 and buffer is not None and bool(is_unset(buffer).all()):
            buffers[index] = None  # nothing was accumulated, which torch knows by another sign
    torch_sgd(
        params,
        grads,
        buffers,
        has_sparse_grad=any(grad.is_sparse for grad in grads),
        foreach=bool(options["foreach"]),
        fused=False,
        **{key: options[key] for key in _HYPERPARAMETERS},
    )
    if options["momentum"] != 0:
        for param, buffer in zip(params, buffers, strict=True):
            state[param]["momentum_buffer"] = buffer
