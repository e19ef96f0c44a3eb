"""Prints, as a CMake list, what the build needs to know of the installed torch.

version ; CUDA version, or OFF ; C++11 ABI (0 or 1) ; library directory ; include directories...
"""

import torch
from torch.utils.cpp_extension import include_paths, library_paths

print(
    torch.__version__,
    torch.version.cuda or "OFF",
    int(torch.compiled_with_cxx11_abi()),
    library_paths()[0],
    *include_paths(),
    sep=";",
)
