"""Judges parameters: is the input sound, and which path may take it?

Slow and readable. The plan (csrc/torch/plan.h) keeps a judgement for as long as the tensors it was made of keep their
fingerprints, so this runs on a parameter's first step and when something about it changes.
"""

from __future__ import annotations

import reprlib
from typing import Any, NamedTuple

import torch
from fused_sgd._dtensor import dtensor, local
from fused_sgd._hyperparameters import check_foreach, too_large
from fused_sgd._native import C, why_missing
from fused_sgd._precision import STATE_DTYPES, Group, format_name, scale_shape, storage, unsound_options
from torch import Tensor


class Judgement(NamedTuple):
    path: str  # "kernel", "foreach" or "reference"
    reason: str  # why it is not the kernel, or how the kernel takes it; may be empty
    combination: int = -1  # the kernel's number for the storage formats
    keys: tuple[tuple[str, int, bool], ...] = ()  # of the state: column in the kernel's table, whether elementwise
    is_copy: bool = False  # whether the parameter is a copy of its master


def too_large_message(groups: list[Group], group: int, index: int, key: str) -> str:
    """The error for a hyperparameter that does not fit the dtype a parameter is computed in; torch's words."""
    where, value = place(groups, group, index), groups[group][key]
    return f"{where}: {key} ({value}) cannot be converted to type float without overflow"


def describe(tensor: Tensor) -> str:
    """What one needs to know of a tensor to find the mistake: dtype, shape, strides, device."""
    layout = f"strides {tuple(tensor.stride())}" if tensor.layout == torch.strided else str(tensor.layout)
    return f"{tensor.dtype}, shape {tuple(tensor.shape)}, {layout}, {tensor.device}"


def name_of(options: Group, index: int) -> str | None:
    """A parameter's name, if the optimizer was given named parameters."""
    names = options.get("param_names")
    return names[index] if names is not None and index < len(names) else None


def place(groups: list[Group], group: int, index: int) -> str:
    """A parameter by its place in the optimizer, with its name if it has one and what it is."""
    name = name_of(groups[group], index)
    shown = "" if name is None else f" {name!r}"
    return f"param group {group}, parameter {index}{shown} ({describe(groups[group]['params'][index])})"


def state_tensor(state: dict[Tensor, Any], param: Tensor, key: str) -> Tensor | None:
    """A tensor of the parameter's state, without creating an entry for it."""
    inner = state.get(param)
    if inner is None:
        return None
    if not isinstance(inner, dict):
        raise TypeError(f"the state of a parameter ({describe(param)}) must be a dict, and is {inner!r}")
    return inner.get(key)


def average_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a parameter's moving average."""
    if dtype.is_complex:
        return torch.complex128 if dtype == torch.complex128 else torch.complex64
    return torch.float64 if dtype == torch.float64 else torch.float32


def state_tensors(options: Group, param: Tensor, state: dict[Tensor, Any]) -> dict[str, Tensor | None]:
    """What a step with these options keeps of a parameter: by key, None where it is not there yet."""
    kept = storage(options, param)
    keys = [kept.beside] if kept.beside else []
    if options["momentum"] != 0:
        keys += kept.momentum_keys
    if options["ema_decay"] is not None:
        keys.append("ema")
    return {key: state_tensor(state, param, key) for key in keys}


def gradient(param: Tensor) -> Tensor:
    """The gradient of a parameter that has one."""
    assert param.grad is not None
    return param.grad


def judge(groups: list[Group], group: int, index: int, state: dict[Tensor, Any]) -> Judgement:
    """Checks one parameter that has a gradient, and chooses its path.

    Raises:
        RuntimeError: the parameter, its gradient or its momentum buffer is nothing any path could take, or
            ``fused=True`` asks for a kernel that cannot take it. The message names the parameter.
        TypeError: its state is no dict.
    """
    options = groups[group]
    param: Tensor = options["params"][index]
    grad = gradient(param)
    check_foreach(options, f" (param group {group})")
    kept = state_tensors(options, param, state)
    if problem := _unsound(options, param, grad, kept) or _left_over(options, param, grad, kept, state):
        raise RuntimeError(f"{place(groups, group, index)}: {problem}")
    judgement = choose(options, param, grad, kept)
    in_float32 = param.dtype not in (torch.float64, torch.complex128)
    if judgement.path != "kernel" and in_float32 and (key := too_large(options)):  # the plan looks for others
        raise RuntimeError(too_large_message(groups, group, index, key))
    if options["fused"] and judgement.path != "kernel":
        raise RuntimeError(
            f"{place(groups, group, index)}: `fused=True` cannot be honoured: {judgement.reason}."
            " Use fused=None to let such parameters take the reference path."
        )
    return judgement


