"""``python -m benchmarks``: one command line for everything that is measured."""

import sys
from pathlib import Path

# Python puts the checkout first on the path, where the sources would hide the installed package and its kernels.
if sys.path and Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parents[1]:
    del sys.path[0]

try:
    import rich  # noqa: F401
    import torch  # noqa: F401
except ImportError as missing:
    sys.exit(f"the benchmarks need torch and rich: {missing}")

from benchmarks.commands import main

if __name__ == "__main__":
    sys.exit(main())
