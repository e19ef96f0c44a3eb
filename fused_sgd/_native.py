"""Finds the compiled module, or says why it cannot be used.

A module compiled against another torch may crash the process instead of raising, so what it was built with is compared
with what is running before it is imported.
"""

from __future__ import annotations

import importlib.util
import sysconfig
from pathlib import Path
from types import ModuleType

import torch

_REINSTALL = "Install it again, from its sources: `pip install --no-build-isolation --force-reinstall --no-deps .`"


def _release(version: str) -> str:
    """`2.13.0+cpu` -> `2.13.0`: CPU and CUDA builds of one release share their interface."""
    return version.partition("+")[0]


def _load() -> tuple[ModuleType | None, ModuleType | None, str]:
    """The compiled module and its build info, or None and the reason."""
    here = Path(__file__).parent
    if importlib.util.find_spec("fused_sgd._build_info") is None:
        reason = "this installation was built without a compiler. " + _REINSTALL
        if (here.parent / "CMakeLists.txt").exists():
            reason = (
                f"{here} is a source folder, which has no compiled module; it hides an installed one."
                " Run Python from another folder"
            )
        return None, None, reason
    from fused_sgd import _build_info as info

    soabi = sysconfig.get_config_var("SOABI")
    if soabi != info.PYTHON_SOABI:
        return None, info, f"it was built for {info.PYTHON_SOABI} and this Python is {soabi}. {_REINSTALL}"
    if _release(torch.__version__) != _release(info.TORCH_VERSION):
        return (
            None,
            info,
            (f"it was built against torch {info.TORCH_VERSION} and torch {torch.__version__} is running. {_REINSTALL}"),
        )
    try:
        from fused_sgd import _C
    except ImportError as error:
        return None, info, f"importing it failed: {error}. {_REINSTALL}"
    _C.instruction_set()  # an unusable FUSED_SGD_ISA is an error at once, and no reason to run the reference
    return _C, info, ""


C, build_info, why_missing = _load()
"""The compiled module or None; what it was built with or None; why it is missing, or an empty string."""