def refusal(options: Group, param: Tensor, grad: Tensor | None) -> str:
    """Why no path takes a parameter, whatever its state, or an empty string; ``grad`` is None for a forecast."""
    return unsound_options(options, param, grad) if grad is None else _unsound(options, param, grad, {})


def choose(options: Group, param: Tensor, grad: Tensor | None, kept: dict[str, Tensor | None]) -> Judgement:
    """The path of one sound parameter; ``grad`` is None for a forecast."""
    if options["foreach"]:
        return Judgement("foreach", "foreach=True")
    if options["fused"] is not None and not options["fused"]:
        return Judgement("reference", "fused=False")
    if options["differentiable"]:
        return Judgement("reference", "differentiable=True")
    if C is None:
        return Judgement("reference", f"there is no compiled module: {why_missing}")
    for key in ("lr", "weight_decay"):
        if isinstance(options[key], Tensor) and options[key].requires_grad:
            return Judgement("reference", f"{key} requires a gradient")
    tensors: dict[str, Tensor | None] = {"parameter": param, "gradient": grad, **kept}
    obstacle = _kernel_obstacle(tensors)
    if obstacle:
        return Judgement("reference", obstacle)
    wanted = storage(options if options["momentum"] != 0 else {**options, "momentum_dtype": None}, param)
    buffer = kept.get("momentum_buffer")
    gradient_format = format_name(param.dtype if grad is None else grad.dtype)
    momentum_format = format_name(wanted.momentum_dtype if buffer is None else buffer.dtype)
    formats = (wanted.parameter, gradient_format, momentum_format)
    is_complex = {tensor.is_complex() for tensor in (param, grad, buffer) if tensor is not None}
    combination = C.combination(*formats) if len(is_complex) == 1 else -1
    if combination < 0:
        return Judgement("reference", "there is no kernel for parameter {}, gradient {}, momentum {}".format(*formats))
    momentum_column, ema_column = C.state_columns(combination)
    columns = {"momentum_buffer": momentum_column, "momentum_codes": momentum_column, "ema": ema_column}
    columns |= {"momentum_scale": momentum_column + 1, "master": 1, "remainder": 1, "rounding": 1}
    keys = tuple((key, columns[key], key in _ELEMENTWISE) for key in kept)
    reason = "; ".join(filter(None, (_through_copies(tensors), wanted.note)))
    return Judgement("kernel", reason, combination, keys, wanted.beside == "master")


# What has an element for each of the parameter's.
_ELEMENTWISE = ("parameter", "gradient", "momentum_buffer", "momentum_codes", "master", "remainder", "ema")


def _unsound(options: Group, param: Tensor, grad: Tensor, kept: dict[str, Tensor | None]) -> str:
    """What is wrong with the input, or an empty string."""
    if param.is_quantized or not (param.is_floating_point() or param.is_complex()):
        return "only floating-point and complex parameters can be optimized"
    if not (grad.is_floating_point() or grad.is_complex()):
        return f"its gradient is not floating-point ({describe(grad)})"
    if grad.shape != param.shape:
        return f"its gradient has another shape ({describe(grad)})"
    if grad.device != param.device:
        return f"its gradient is on another device ({describe(grad)})"
    if grad.is_complex() and not param.is_complex():
        return f"its gradient is complex and it is real ({describe(grad)})"
    if options["differentiable"] and param.requires_grad and param.is_leaf:
        return "differentiable=True cannot write a leaf that requires a gradient; give the optimizer a clone of it"
    if {grad.layout, param.layout} - {torch.strided, torch.sparse_coo, torch.sparse_csr}:
        return f"there is no arithmetic for its layout, or its gradient's ({param.layout}, {grad.layout})"
    if grad.is_sparse and options["weight_decay"] != 0:
        return "weight_decay does not support sparse gradients, in torch.optim.SGD neither"
    if grad.layout != torch.strided and (options["ema_decay"] is not None or "trust_coeff" in options):
        return "neither ema_decay nor a trust ratio supports sparse gradients"
    if param.itemsize == 1:
        return f"there is no arithmetic in {param.dtype}"
    if problem := unsound_options(options, param, grad):
        return problem
    for role, tensor in (("it", param), *((f"its {key}", tensor) for key, tensor in kept.items())):
        if isinstance(tensor, Tensor) and tensor.is_inference() and not torch.is_inference_mode_enabled():
            return f"{role} is an inference tensor, which cannot be updated outside torch.inference_mode()"
    if _shares_elements(param):
        return "elements of it share memory (an expanded tensor?); give the optimizer a tensor of its own, by clone()"
    for key, tensor in kept.items():
        if tensor is not None and (problem := unsound_state(key, tensor, param, grad)):
            return problem
    for key, other in (("momentum_codes", "momentum_scale"), ("momentum_scale", "momentum_codes")):
        if kept.get(key) is not None and kept.get(other) is None:
            return f"its {other} is missing in the state, where its {key} is; delete that to begin anew"
    return ""


