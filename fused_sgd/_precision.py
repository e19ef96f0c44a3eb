"""In which formats a parameter, its momentum and its master weights are kept, and the way from one to another.

The formats themselves are in _storage.py. What the options of a param group mean for one parameter is decided by
:func:`storage`, and nowhere else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from fused_sgd._dtensor import dtensor, local, placed_like
from fused_sgd._storage import (
    INT8_BLOCK,
    int8_dequantize,
    int8_fits,
    int8_quantize,
    split_join,
    split_round,
    stochastic_round,
)
from fused_sgd.reference import fill_unset, is_unset, unset
from torch import Tensor

Group = dict[str, Any]

_LOOKED_AT_TOGETHER = 1 << 20  # elements: what masters and parameters are then copied into is small

MOMENTUM_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
MASTER_WEIGHTS = (torch.float32, "float32", "split")

_NARROW = (torch.bfloat16, torch.float16)
_NAMES = {  # the kernels' formats
    torch.float64: "Float64",
    torch.complex128: "Float64",
    torch.float32: "Float32",
    torch.complex64: "Float32",
    torch.bfloat16: "BFloat16",
    torch.float16: "Float16",
}


STATE_DTYPES = {
    "master": torch.float32,
    "remainder": torch.int16,
    "rounding": torch.int64,
    "momentum_codes": torch.int8,
    "momentum_scale": torch.float32,
}


class Storage(NamedTuple):
    """How one parameter and what belongs to it are kept."""

    parameter: str  # the kernels' name of the format; empty where there is none
    beside: str  # the key of what the parameter has beside itself: "master", "remainder", "rounding" or ""
    momentum_dtype: torch.dtype  # int8 for blocks
    note: str = ""  # why the momentum is not kept as the options ask

    @property
    def momentum_keys(self) -> tuple[str, ...]:
        """The keys of the momentum."""
        return ("momentum_codes", "momentum_scale") if self.momentum_dtype == torch.int8 else ("momentum_buffer",)

    @property
    def has_master(self) -> bool:
        """Whether the update is that of a float32 parameter."""
        return self.beside in ("master", "remainder")


def format_name(dtype: torch.dtype) -> str:
    """The kernels' name of a dtype; empty where they have none."""
    return "Int8" if dtype == torch.int8 else _NAMES.get(dtype, "")


def storage(options: Group, param: Tensor) -> Storage:
    """What a param group's options mean for a parameter. Those that it has no use for are passed over."""
    name, beside = format_name(param.dtype), ""
    if param.dtype in _NARROW:
        if options["master_weights"] == "split":
            name, beside = "SplitBFloat16", "remainder"
        elif options["master_weights"] is not None:
            name, beside = f"Master{name}", "master"
        elif options["stochastic_rounding"]:
            name, beside = f"Stochastic{name}", "rounding"
    wide = torch.float32 if beside in ("master", "remainder") else param.dtype
    wanted = options["momentum_dtype"]
    note = ""
    if wanted == torch.int8 and (reason := _stays_wide(param)):
        wanted, note = None, f"its momentum is not int8: {reason}"
    return Storage(name, beside, wanted or wide, note)


def _stays_wide(param: Tensor) -> str:
    """Why a parameter's momentum cannot be kept in blocks of 8 bits, or an empty string."""
    if param.dtype not in (torch.float32, *_NARROW):
        return f"there is none for {param.dtype}"
    if not int8_fits(param.shape):
        return f"its rows are not whole blocks of {INT8_BLOCK} elements"
    if not local(param).is_contiguous():
        return "it is not contiguous"
    sharded = dtensor(param)
    if sharded is not None and any(placement.is_shard() and placement.dim != 0 for placement in sharded.placements):
        return "it is sharded in another dimension than 0"
    return ""


def unsound_options(options: Group, param: Tensor, grad: Tensor | None) -> str:
    """What a parameter makes impossible that its group's options ask for, or an empty string."""
    if options["master_weights"] == "split" and param.dtype == torch.float16:
        return 'master_weights="split" is for bfloat16, whose bits are the upper half of a float32; use torch.float32'
    wanted = options["momentum_dtype"]
    if param.is_complex() and wanted not in (None, torch.int8) and options["momentum"] != 0:
        return f"momentum_dtype={wanted} is for real parameters, and it is {param.dtype}"
    kept = storage(options, param)
    narrows = kept.momentum_dtype != param.dtype and options["momentum"] != 0
    if grad is not None and grad.layout != torch.strided and (kept.beside or narrows):
        return "master_weights, momentum_dtype and stochastic_rounding do not support sparse gradients"
    return ""


