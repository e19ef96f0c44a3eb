"""Drives CMake for pip. What is built, and how, stands in CMakeLists.txt alone."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
# cmake and ninja may have been installed by pip, into an environment that is not activated.
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"


class CMakeBuild(build_ext):
    """Builds the extension with CMake and ninja, or leaves it out where there is no compiler."""

    def build_extension(self, ext: Extension) -> None:
        package = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        for stale in (*package.glob("_C.*.so"), *package.glob("_build_info.py")):
            stale.unlink()  # setuptools keeps build/lib, and would ship what an earlier build left there
        compilers = filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++"))
        if not any(shutil.which(name, path=PATH) for name in compilers):
            print("fused_sgd: no C++ compiler found; installing the reference path only", file=sys.stderr)
            return
        build = os.environ.get("FUSED_SGD_BUILD_DIR") or tempfile.mkdtemp(prefix="fused-sgd-")
        options = [f"-DPython_EXECUTABLE={sys.executable}", "-DCMAKE_BUILD_TYPE=Release"]
        for command in (
            ["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", *options],
            ["cmake", "--build", build],
            ["cmake", "--install", build, "--prefix", package],
        ):
            subprocess.check_call(command, env={**os.environ, "PATH": PATH})


setup(ext_modules=[Extension("fused_sgd._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