def _left_over(
    options: Group, param: Tensor, grad: Tensor, kept: dict[str, Tensor | None], state: dict[Tensor, Any]
) -> str:
    """What is wrong with a momentum in another format than the step's, which could not be converted; or nothing."""
    if options["momentum"] == 0:
        return ""
    for key in ("momentum_buffer", "momentum_codes", "momentum_scale"):
        tensor = state_tensor(state, param, key)
        if key not in kept and tensor is not None:
            problem = unsound_state(key, tensor, param, grad)
            return problem or f"its {key} cannot be converted to the momentum_dtype of its group ({describe(tensor)})"
    return ""


def unsound_state(key: str, tensor: Tensor, param: Tensor, grad: Tensor) -> str:
    """What is wrong with a tensor of a parameter's state, or an empty string."""
    if not isinstance(tensor, Tensor):
        return f"its {key} is {reprlib.repr(tensor)}, no tensor"
    shape = {"momentum_scale": lambda: scale_shape(param), "rounding": lambda: torch.Size((4,))}
    if tensor.shape != (shape[key]() if key in shape else param.shape):
        return f"its {key} has another shape ({describe(tensor)}); was it loaded from another model, or resized?"
    if tensor.device != param.device:
        return f"its {key} is on another device ({describe(tensor)})"
    if key == "momentum_buffer":
        is_number = (tensor.is_floating_point() or tensor.is_complex()) and format_name(tensor.dtype) != ""
        if not is_number or tensor.is_complex() != param.is_complex():
            return f"its {key} has a dtype that cannot hold it ({describe(tensor)})"
    elif tensor.dtype != (dtype := STATE_DTYPES.get(key, average_dtype(param.dtype))):
        return f"its {key} must be {dtype} ({describe(tensor)}); convert it in the state, or delete it to begin anew"
    if key not in _ELEMENTWISE and not local(tensor).is_contiguous():
        return f"its {key} is not contiguous ({describe(tensor)})"
    if tensor.is_sparse and not grad.is_sparse:
        return f"its {key} is sparse and its gradient is not; make it dense ({describe(tensor)})"
    if _shares_elements(tensor):
        return f"elements of its {key} share memory ({describe(tensor)})"
    return ""


def _shares_elements(tensor: Tensor) -> bool:
    return C is not None and C.is_plain(local(tensor)) and C.overlaps_itself(local(tensor))


def _kernel_obstacle(tensors: dict[str, Tensor | None]) -> str:
    """Why the kernel cannot take a parameter, or an empty string."""
    assert C is not None
    param = tensors["parameter"]
    assert param is not None
    for role, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.layout != torch.strided:
            return f"the {role} is sparse ({tensor.layout})"
        if tensor.device.type not in ("cpu", "cuda"):
            return f"there is no kernel for device type {tensor.device.type}"
        if tensor.device.type == "cuda" and (gpu := str(C.cuda_obstacle(tensor.device.index))):
            return gpu
        if role != "gradient" and type(tensor) not in (Tensor, torch.nn.Parameter) and dtensor(tensor) is None:
            return f"the {role} is a {type(tensor).__name__}, a subclass of Tensor"
        if tensor.is_inference():
            return f"the {role} is an inference tensor"
        if not C.is_plain(local(tensor)):
            return f"the {role} is no ordinary tensor ({type(tensor).__name__}, {tensor.dtype})"
    sharded = dtensor(param)
    for role, tensor in tensors.items():
        if tensor is None or role in ("parameter", "rounding"):
            continue
        other = dtensor(tensor)
        if (sharded is None) != (other is None):
            return f"of the parameter and its {role}, only one is a DTensor"
        if other is not None and (other.device_mesh, other.placements) != (sharded.device_mesh, sharded.placements):
            return f"the {role} is placed as {other.placements}, the parameter as {sharded.placements}"
    return ""


def _through_copies(tensors: dict[str, Tensor | None]) -> str:
    """Which tensors the kernel reaches through a copy, for explain()."""
    assert C is not None
    param = tensors["parameter"]
    assert param is not None
    there = [(role, tensor) for role, tensor in tensors.items() if tensor is not None and role in _ELEMENTWISE]
    staged = [role for role, tensor in there if C.is_staged(local(param), local(tensor))]
    return f"{' and '.join(staged)} in other strides, through a copy" if staged else ""
