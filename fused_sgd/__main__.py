"""`python -m fused_sgd`: what is compiled in, what this machine can use, and a self-test of it."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator

import torch
from fused_sgd import FusedSGD, __version__
from fused_sgd._native import C, build_info, why_missing
from torch import Tensor

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _report() -> Iterator[tuple[str, str]]:
    yield "fused_sgd", __version__
    yield "torch running", f"{torch.__version__}, {torch.get_num_threads()} threads"
    yield "torch built against", build_info.TORCH_VERSION if build_info else "none"
    yield "compiler", build_info.COMPILER if build_info else "none"
    if C is None:
        yield "compiled module", f"none: {why_missing}"
        return
    chosen = C.instruction_set()
    sets = [
        name + (" (in use)" if name == chosen else "" if runs_here else " (not on this machine)")
        for name, runs_here, _ in C.instruction_sets()
    ]
    yield "CPU instruction sets", ", ".join(sets)
    assert build_info is not None
    yield "CUDA architectures", C.cuda_architectures() or f"none: {build_info.CUDA_REASON}"
    for index in range(torch.cuda.device_count()):
        yield f"cuda:{index}", f"{torch.cuda.get_device_name(index)}, {C.cuda_obstacle(index) or 'usable'}"


def _run(fused: bool, dtype: torch.dtype, nesterov: bool, device: str = "cpu") -> list[Tensor]:
    """Three steps over tensors of many sizes; returns parameters and momentum buffers."""
    generator = torch.Generator().manual_seed(0)
    sizes = (1, 7, 64, 4097, 70_001)
    params = [torch.randn(n, generator=generator).to(device, dtype).requires_grad_() for n in sizes]
    optimizer = FusedSGD(params, lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=nesterov, fused=fused)
    for _ in range(3):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(device, dtype)
        optimizer.step()
    return [t.cpu() for p in params for t in (p.detach(), optimizer.state[p]["momentum_buffer"])]


def _self_test() -> Iterator[tuple[str, bool]]:
    """The kernel of each instruction set and GPU against the reference on the CPU, to the bit."""
    assert C is not None
    before = C.instruction_set()
    for name, runs_here, _ in C.instruction_sets():
        if not runs_here:
            continue
        C.select_instruction_set(name)
        yield f"{name} equals the reference to the bit", _equals_reference("cpu")
    C.select_instruction_set(before)
    for index in range(torch.cuda.device_count()):
        if not C.cuda_obstacle(index):
            yield f"cuda:{index} equals the reference to the bit", _equals_reference(f"cuda:{index}")


def _equals_reference(device: str) -> bool:
    return all(
        all(map(torch.equal, _run(True, dtype, nesterov, device), _run(False, dtype, nesterov)))
        for dtype, nesterov in itertools.product(_DTYPES, (False, True))
    )


def main() -> int:
    """Prints the report; returns the exit status, 1 when the module is missing or a self-test failed."""
    argparse.ArgumentParser(prog="python -m fused_sgd", description=(__doc__ or "").partition(": ")[2]).parse_args()
    for what, value in _report():
        print(f"{what:22}{value}")
    if C is None:
        return 1
    passed = True
    for what, good in _self_test():
        passed = passed and good
        print(f"{'self-test':22}{what}: {'yes' if good else 'NO'}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
