"""The storage formats: the reference in PyTorch equals the C++ formats to the bit, and both keep what they promise."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from fused_sgd import _storage, reference
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
INFINITY = float("inf")


class Record(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("seed", "id", "step", "unused")]


@pytest.fixture(scope="session")
def formats(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which(os.environ.get("CXX") or "c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    library = tmp_path_factory.mktemp("storage") / "storage.so"
    source = ROOT / "tests" / "native" / "storage_library.cpp"
    flags = ["-std=c++20", "-O2", "-ffp-contract=off", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}"]
    result = subprocess.run([compiler, *flags, source, "-o", library], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return ctypes.CDLL(str(library))


def call(function: ctypes._CFuncPtr, *arguments: object) -> None:
    function(*(ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else a for a in arguments))


def from_bits(*bits: int) -> Tensor:
    signed = [b - (1 << 32) if b >= 1 << 31 else b for b in bits]
    return torch.tensor(signed, dtype=torch.int32).view(torch.float32)


def every_kind() -> Tensor:
    """Random patterns, which reach every exponent, and those on both sides of whatever is special."""
    random = torch.randint(-(1 << 31), 1 << 31, (200_000,)).to(torch.int32).view(torch.float32)
    around = (
        "00000001 00008000 00800000 2F800000 33000000 33800000 38800000 3F800000 3F808000 3F818000 "
        "477FE000 477FF000 47800000 7F7F0000 7F7F8000 7F800000 7FC00000 7FEE0000 7FFFFFFE"
    )
    edges = [int(bits, 16) + delta for bits in around.split() for delta in (-1, 0, 1)]
    special = from_bits(*edges, *(edge | 1 << 31 for edge in edges))
    return torch.cat([special, random, torch.randn(50_000), 1e-6 * torch.randn(50_000)])


def same_bits(a: Tensor, b: Tensor) -> bool:
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.view(integer), b.view(integer))


def test_split(formats: ctypes.CDLL) -> None:
    x = every_kind()
    high, low = _storage.split_round(x)
    native_high, native_low, native_x = torch.empty_like(high), torch.empty_like(low), torch.empty_like(x)
    call(formats.split_round, x, ctypes.c_int64(len(x)), native_high, native_low)
    assert same_bits(high, native_high)
    assert same_bits(low, native_low)
    call(formats.split_join, high, low, ctypes.c_int64(len(x)), native_x)
    joined = _storage.split_join(high, low)
    assert same_bits(joined, native_x)
    quiet = torch.where(x.isnan(), x.view(torch.int32) | 0x400000, x.view(torch.int32))
    assert torch.equal(joined.view(torch.int32), quiet)


def test_split_of_a_strided_tensor() -> None:
    x = torch.randn(6, 10).t()
    assert torch.equal(_storage.split_join(*_storage.split_round(x)), x)


def test_philox_gives_the_known_answers() -> None:
    """Those that come with Random123, the library of its authors."""
    words = 0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344
    answer = _storage.philox((torch.tensor([words[0]]), *words[1:]), (0xA4093822, 0x299F31D0))
    assert [w.item() for w in answer] == [0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A]
    ones = 0xFFFFFFFF
    answer = _storage.philox((torch.tensor([ones]), ones, ones, ones), (ones, ones))
    assert [w.item() for w in answer] == [0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("seed", "id", "step"), [(0, 0, 0), (12, 3, 4), ((1 << 64) - 5, (1 << 32) - 1, (1 << 47) + 3)])
def test_stochastic_rounding(formats: ctypes.CDLL, dtype: torch.dtype, seed: int, id: int, step: int) -> None:  # noqa: A002
    x = every_kind()
    rounded = _storage.stochastic_round(x, dtype, seed, id, step)
    native = torch.empty_like(rounded)
    function = formats.round_bfloat16 if dtype == torch.bfloat16 else formats.round_float16
    call(function, x, ctypes.c_int64(len(x)), Record(seed, id, step, 0), native)
    assert same_bits(rounded, native)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_stochastic_rounding_leaves_exact_values_and_differs_by_seed_id_and_step(dtype: torch.dtype) -> None:
    exact = torch.randn(1000).to(dtype)
    assert torch.equal(_storage.stochastic_round(exact.float().view(10, 100), dtype, 1, 2, 3).flatten(), exact)
    x = torch.randn(1000)
    first = _storage.stochastic_round(x, dtype, 1, 2, 3)
    assert torch.equal(first, _storage.stochastic_round(x, dtype, 1, 2, 3))
    for other in ((2, 2, 3), (1, 3, 3), (1, 2, 4), (1 + (1 << 32), 2, 3), (1, 2, 3 + (1 << 32))):
        assert not torch.equal(first, _storage.stochastic_round(x, dtype, *other))


def test_stochastic_rounding_to_another_dtype_is_an_error() -> None:
    with pytest.raises(TypeError, match=r"to bfloat16 or float16, not to torch\.float64"):
        _storage.stochastic_round(torch.ones(3), torch.float64, 0, 0, 0)


def test_int8(formats: ctypes.CDLL) -> None:
    assert formats.int8_block() == _storage.INT8_BLOCK
    kinds = every_kind()
    kinds = kinds[: len(kinds) // _storage.INT8_BLOCK * _storage.INT8_BLOCK]
    sizes = torch.randn(500, 2 * _storage.INT8_BLOCK) * torch.logspace(-44, 37, 500).unsqueeze(1)
    for x in (kinds.view(-1, _storage.INT8_BLOCK), sizes, torch.full((1, 128), torch.finfo(torch.float32).max)):
        codes, scale = _storage.int8_quantize(x)
        native_codes, native_scale, native_x = torch.empty_like(codes), torch.empty_like(scale), torch.empty_like(x)
        call(formats.int8_quantize, x, ctypes.c_int64(x.numel()), native_codes, native_scale)
        assert same_bits(scale, native_scale)
        assert same_bits(codes, native_codes)
        call(formats.int8_dequantize, codes, scale, ctypes.c_int64(x.numel()), native_x)
        assert same_bits(_storage.int8_dequantize(codes, scale), native_x)


@pytest.mark.parametrize("shape", [(3, 64), (5, 100), (2, 3, 50), (4, 1), (0, 64), (3, 0)])
def test_int8_codes_row_by_row_within_half_a_scale(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    codes, scale = _storage.int8_quantize(x)
    row = x[:1].numel() if shape[0] else 64
    blocks = -(-row // _storage.INT8_BLOCK)
    assert codes.shape == x.shape
    assert scale.shape == (shape[0], blocks)
    bound = scale.repeat_interleave(_storage.INT8_BLOCK, 1)[:, :row].reshape(shape) * (0.5 + 2**-15)
    assert ((_storage.int8_dequantize(codes, scale) - x).abs() <= bound).all()
    for i in range(shape[0]):  # as any shard along dim 0 would
        row_codes, row_scale = _storage.int8_quantize(x[i : i + 1])
        assert torch.equal(row_codes[0], codes[i])
        assert torch.equal(row_scale[0], scale[i])


def test_int8_of_zeros_of_broken_blocks_and_of_nothing_yet() -> None:
    x = torch.randn(2, 2 * _storage.INT8_BLOCK)
    x[0, :64] = 0
    x[0, 70], x[1, 3] = INFINITY, float("nan")
    back = _storage.int8_dequantize(*_storage.int8_quantize(x))
    assert (back[0, :64] == 0).all()
    assert back[0, 64:].isnan().all()
    assert back[1, :64].isnan().all()
    assert back[1, 64:].isfinite().all()
    unset = _storage.int8_dequantize(*_storage.int8_unset(torch.Size((3, 100))))
    assert unset.shape == (3, 100)
    assert reference.is_unset(unset).all()


def test_which_tensors_are_coded() -> None:
    assert _storage.int8_fits(torch.Size((7, 64)))
    assert _storage.int8_fits(torch.Size((7, 16, 2, 2)))
    for shape in ((64,), (), (7, 65), (64, 3), (3, 0)):
        assert not _storage.int8_fits(torch.Size(shape))