# --- Master weights ---------------------------------------------------------------------------------------------------


def narrowed(master: Tensor, dtype: torch.dtype) -> Tensor:
    """Float32 weights as the model computes with them; bfloat16 as the split format has it, with ties away from 0."""
    return split_round(master)[0] if dtype == torch.bfloat16 else master.to(dtype)


def _following(p: Tensor, m: Tensor) -> Tensor:
    """A master after someone wrote into its parameter: where it does not round to that, it is wrong."""
    rounded = narrowed(m, p.dtype)
    same = (rounded == p) | (rounded.isnan() & p.isnan())
    return torch.where(same, m, p.to(m.dtype))


def refresh_masters(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Takes over into masters what was written into their parameters.

    Args:
        pairs: parameters and their masters. Small ones are looked at together, since each look is a dozen operations.
    """
    batches: dict[tuple[torch.device, torch.dtype, int], list[tuple[Tensor, Tensor]]] = {}
    elements: Counter[tuple[torch.device, torch.dtype]] = Counter()
    for param, master in pairs:
        p, m = local(param.detach()), local(master)
        elements[p.device, p.dtype] += p.numel()
        number = elements[p.device, p.dtype] // _LOOKED_AT_TOGETHER
        batches.setdefault((p.device, p.dtype, number), []).append((p, m))
    with torch.no_grad():
        for batch in batches.values():
            if len(batch) == 1:
                ((p, m),) = batch
                m.copy_(_following(p, m))
                continue
            params, masters = (torch.cat([tensor.reshape(-1) for tensor in one]) for one in zip(*batch, strict=True))
            parts = torch.split(_following(params, masters), [m.numel() for _, m in batch])
            for (_, m), part in zip(batch, parts, strict=True):
                m.copy_(part.view(m.shape))


def exact_weights(param: Tensor, master: Tensor | None, remainder: Tensor | None) -> Tensor:
    """The float32 weights of a narrow parameter, as a tensor of their own; its value where it has neither."""
    with torch.no_grad():
        if remainder is not None:
            return placed_like(param, split_join(local(param.detach()), local(remainder)))
        if master is None:
            return param.detach().to(torch.float32)
        weights = master.clone()
        refresh_masters([(param, weights)])
        return weights


def round_stochastically(x: Tensor, param: Tensor, rounding: Tensor) -> Tensor:
    """Float32 values for a parameter, whose elements take their random bits in the order of memory."""
    seed, id_, step, _ = rounding.tolist()
    in_order = _in_memory_order(param)
    values = in_order(torch.empty_like(param, dtype=torch.float32).copy_(x))
    rounded = torch.empty_like(param)
    in_order(rounded).copy_(stochastic_round(values, param.dtype, seed, id_, step))
    return rounded


def _in_memory_order(param: Tensor) -> Callable[[Tensor], Tensor]:
    """How to see a tensor like ``param`` in the order of its memory, where that is dense."""
    order = sorted(range(param.dim()), key=lambda dim: param.stride(dim), reverse=True)
    dense = param.permute(order).is_contiguous()
    return lambda tensor: tensor.permute(order) if dense else tensor


# --- Momentum ---------------------------------------------------------------------------------------------------------


def cast_buffer(buffer: Tensor, dtype: torch.dtype) -> Tensor:
    """A momentum buffer in another dtype; elements that have accumulated nothing stay so."""
    cast = buffer.to(dtype)
    if buffer.layout != torch.strided:
        return cast
    nothing = local(is_unset(buffer))
    if bool(nothing.any()):
        filled = fill_unset(torch.empty_like(local(cast)))
        integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[filled.itemsize // (2 if filled.is_complex() else 1)]
        memory = local(cast)
        if memory.is_complex():
            memory, filled, nothing = torch.view_as_real(memory), torch.view_as_real(filled), nothing.unsqueeze(-1)
        memory.view(integer).copy_(torch.where(nothing, filled.view(integer), memory.view(integer)))
    return cast


def scale_shape(param: Tensor) -> torch.Size:
    """The shape of an int8 momentum's scales: ``(rows, blocks a row)``."""
    return torch.Size((param.shape[0] if param.dim() else 1, param.shape[1:].numel() // INT8_BLOCK))


def to_blocks(param: Tensor, buffer: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of a momentum buffer; blocks that have accumulated nothing stay so."""
    wide, nothing = local(buffer).to(torch.float32), is_unset(local(buffer))
    codes, scale = int8_quantize(wide.masked_fill(nothing, 0.0).contiguous())
    empty = nothing.contiguous().view(*scale.shape, INT8_BLOCK).all(-1)
    scale.view(torch.int32).masked_fill_(empty, int(unset(torch.float32).view(torch.int32)))
    return placed_like(param, codes), placed_like(param, scale, scale_shape(param))


def from_blocks(param: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """The float32 momentum buffer of codes and scales."""
    return placed_like(param, int8_dequantize(local(codes), local(scale)))


# --- From one to another ----------------------------------------------------------------------------------------------


def convert(options: Group, param: Tensor, kept: dict[str, Any], masters: bool = True) -> list[str]:
    """Brings a parameter's state, in place, into the formats that its group's options ask for.

    What does not fit the parameter is left for the judge to refuse.

    Args:
        options: the group's.
        param: the parameter.
        kept: its state.
        masters: whether master weights, too. What they become depends on the parameter's value.

    Returns:
        What was done, in words; empty where nothing had to be.
    """
    wanted = storage(options, param)
    said = _convert_momentum(options, param, kept, wanted)
    return said + _convert_master(param, kept, wanted) if masters else said


def drop_cast(kept: dict[str, Any]) -> list[str]:
    """Drops from a parameter's state, in place, what another optimizer has cast to the parameter's dtype.

    torch.optim.SGD does so with all that it loads, and saves it again as it was then, beside the momentum that it goes
    on with itself: the bits have lost their meaning, and the values are old.

    Returns:
        What was dropped, in words.
    """
    tensors = {key: value for key, value in kept.items() if isinstance(value, Tensor)}
    cast = [key for key, tensor in tensors.items() if tensor.dtype != STATE_DTYPES.get(key, tensor.dtype)]
    if "ema" in tensors and tensors["ema"].dtype in _NARROW:
        cast.append("ema")
    if "momentum_codes" in cast:
        cast.append("momentum_scale")
    return [f"dropped {key}, which another optimizer has cast" for key in cast if kept.pop(key, None) is not None]


def _convert_momentum(options: Group, param: Tensor, kept: dict[str, Any], wanted: Storage) -> list[str]:
    if options["momentum"] == 0:
        return []  # it waits until there is a momentum again, and for the format wanted then
    codes, scale, buffer = (kept.get(key) for key in ("momentum_codes", "momentum_scale", "momentum_buffer"))
    target = wanted.momentum_dtype
    if isinstance(codes, Tensor) and isinstance(scale, Tensor):
        if target == torch.int8 or codes.shape != param.shape or scale.shape != scale_shape(param):
            return []
        kept["momentum_buffer"] = cast_buffer(from_blocks(param, codes, scale), target)
        del kept["momentum_codes"], kept["momentum_scale"]
        return [f"converted momentum from int8 blocks to {target}"]
    if not isinstance(buffer, Tensor) or buffer.dtype not in _NAMES:
        return []
    if target == torch.int8:
        if buffer.shape != param.shape or buffer.layout != torch.strided:
            return []
        kept["momentum_codes"], kept["momentum_scale"] = to_blocks(param, buffer)
        del kept["momentum_buffer"]
        return [f"converted momentum from {buffer.dtype} to int8 blocks"]
    # Unless asked for another dtype, a buffer that is wider than a narrow parameter stays so.
    is_wider = param.dtype in _NARROW and buffer.dtype == torch.float32 and options["momentum_dtype"] is None
    same_kind = buffer.is_complex() == param.is_complex() == target.is_complex
    if buffer.dtype == target or is_wider or not same_kind:
        return []
    kept["momentum_buffer"] = cast_buffer(buffer, target)
    return [f"converted momentum from {buffer.dtype} to {target}"]


def _convert_master(param: Tensor, kept: dict[str, Any], wanted: Storage) -> list[str]:
    master, remainder = kept.get("master"), kept.get("remainder")
    said = []
    if isinstance(master, Tensor) and wanted.beside != "master":
        del kept["master"]
        if wanted.beside == "remainder" and remainder is None:
            high, low = split_round(local(master))
            same = high == local(param.detach())
            kept["remainder"] = placed_like(param, torch.where(same, low, 0).to(torch.int16))
            return ["converted master weights from float32 to a 16-bit remainder"]
        said.append("dropped master weights")
    if isinstance(remainder, Tensor) and wanted.beside != "remainder":
        del kept["remainder"]
        if wanted.beside == "master" and master is None:
            kept["master"] = placed_like(param, split_join(local(param.detach()), local(remainder)))
            return ["converted master weights from a 16-bit remainder to float32"]
        said.append("dropped master weights")
    return said
