"""Checks of hyperparameters and options: torch.optim.SGD's errors in its words, and those it lacks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from fused_sgd._native import C, why_missing
from fused_sgd._precision import MASTER_WEIGHTS, MOMENTUM_DTYPES
from torch import Tensor

_LARGEST = torch.finfo(torch.float32).max
_SMALLEST = 2.0**-149  # in float32, subnormal


def check_defaults(defaults: dict[str, Any]) -> None:
    """The errors of torch.optim.SGD's constructor, in its words; and NaN, which torch lets through."""
    check_numbers(defaults)
    for key, name in (("lr", "learning rate"), ("momentum", "momentum value"), ("weight_decay", "weight_decay value")):
        if defaults[key] < 0.0:
            raise ValueError(f"Invalid {name}: {defaults[key]}")
    if defaults["decoupled_weight_decay"] and "trust_coeff" in defaults:
        raise ValueError("`decoupled_weight_decay` and a trust ratio exclude each other")
    if defaults["nesterov"] and (defaults["momentum"] <= 0 or defaults["dampening"] != 0):
        raise ValueError("Nesterov momentum requires a momentum and zero dampening")
    check_path(defaults)


def check_numbers(options: dict[str, Any], where: str = "") -> None:
    """Raises ValueError for NaN, and for tensors of more than one element."""
    for key in ("lr", "weight_decay"):
        if isinstance(options[key], Tensor) and options[key].numel() != 1:
            raise ValueError(f"Tensor {key} must be 1-element{where}")
    names = {"lr": "learning rate", "momentum": "momentum value", "dampening": "dampening value"}
    for key in ("lr", "momentum", "dampening", "weight_decay"):
        value = options[key]
        try:
            if isinstance(value, Tensor) and value.is_complex():
                raise TypeError
            is_nan = math.isnan(value.detach() if isinstance(value, Tensor) else value)
        except OverflowError as error:
            raise ValueError(f"Invalid {names.get(key, f'{key} value')}: it does not fit a float{where}") from error
        except (RuntimeError, TypeError, ValueError) as error:
            raise TypeError(f"{key} must be a number, and is {value!r}{where}") from error
        if is_nan:
            raise ValueError(f"Invalid {names.get(key, f'{key} value')}: {value}{where}")
    _check_range(options, "max_grad_norm", "positive", lambda norm: norm > 0, where)
    _check_range(options, "ema_decay", "in [0, 1)", lambda decay: 0 <= decay < 1, where)
    if "trust_coeff" in options:
        for key in ("trust_coeff", "eps"):
            _check_range(options, key, "0 or more", lambda value: value >= 0, where, False)
    if options.get("decoupled_weight_decay") and "trust_coeff" in options:
        raise ValueError(f"`decoupled_weight_decay` and a trust ratio exclude each other{where}")


def _check_range(
    options: dict[str, Any],
    key: str,
    range_text: str,
    is_good: Callable[[float], bool],
    where: str,
    may_be_none: bool = True,
) -> None:
    value: Any = options.get(key)
    if value is None and may_be_none:
        return
    try:
        if isinstance(value, (str, bytes)):  # which float() takes
            raise TypeError
        good = is_good(float(value))
    except OverflowError as error:
        raise ValueError(f"Invalid {key}: it does not fit a float{where}") from error
    except (RuntimeError, TypeError, ValueError) as error:
        raise TypeError(f"{key} must be a number, and is {value!r}{where}") from error
    if not good:
        raise ValueError(f"Invalid {key}: {value}; it must be {range_text}{where}")


def too_large(options: dict[str, Any]) -> str:
    """The first hyperparameter that is finite and beyond float32's range, or an empty string."""
    for key in ("lr", "momentum", "dampening", "weight_decay"):
        value = options[key]
        if not isinstance(value, Tensor) and _LARGEST < abs(value) < math.inf:
            return key
    return ""


