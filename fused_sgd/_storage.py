"""The storage formats in plain PyTorch: the specification that csrc/core's formats equal to the bit, and their oracle.

Bits are computed on integers, so that the results do not depend on how torch rounds, on the device, or on its vectors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import fill_unset

_WORD = 0xFFFFFFFF

INT8_BLOCK = 64
"""Elements that share a scale; benchmarks/int8_error.py measures the choice."""

_LARGEST_SCALE = float.fromhex("0x1.020406p+121")  # 127 of it are finite


def split_round(x: Tensor) -> tuple[Tensor, Tensor]:
    """A float32 tensor as bfloat16 and the int16 remainder that together are the exact value.

    Rounds to nearest, ties away from zero (to even there is no 16-bit remainder: an even bfloat16 is the nearest of
    65,537 values). Signalling NaNs become quiet; nothing else is lost.
    """
    bits = x.view(torch.int32)
    high = torch.where(x.isnan(), bits >> 16 | 0x40, (bits + 0x8000) >> 16)
    return high.to(torch.int16).view(torch.bfloat16), bits.to(torch.int16)


def split_join(high: Tensor, low: Tensor) -> Tensor:
    """The float32 values that :func:`split_round` took apart.

    Someone else may have written a zero or an infinity beside a remainder that belongs to no such value: it then counts
    as 0, where the sum would be a NaN.
    """
    upper = high.view(torch.int16).to(torch.int32) << 16
    lower = low.to(torch.int32)
    number = upper + lower
    no_number = torch.where(high.isnan(), upper | lower & 0xFFFF, upper)
    return torch.where(number & 0x7FFFFFFF > 0x7F800000, no_number, number).view(torch.float32)


def philox(counter: tuple[Tensor | int, ...], key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-7 of Salmon et al., `Parallel random numbers: as easy as 1, 2, 3
    <https://doi.org/10.1145/2063384.2063405>`_.

    Args:
        counter: four words, each an int or an int64 tensor of numbers below 2^32; at least one is a tensor.
        key: two words.

    Returns:
        Four words, int64 tensors of numbers below 2^32.
    """  # noqa: D205
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(7):
        high0, low0 = _multiply(0xD2511F53, c0)
        high1, low1 = _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + 0x9E3779B9 & _WORD, k1 + 0xBB67AE85 & _WORD
    return tuple(torch.as_tensor(word) for word in (c0, c1, c2, c3))  # type: ignore[return-value]


def _multiply(a: int, b: Tensor | int) -> tuple[Tensor | int, Tensor | int]:
    """The upper and lower word of a product of two words, without leaving int64."""
    upper, lower = a * (b >> 16), a * (b & 0xFFFF)
    return upper + (lower >> 16) >> 16, ((upper & 0xFFFF) << 16) + lower & _WORD


