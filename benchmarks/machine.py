"""Where and with what a run was made: what every result file must tell."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from .peers.flat_cuda import nvcc
from .peers.flat_loop import compiler

CHECKOUT = Path(__file__).resolve().parents[1]


def describe(device: str = "cpu") -> dict[str, Any]:
    """Device, versions, compiler and commit."""
    commit, dirty = git_commit()
    return {
        "commit": commit,
        "dirty": dirty,
        "device": gpu() if device == "cuda" else cpu(),
        "host": cpu_name(),
        "load_average": load_average(),  # before the run: what others ask of the cores
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_instruction_set": torch.backends.cpu.get_cpu_capability(),
        "cuda": torch.version.cuda,
        "fused_sgd": fused_sgd(),
        "compiler": _first_line(compiler(), "--version"),
        "nvcc": _last_line(nvcc(), "--version") if device == "cuda" else None,
        "openmp_runtimes": len(openmp_runtimes()),
    }


def cpu() -> dict[str, Any]:
    """The CPU as a device."""
    return {
        "kind": "cpu",
        "name": cpu_name(),
        "cores": cores(),
        "last_level_cache_bytes": last_level_cache_bytes(),
        "driver": None,
    }


def gpu() -> dict[str, Any]:
    """The current CUDA device."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "kind": "cuda",
        "name": properties.name,
        "cores": cores(),
        "multiprocessors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "last_level_cache_bytes": properties.L2_cache_size,
        "driver": _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
    }


def available_bytes(device: str) -> int | None:
    """Memory that could still be taken, or None where nobody tells."""
    if device == "cuda":
        free: int = torch.cuda.mem_get_info()[0]
        return free
    info = Path("/proc/meminfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def fused_sgd() -> dict[str, str | None]:
    """Its version and the instruction set its kernels run with, or why there is none."""
    try:
        from fused_sgd import __version__
        from fused_sgd._native import C, why_missing
    except ImportError as error:
        return {"version": None, "instruction_set": None, "missing": str(error)}
    return {
        "version": __version__,
        "instruction_set": None if C is None else C.instruction_set(),
        "missing": why_missing or None,
    }


def cores() -> int:
    """How many this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    """The model, as Linux names it or as Python knows it."""
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


def load_average() -> float | None:
    """Of the last minute."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def last_level_cache_bytes() -> int | None:
    """Of one core's view: data below this size says little about memory bandwidth."""
    sizes = []
    for cache in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = cache.read_text().strip()
        if text.endswith("K") and text[:-1].isdigit():
            sizes.append(int(text[:-1]) * 1024)
    return max(sizes, default=None)


def openmp_runtimes() -> list[str]:
    """Files of the OpenMP runtimes in this process. Two of them would fight for the cores while both are timed."""
    maps = Path("/proc/self/maps")
    files = {line.split()[-1] for line in maps.read_text().splitlines()} if maps.exists() else set()
    return sorted(file for file in files if any(name in Path(file).name for name in ("libgomp", "libomp", "libiomp")))


def git_commit() -> tuple[str | None, bool | None]:
    """The checkout's commit, and whether files other than results differ from it."""
    commit = _first_line("git", "-C", str(CHECKOUT), "rev-parse", "HEAD")
    if commit is None:
        return None, None
    made = (f":!benchmarks/{name}" for name in ("results", "plots", "REPORT.md"))
    status = ("status", "--porcelain", "--", ".", *made)
    return commit, _first_line("git", "-C", str(CHECKOUT), *status) is not None


def _first_line(*command: str) -> str | None:
    return next(iter(_lines(command)), None)


def _last_line(*command: str) -> str | None:
    return next(iter(reversed(_lines(command))), None)


def _lines(command: tuple[str, ...]) -> list[str]:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return []
