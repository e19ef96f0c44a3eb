"""The benchmarks as a package that tests can import, without the checkout on the path."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

CHECKOUT = Path(__file__).resolve().parents[1]
BENCHMARKS = CHECKOUT / "benchmarks"


def benchmarks(module: str) -> ModuleType:
    """One of its modules."""
    if "benchmarks" not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            "benchmarks", BENCHMARKS / "__init__.py", submodule_search_locations=[str(BENCHMARKS)]
        )
        assert spec is not None
        assert spec.loader is not None
        package = importlib.util.module_from_spec(spec)
        sys.modules["benchmarks"] = package
        spec.loader.exec_module(package)
    return importlib.import_module(f"benchmarks.{module}")


def command(*arguments: object, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """``python -m benchmarks``, as a person types it: in the checkout."""
    whole = [sys.executable, "-m", "benchmarks", *map(str, arguments)]
    return subprocess.run(whole, capture_output=True, text=True, cwd=CHECKOUT, timeout=timeout, check=False)