def random_bits(count: int, bits: int, seed: int, id: int, step: int, device: torch.device | None = None) -> Tensor:  # noqa: A002
    """The random numbers of ``bits`` (16 or 32) bits that elements 0 to ``count - 1`` of a parameter take.

    Their layout is written down in csrc/core/stochastic.h.
    """
    per_call = 128 // bits
    call = torch.arange(-(-count // per_call), device=device)
    counter = (call & _WORD, call >> 32 & 0xFFFF | (step >> 32 & 0xFFFF) << 16, step & _WORD, id & _WORD)
    words = torch.stack(philox(counter, (seed & _WORD, seed >> 32 & _WORD)), dim=-1)
    if bits == 16:
        words = torch.stack((words & 0xFFFF, words >> 16), dim=-1)
    return words.flatten()[:count]


def stochastic_round(x: Tensor, dtype: torch.dtype, seed: int, id: int, step: int) -> Tensor:  # noqa: A002
    """Rounds to one of the two neighbours in ``dtype``, with the probabilities that make it right on average.

    What needs no rounding stays. Beyond the largest finite value it rounds to nearest.

    Args:
        x: float32, of any shape; its elements are numbered in row-major order.
        dtype: bfloat16 or float16.
        seed: of the run.
        id: of the parameter.
        step: how many steps were applied before.
    """
    flat = x.contiguous().flatten()
    word = flat.view(torch.int32).to(torch.int64)
    magnitude, sign = word & 0x7FFFFFFF, word >> 16 & 0x8000
    if dtype == torch.bfloat16:
        draw = random_bits(x.numel(), 16, seed, id, step, x.device)
        rounded = magnitude + draw >> 16
        large = torch.where(magnitude < 0x7F7F8000, 0x7F7F, 0x7F80)
        bits = torch.where(magnitude > 0x7F7F0000, large, rounded) | sign
        bits = torch.where(flat.isnan(), 0x7FC0, bits)
    elif dtype == torch.float16:
        draw = random_bits(x.numel(), 32, seed, id, step, x.device)
        is_subnormal = magnitude < 113 << 23
        steps = torch.where(is_subnormal, flat.abs(), 0) * 2**24  # of 2^-24 each; exact
        whole = steps.to(torch.int64)
        fraction = ((steps - whole) * 2**31).to(torch.int64)
        subnormal = whole + (fraction + (draw >> 1) >> 31)
        rounded = torch.where(is_subnormal, subnormal, magnitude - (112 << 23) + (draw >> 19) >> 13)
        large = torch.where(magnitude < 0x477FF000, 0x7BFF, torch.where(flat.isnan(), 0x7E00, 0x7C00))
        bits = torch.where(magnitude > 0x477FE000, large, rounded) | sign
    else:
        raise TypeError(f"stochastic rounding is to bfloat16 or float16, not to {dtype}")
    return bits.to(torch.int16).view(dtype).view(x.shape)


def int8_fits(shape: torch.Size, block: int = INT8_BLOCK) -> bool:
    """Whether a tensor's momentum is kept in 8 bits: its rows along dim 0 must be whole blocks.

    Then no block crosses a row, so a tensor may be sharded along dim 0 at any place, and the blocks of all rows follow
    each other as if the tensor were flat. Other tensors stay wide, and so do 1-D ones, which are small.
    """
    row = shape[1:].numel()
    return len(shape) >= 2 and row > 0 and row % block == 0


def int8_quantize(x: Tensor, block: int = INT8_BLOCK) -> tuple[Tensor, Tensor]:
    """8-bit codes and their scales.

    The error is at most half a scale. A block that holds an infinity or NaN becomes NaN as a whole.

    Args:
        x: float32, of shape ``(rows, ...)``.
        block: how many elements of a row share a scale; a row's last block may be shorter.

    Returns:
        int8 codes of ``x``'s shape, and float32 scales of shape ``(rows, ceil(row elements / block))``.
    """
    rows = x.flatten(1)
    padded = torch.nn.functional.pad(rows, (0, -rows.shape[1] % block))
    blocks = padded.view(rows.shape[0], padded.shape[1] // block, block)
    largest = blocks.abs().amax(-1)
    scale = (largest / torch.full_like(largest, 127)).clamp(2.0**-126, _LARGEST_SCALE)
    scale = torch.where(largest.isfinite(), scale, torch.nan)
    inverse = torch.ones_like(scale) / scale
    codes = torch.where(scale.isnan().unsqueeze(-1), 0, (blocks * inverse.unsqueeze(-1)).round())
    return codes.to(torch.int8).flatten(1)[:, : rows.shape[1]].reshape(x.shape), scale


def int8_dequantize(codes: Tensor, scale: Tensor, block: int = INT8_BLOCK) -> Tensor:
    """The float32 values of codes and scales. Where the scale is a NaN they are that NaN, to the bit."""
    rows = codes.flatten(1)
    scales = scale.repeat_interleave(block, dim=1)[:, : rows.shape[1]]
    return torch.where(scales.isnan(), scales, rows.to(torch.float32) * scales).reshape(codes.shape)


def int8_unset(shape: torch.Size, block: int = INT8_BLOCK, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Codes and scales to which nothing was added yet; all elements decode to :func:`~fused_sgd.reference.unset`."""
    blocks = (shape[0], -(-shape[1:].numel() // block))
    scale = fill_unset(torch.empty(blocks, dtype=torch.float32, device=device))
    return torch.zeros(shape, dtype=torch.int8, device=device), scale
