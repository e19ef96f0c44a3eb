"""Judges parameters: is the input sound, and which path may take it?

Slow and readable. The plan (csrc/torch/plan.h) keeps a judgement for as long as the tensors it was made of keep their
fingerprints, so this runs on a parameter's first step and when something about it changes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from fused_sgd._native import C, why_missing
from torch import Tensor

Group = dict[str, Any]


class Judgement(NamedTuple):
    path: str  # "kernel", "foreach" or "reference"
    reason: str  # why it is not the kernel, or how the kernel takes it; may be empty


def describe(tensor: Tensor) -> str:
    """What one needs to know of a tensor to find the mistake: dtype, shape, strides, device."""
    layout = f"strides {tuple(tensor.stride())}" if tensor.layout == torch.strided else str(tensor.layout)
    return f"{tensor.dtype}, shape {tuple(tensor.shape)}, {layout}, {tensor.device}"


def place(groups: list[Group], group: int, index: int) -> str:
    """A parameter by its place in the optimizer, with its name if it has one and what it is."""
    names = groups[group].get("param_names")
    name = f" {names[index]!r}" if names is not None and index < len(names) else ""
    return f"param group {group}, parameter {index}{name} ({describe(groups[group]['params'][index])})"


def momentum_buffer(state: dict[Tensor, Any], param: Tensor) -> Tensor | None:
    """The parameter's momentum buffer, without creating an entry for it."""
    inner = state.get(param)
    if inner is None:
        return None
    if not isinstance(inner, dict):
        raise TypeError(f"the state of a parameter ({describe(param)}) must be a dict, and is {inner!r}")
    return inner.get("momentum_buffer")


def gradient(param: Tensor) -> Tensor:
    """The gradient of a parameter that has one."""
    assert param.grad is not None
    return param.grad


def dtensor(tensor: Tensor) -> Any:
    """The tensor as a DTensor, or None."""
    if type(tensor).__name__ != "DTensor":
        return None
    from torch.distributed.tensor import DTensor

    return tensor if type(tensor) is DTensor else None


def local(tensor: Tensor) -> Tensor:
    """The memory a tensor stands for: its local shard for a DTensor, else itself."""
    sharded = dtensor(tensor)
    return tensor if sharded is None else sharded._local_tensor


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
    buffer = momentum_buffer(state, param) if options["momentum"] != 0 else None
    problem = _unsound(options, param, grad, buffer)
    if problem:
        raise RuntimeError(f"{place(groups, group, index)}: {problem}")
    judgement = choose(options, param, grad, buffer)
    if options["fused"] and judgement.path != "kernel":
        raise RuntimeError(
            f"{place(groups, group, index)}: `fused=True` cannot be honoured: {judgement.reason}."
            " Use fused=None to let such parameters take the reference path."
        )
    return judgement


def choose(options: Group, param: Tensor, grad: Tensor | None, buffer: Tensor | None) -> Judgement:
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
    obstacle = _kernel_obstacle(param, grad, buffer)
    if obstacle:
        return Judgement("reference", obstacle)
    return Judgement("kernel", _through_copies(local(param), grad, buffer))


def _unsound(options: Group, param: Tensor, grad: Tensor, buffer: Tensor | None) -> str:
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
    if grad.is_sparse and options["weight_decay"] != 0:
        return "weight_decay does not support sparse gradients, in torch.optim.SGD neither"
    if param.itemsize == 1:
        return f"there is no arithmetic in {param.dtype}"
    for role, tensor in (("it", param), ("its momentum_buffer", buffer)):
        if isinstance(tensor, Tensor) and tensor.is_inference() and not torch.is_inference_mode_enabled():
            return f"{role} is an inference tensor, which cannot be updated outside torch.inference_mode()"
    if _shares_elements(param):
        return "elements of it share memory (an expanded tensor?); give the optimizer a tensor of its own, by clone()"
    if buffer is None:
        return ""
    if not isinstance(buffer, Tensor):
        return f"its momentum_buffer is {buffer!r}, no tensor"
    if buffer.shape != param.shape:
        return (
            f"its momentum_buffer has another shape ({describe(buffer)}); was it loaded from another model, or resized?"
        )
    if buffer.device != param.device:
        return f"its momentum_buffer is on another device ({describe(buffer)})"
    if not (buffer.is_floating_point() or buffer.is_complex()) or buffer.is_complex() != param.is_complex():
        return f"its momentum_buffer has a dtype that cannot hold it ({describe(buffer)})"
    if buffer.is_sparse and not grad.is_sparse:
        return f"its momentum_buffer is sparse and its gradient is not; make the buffer dense ({describe(buffer)})"
    if _shares_elements(buffer):
        return f"elements of its momentum_buffer share memory ({describe(buffer)})"
    return ""


def _shares_elements(tensor: Tensor) -> bool:
    return C is not None and C.is_plain(local(tensor)) and C.overlaps_itself(local(tensor))


def _kernel_obstacle(param: Tensor, grad: Tensor | None, buffer: Tensor | None) -> str:
    """Why the kernel cannot take a parameter, or an empty string."""
    assert C is not None
    tensors = {"parameter": param, "gradient": grad, "momentum_buffer": buffer}
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
    for role in ("gradient", "momentum_buffer"):
        tensor = tensors[role]
        if tensor is None:
            continue
        other = dtensor(tensor)
        if (sharded is None) != (other is None):
            return f"of the parameter and its {role}, only one is a DTensor"
        if other is not None and (other.device_mesh, other.placements) != (sharded.device_mesh, sharded.placements):
            return f"the {role} is placed as {other.placements}, the parameter as {sharded.placements}"
    grad_dtype = param.dtype if grad is None else grad.dtype
    buffer_dtype = param.dtype if buffer is None else buffer.dtype
    if not C.supports(param.dtype, grad_dtype, buffer_dtype):
        return f"there is no kernel for parameter {param.dtype}, gradient {grad_dtype}, momentum {buffer_dtype}"
    return ""


def _through_copies(param: Tensor, grad: Tensor | None, buffer: Tensor | None) -> str:
    """Which tensors the kernel reaches through a copy, for explain()."""
    assert C is not None
    staged = C.staged(param, None if grad is None else local(grad), None if buffer is None else local(buffer))
    return f"{' and '.join(staged)} in other strides, through a copy" if staged else ""
