"""The house's walls: what may include what, what is linked, and what happens when things do not match."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import fused_sgd
import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(fused_sgd.__file__).parent


def run(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment}
    # Long enough for a build of everything on two busy cores.
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, env=env, cwd="/", timeout=2400)


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "-c", code, **environment)


def build_tools() -> tuple[str, str]:
    """CMake, and a PATH with it and ninja: beside this Python, or wherever the machine has them."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    cmake = shutil.which("cmake", path=path)
    assert cmake is not None, "cmake is not installed"
    return cmake, path


@pytest.fixture(scope="session")
def native_build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The native tests of core, cpu and cuda: built without Python, and so without torch, under sanitizers."""
    build = tmp_path_factory.mktemp("native")
    options = ["-DFUSED_SGD_PYTHON=OFF", "-DFUSED_SGD_TESTS=ON", "-DFUSED_SGD_WERROR=ON", "-DFUSED_SGD_SANITIZE=ON"]
    cmake, path = build_tools()
    configured = run(cmake, "-S", ROOT, "-B", build, "-G", "Ninja", *options, PATH=path, FUSED_SGD_CUDA="0")
    assert configured.returncode == 0, configured.stdout + configured.stderr
    built = run(cmake, "--build", build, PATH=path, FUSED_SGD_CUDA="0")
    assert built.returncode == 0, built.stdout + built.stderr
    return build


NATIVE_TESTS = ["formats", "blocks", "walk", "grid", "split", "master", "stochastic", "int8"]
NATIVE_TESTS += [f"{test}_{isa}" for test in ("stochastic", "int8") for isa in ("avx2", "avx512")]


@pytest.mark.torch_free
@pytest.mark.xdist_group("native build")
@pytest.mark.parametrize("test", NATIVE_TESTS)
def test_native(native_build: Path, test: str) -> None:
    if "_avx" in test and platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("not an instruction set of this machine's kind")
    result = run(native_build / f"test_{test}")
    assert result.returncode == 0, result.stdout + result.stderr


ALL = "75 80 86 89 90 100 120"


@pytest.mark.torch_free
@pytest.mark.parametrize(
    ("asked", "nvidia_smi", "built"),
    [
        ("80;90;100", "echo 8.6", "80 90 100"),
        ("all", "echo 9.0", ALL),
        ("auto", "echo 8.9; echo 9.0; echo 8.9", "89 90"),
        ("auto", "printf '10.3\\r\\n12.1\\r\\n8.7\\r\\n'", "100 120 86"),  # they run code for these
        ("auto", "echo 7.0; echo 9.0", "90"),  # too old
        ("auto", "echo 9.0; echo 13.0", ALL),  # too new
        ("auto", "echo 9.0; echo '[N/A]'", ALL),
        ("auto", "echo 9.0; exit 9", ALL),
        ("auto", "exit 0", ALL),
        ("auto", None, ALL),
    ],
)
def test_architectures_that_a_build_is_for(asked: str, nvidia_smi: str | None, built: str, tmp_path: Path) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    cmake, path = build_tools()
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text(f"#!/bin/sh\n{nvidia_smi or 'exit 127'}\n")
    tool.chmod(0o755)
    environment = {"PATH": f"{tool.parent}:{path}", "FUSED_SGD_CUDA": "1", "FUSED_SGD_CUDA_ARCHS": asked}
    configured = run(cmake, "-S", ROOT, "-B", tmp_path, "-G", "Ninja", "-DFUSED_SGD_PYTHON=OFF", **environment)
    assert configured.returncode == 0, configured.stdout + configured.stderr
    commands = json.loads((tmp_path / "compile_commands.json").read_text())
    cuda = [shlex.split(entry["command"]) for entry in commands if entry["file"].endswith(".cu")]
    assert sum(f'-DFSGD_CUDA_ARCHITECTURES="{built}"' in words for words in cuda) == 1
    assert sum(any(word.startswith("-DFSGD_PART=") for word in words) for words in cuda) == len(cuda) - 1
    for words in cuda:
        assert all(f"sm_{arch}" in " ".join(words) for arch in built.split())
        assert sum("compute_" in word for word in words) == len(built.split())


def test_the_module_has_the_kernels_it_was_built_for() -> None:
    from fused_sgd import _C, _build_info

    assert _C.cuda_architectures() == _build_info.CUDA_ARCHITECTURES
    if not _build_info.CUDA_ARCHITECTURES:
        assert _build_info.CUDA_REASON
    elif shutil.which("nvidia-smi") is None:
        assert _C.cuda_obstacle(0).startswith("fused_sgd, cuda:0: ")  # no driver here, and no crash


@pytest.mark.torch_free
@pytest.mark.xdist_group("native build")
def test_no_instruction_set_leaks_into_another(native_build: Path) -> None:
    """An inline function compiled for AVX-512 and merged by the linker would crash machines without it."""
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    objects = sorted(native_build.glob("CMakeFiles/fused_sgd_walk_*.dir/csrc/cpu/walk.cpp.o"))
    assert objects
    for path in objects:
        isa = re.search(r"fused_sgd_walk_(\w+)\.dir", str(path)).group(1)
        symbols = [line.split(maxsplit=2)[1:] for line in run("nm", "-C", "--defined-only", path).stdout.splitlines()]
        data = ("asan", "kCombinations", "DW.ref.__gxx_personality")
        code = [name for kind, name in symbols if kind in "TWVu" and not any(word in name for word in data)]
        assert all(f"walk_{isa}(" in name or f"measure_{isa}(" in name for name in code), code


def test_core_and_cpu_do_not_know_torch() -> None:
    for folder in ("core", "cpu", "cuda"):
        for path in (ROOT / "csrc" / folder).rglob("*.*"):
            assert not re.search(r"#include\s*[<\"](torch|ATen|c10|pybind11|Python\.h)", path.read_text()), path


def test_the_rule_is_written_once() -> None:
    calls = [p for p in (ROOT / "csrc").rglob("*.*") if re.search(r"\bfma\(", p.read_text())]
    # squares.h: sums of squares. int8.h: two divisions of a GPU's.
    assert {p.name for p in calls} == {"rule.h", "arithmetic.h", "squares.h", "int8.h"}


def test_one_libgomp() -> None:
    code = (
        "import torch, fused_sgd; torch.ones(10**6).add_(1);"
        "print(*{line.split()[-1] for line in open('/proc/self/maps') if 'gomp' in line}, sep='\\n')"
    )
    assert len(python(code).stdout.split()) == 1


def test_report_and_self_test() -> None:
    result = run(sys.executable, "-m", "fused_sgd")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "CPU instruction sets" in result.stdout
    assert "CUDA architectures" in result.stdout
    assert "equals the reference to the bit: yes" in result.stdout
    assert ": NO" not in result.stdout
    result = run(sys.executable, "-m", "fused_sgd", "--help")
    assert result.stdout.startswith("usage: python -m fused_sgd")
    assert run(sys.executable, "-m", "fused_sgd", "--test").returncode == 2


@pytest.mark.parametrize("name", ["portable", "avx2", "avx512"])
def test_choosing_the_instruction_set_by_environment(name: str) -> None:
    result = python("import fused_sgd; from fused_sgd._native import C; print(C.instruction_set())", FUSED_SGD_ISA=name)
    assert result.stdout.strip() == name or "this machine cannot run" in result.stderr


def test_an_unknown_instruction_set_is_a_clear_error() -> None:
    result = python("import fused_sgd", FUSED_SGD_ISA="mmx")
    assert "ValueError: FUSED_SGD_ISA: unknown instruction set 'mmx'; compiled in are:" in result.stderr


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """A copy of the installed package, to break."""
    shutil.copytree(PACKAGE, tmp_path / "fused_sgd", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


TRAIN = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import fused_sgd
print(len(caught), *(w.message for w in caught))
import torch
p, q = (torch.ones(3, requires_grad=True) for _ in range(2))
p.grad, q.grad = torch.ones(3), torch.ones(3)
optimizer = fused_sgd.FusedSGD([p], lr=0.1, momentum=0.9)
reference = torch.optim.SGD([q], lr=0.1, momentum=0.9)
for _ in range(3):
    optimizer.step(); reference.step()
assert torch.equal(p, q)
print(optimizer.explain()[0].path)
try:
    fused_sgd.FusedSGD([p], fused=True)
except RuntimeError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("TORCH_VERSION", "it was built against torch 1.0.0 and torch"),
        ("PYTHON_SOABI", "it was built for 1.0.0 and this Python is"),
        ("module", "importing it failed"),
        ("info", "this installation was built without a compiler"),
    ],
)
def test_without_a_usable_module_the_reference_runs_and_one_warning_says_what_to_do(
    damaged: Path, damage: str, message: str
) -> None:
    info = damaged / "fused_sgd" / "_build_info.py"
    if damage == "info":
        info.unlink()
    elif damage == "module":
        for path in (damaged / "fused_sgd").glob("_C*"):
            path.write_bytes(b"not a library")
    else:
        info.write_text(re.sub(f'{damage} = ".*"', f'{damage} = "1.0.0"', info.read_text()))
    result = python(TRAIN, PYTHONPATH=str(damaged))
    assert result.returncode == 0, result.stderr
    warning, path, error = result.stdout.splitlines()
    assert warning.startswith("1 fused_sgd runs without its compiled module, on the slower reference path: ")
    assert message in warning
    assert "pip install --no-build-isolation" in warning
    assert path == "reference"
    assert error.startswith("`fused=True` needs the compiled module, and ")


def test_a_checkout_that_hides_the_installed_package_says_so() -> None:
    result = python("import fused_sgd; print(fused_sgd.__file__)", PYTHONPATH=str(ROOT))
    assert "is a source folder, which has no compiled module; it hides an installed one" in result.stderr


def test_without_a_compiler_the_installation_is_the_reference(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".git", ".venv*", "build", "runs", "*.egg-info"))
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "python").symlink_to(sys.executable)
    result = run(
        sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "--target",
        tmp_path / "site", source, PATH=str(tools), CXX="", FUSED_SGD_BUILD_DIR="",
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    result = python(TRAIN, PYTHONPATH=str(tmp_path / "site"))
    assert "this installation was built without a compiler" in result.stdout, result.stderr
