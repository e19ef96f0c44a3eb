"""The steps that no kernel takes: by the reference, or by torch's own functions."""

from __future__ import annotations

from typing import Any

import torch
from fused_sgd._dtensor import local, placed_like
from fused_sgd._judge import gradient, name_of, state_tensor, state_tensors
from fused_sgd._new_state import new_state
from fused_sgd._norms import TrustRatio
from fused_sgd._precision import (
    Group,
    Storage,
    from_blocks,
    narrowed,
    refresh_masters,
    round_stochastically,
    storage,
    to_blocks,
)
from fused_sgd._storage import split_join, split_round
from fused_sgd.reference import (
    accumulation_dtype,
    average,
    clip_coefficient,
    global_norm,
    is_unset,
    sgd_update,
    trust_ratio,
    unscaled,
)
from torch import Tensor
from torch.optim.sgd import sgd as torch_sgd


def _hyperparameters(options: Group) -> dict[str, Any]:
    """Those of torch's function. Of what is no number but has one (a Fraction, say) that, as the kernel takes it."""
    found = {key: options[key] for key in ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")}
    for key in ("lr", "weight_decay"):
        if not isinstance(found[key], (int, float, Tensor)):
            found[key] = float(found[key])
    for key in ("momentum", "dampening"):
        if not isinstance(found[key], (int, float)):
            found[key] = float(found[key])
    return found


def step_elsewhere(
    groups: list[Group],
    state: dict[Tensor, Any],
    entries: list[tuple[int, int]],
    grad_scale: float | Tensor | None,
    totals: Tensor | None,
) -> list[TrustRatio]:
    """Steps parameters, all of them judged.

    Args:
        groups: the optimizer's param groups.
        state: the optimizer's state.
        entries: the parameters, as (group, index).
        grad_scale: what gradients are divided by.
        totals: the sum of squares of all gradients of the step, where it is needed: float64, of shape (2,).

    Returns:
        What each parameter with a trust ratio got.
    """
    ratios = []
    for number, options in enumerate(groups):
        indices = [index for group, index in entries if group == number]
        clip = None
        if options["max_grad_norm"] is not None:
            assert totals is not None
            clip = clip_coefficient(totals[0].sqrt(), options["max_grad_norm"])
        with torch.set_grad_enabled(bool(options["differentiable"])):
            if options["foreach"]:
                _by_torch(options, [options["params"][index] for index in indices], state, grad_scale, clip)
                continue
            for index in indices:
                param = options["params"][index]
                if _is_sparse(param):
                    _by_torch(options, [param], state, grad_scale, clip)
                else:
                    _add_new_state(groups, number, param, state)
                    ratio = _by_reference(options, param, state, grad_scale, clip)
                    if ratio is not None and local(param).numel():  # the kernel has no row for an empty one
                        param_norm, grad_norm, factor = (found.detach() for found in ratio)
                        name = name_of(options, index)
                        ratios.append(TrustRatio(number, index, param_norm, grad_norm, factor, name))
    return ratios


def _add_new_state(groups: list[Group], number: int, param: Tensor, state: dict[Tensor, Any]) -> None:
    """Puts there what the step needs and is not there yet.

    But no momentum buffer like the parameter: sgd_update() makes it, through which autograd may have to run.
    """
    options = groups[number]
    kept = storage(options, param)
    for key, tensor in state_tensors(options, param, state).items():
        plain = key == "momentum_buffer" and not kept.beside and kept.momentum_dtype == param.dtype
        if tensor is None and not plain:
            state[param][key] = new_state(key, param, groups, number)


def _is_sparse(param: Tensor) -> bool:
    return gradient(param).layout != torch.strided or param.layout != torch.strided


def _by_reference(
    options: Group, param: Tensor, state: dict[Tensor, Any], scale: float | Tensor | None, clip: Tensor | None
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Returns the norms of a parameter with a trust ratio, and that."""
    grad = gradient(param)
    kept = storage(options, param)
    inner = state.get(param, {})
    weights = _weights(param, inner, kept)
    buffer = _momentum(param, inner, kept)
    ratio = _trust_ratio(options, weights, grad, scale, clip)
    new_buffer = sgd_update(
        weights,
        grad,
        buffer,
        grad_scale=scale,
        clip_coefficient=None if clip is None else clip.to(param.device),
        decoupled_weight_decay=options["decoupled_weight_decay"],
        trust_ratio=None if ratio is None else ratio[2],
        lr_in_momentum=ratio is not None and options["lr_in_momentum"],
        **_hyperparameters(options),
    )
    _store_weights(param, weights, inner, kept)
    if options["ema_decay"] is not None:
        average(inner["ema"], weights if kept.has_master else param, options["ema_decay"])
    if options["momentum"] != 0:
        _store_momentum(param, new_buffer, state[param], kept)
    return ratio


def _weights(param: Tensor, inner: dict[str, Any], kept: Storage) -> Tensor:
    """What the update is computed on: the parameter itself, or a wider form of it."""
    if not kept.beside:
        return param
    if kept.beside == "master":
        refresh_masters([(param, inner["master"])])
        master: Tensor = inner["master"]
        return master
    p = local(param)
    wide = split_join(p, local(inner["remainder"])) if kept.beside == "remainder" else p.to(torch.float32)
    return placed_like(param, wide)


def _store_weights(param: Tensor, weights: Tensor, inner: dict[str, Any], kept: Storage) -> None:
    if not kept.beside:
        return
    p, w = local(param), local(weights)
    if kept.beside == "master":
        p.copy_(narrowed(w, p.dtype))
    elif kept.beside == "remainder":
        high, low = split_round(w)
        p.copy_(high)
        local(inner["remainder"]).copy_(low)
    else:
        p.copy_(round_stochastically(w, p, inner["rounding"]))
        if p.numel():  # the kernel has no row for an empty one
            inner["rounding"][2] += 1


def _momentum(param: Tensor, inner: dict[str, Any], kept: Storage) -> Tensor | None:
    if kept.momentum_dtype != torch.int8:
        buffer: Tensor | None = inner.get("momentum_buffer")
        return buffer
    return from_blocks(param, inner["momentum_codes"], inner["momentum_scale"]) if "momentum_codes" in inner else None


def _store_momentum(param: Tensor, buffer: Tensor | None, inner: dict[str, Any], kept: Storage) -> None:
    if kept.momentum_dtype != torch.int8:
        inner["momentum_buffer"] = buffer
        return
    assert buffer is not None
    for key, part in zip(("momentum_codes", "momentum_scale"), to_blocks(param, buffer), strict=True):
        local(inner[key]).copy_(local(part))


def _trust_ratio(
    options: Group, param: Tensor, grad: Tensor, scale: float | Tensor | None, clip: Tensor | None
) -> tuple[Tensor, Tensor, Tensor] | None:
    if "trust_coeff" not in options:
        return None
    g = grad.detach().to(accumulation_dtype(param.dtype))
    param_norm, grad_norm = global_norm([param.detach()]), global_norm([g], scale)
    if clip is not None:
        grad_norm = grad_norm * clip.to(grad_norm.device)
    ratio = trust_ratio(
        param_norm,
        grad_norm,
        lr=options["lr"],
        weight_decay=options["weight_decay"],
        trust_coeff=options["trust_coeff"],
        eps=options["eps"],
        trust_clip=options["trust_clip"],
        always_adapt=options["always_adapt"],
    )
    return param_norm, grad_norm, ratio


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
        if buffer is None or buffer.layout != torch.strided:  # a sparse one is torch's, which never leaves it unset
            continue
        if options["dampening"] != 0 and bool(is_unset(buffer).all()):
            buffers[index] = None  # nothing was accumulated, which torch knows by another sign
    torch_sgd(
        params,
        grads,
        buffers,
        has_sparse_grad=any(grad.is_sparse for grad in grads),
        foreach=bool(options["foreach"]),
        fused=False,
        **_hyperparameters(options),
    )
    if options["momentum"] != 0:
        for param, buffer in zip(params, buffers, strict=True):
            state[param]["momentum_buffer"] = buffer