def check_same(groups: list[dict[str, Any]]) -> None:
    """Raises ValueError where an option of the whole optimizer differs between param groups."""
    for key in ("max_grad_norm", "skip_nonfinite"):
        for number, group in enumerate(groups):
            if group[key] != groups[0][key]:
                raise ValueError(
                    f"{key} holds for the whole optimizer, and is {groups[0][key]} in param group 0 and {group[key]} in"
                    f" param group {number}"
                )


def check_grad_scale(grad_scale: Any) -> float | None:
    """What gradients are divided by; raises for anything that would ruin the parameters."""
    if grad_scale is None:
        return None
    try:
        if isinstance(grad_scale, (str, bytes)):  # which float() takes
            raise TypeError
        number = float(grad_scale)
    except OverflowError as error:
        raise ValueError("Invalid grad_scale: it does not fit a float") from error
    except (RuntimeError, TypeError, ValueError) as error:
        raise TypeError(f"grad_scale must be a number or a 1-element tensor, and is {grad_scale!r}") from error
    if not _SMALLEST <= number <= _LARGEST:
        raise ValueError(f"Invalid grad_scale: {number}; it must be a positive float32, and finite")
    return number


def check_one_element(name: str, value: Any) -> None:
    """Raises TypeError for a tensor of another number of elements; its value stays where it is."""
    if isinstance(value, Tensor) and value.numel() != 1:
        raise TypeError(f"{name} must be a number or a 1-element tensor, and is of shape {tuple(value.shape)}")


def check_storage(options: dict[str, Any], where: str = "") -> None:
    """Raises ValueError for storage formats that do not exist, RuntimeError for options that exclude each other."""
    momentum, masters = options["momentum_dtype"], options["master_weights"]
    if momentum is not None and momentum not in MOMENTUM_DTYPES:
        raise ValueError(f"Invalid momentum_dtype: {momentum!r}; it must be None or of {MOMENTUM_DTYPES}{where}")
    if masters is not None and masters not in MASTER_WEIGHTS:
        raise ValueError(f"Invalid master_weights: {masters!r}; it must be None or of {MASTER_WEIGHTS}{where}")
    if not isinstance(options["stochastic_rounding"], bool):
        raise ValueError(f"Invalid stochastic_rounding: {options['stochastic_rounding']!r}; it must be a bool{where}")
    if masters is not None and options["stochastic_rounding"]:
        raise RuntimeError(
            "`master_weights` and `stochastic_rounding` exclude each other: with master weights nothing is rounded"
            f" away{where}"
        )
    for key in ("momentum_dtype", "master_weights", "stochastic_rounding"):
        if options["differentiable"] and options[key] not in (None, False):
            raise RuntimeError(f"`differentiable` does not support `{key}`{where}")


def check_path(options: dict[str, Any]) -> None:
    """Raises RuntimeError for path options that exclude each other or cannot be honoured."""
    check_foreach(options)
    check_storage(options)
    if not options["fused"]:
        return
    if options["differentiable"]:
        raise RuntimeError("`fused` does not support `differentiable`")
    if options["foreach"]:
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
    if C is None:
        raise RuntimeError(f"`fused=True` needs the compiled module, and {why_missing}")


def check_foreach(options: dict[str, Any], where: str = "") -> None:
    """Raises RuntimeError for options that torch's foreach implementation does not have."""
    if not options["foreach"]:
        return
    for key in (
        "decoupled_weight_decay",
        "ema_decay",
        "trust_coeff",
        "momentum_dtype",
        "master_weights",
        "stochastic_rounding",
    ):
        value = options.get(key)
        if value is not None and value is not False:
            raise RuntimeError(f"`foreach=True` is torch's own implementation, which has no `{key}`{where}")


def check_duplicates(params: list[Any], group: int) -> None:
    """Raises ValueError for a tensor given twice in one group."""
    first: dict[int, int] = {}
    for index, param in enumerate(params):
        earlier = first.setdefault(id(param), index)
        if isinstance(param, Tensor) and earlier != index:
            raise ValueError(f"parameter {index} of param group {group} is the same tensor as parameter {earlier}")
