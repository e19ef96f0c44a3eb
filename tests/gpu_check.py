"""What only hardware can show: builds on a machine with an NVIDIA GPU, and checks and measures there.

    make gpu-check                                 everything
    make gpu-check STAGES=build,tests OUT=/tmp/x   some of it; the JSON, the log and what failed go to $OUT
    make gpu-check DEVICES=cuda                    without the tests that run on the CPU alone
    python3 tests/gpu_check.py --help              the stages, and what else can be chosen

It runs with the machine's own python3 and torch (2.11 or later, built with CUDA), offline, and installs nothing: the
package is built into a folder of its own, for the architecture of the GPU. All stages run, whatever becomes of the
others; the exit status is 1 if any failed.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from gpu_stages import Stage, count, table

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "gpu-check"
SITE = WORK / "site"  # where the package is built into
RESULTS = WORK / "benchmark"

# The benchmarks, from a folder where both `fused_sgd` (built) and the checkout can be imported.
BENCHMARKS = (
    ("step", "--quick"),
    ("around", "--quick", "--shapes=resnet50,one100m"),
    ("precision", "--quick", "--shapes=one100m,resnet50"),
    ("training", "--quick"),
)

MODULES = ("torch", "pytest", "hypothesis", "numpy")
OPTIONAL_MODULES = ("xdist", "expecttest", "rich", "sklearn", "matplotlib")
TOOLS = ("cmake", "ninja", "c++", "nvcc", "compute-sanitizer", "nvidia-smi")
OLDEST_TORCH = (2, 11)
TAIL = 40  # lines of a failed stage's output to show


class StageError(Exception):
    """A stage failed, and this is why."""


class Check:
    """One run: what was asked for, the log, and what the stages found."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.archs: str = arguments.archs
        self.devices: str = arguments.devices
        self.limit: float = arguments.limit
        self.out: Path = arguments.out
        self.out.mkdir(parents=True, exist_ok=True)
        WORK.mkdir(parents=True, exist_ok=True)
        self.log = self.out / "gpu-check.log"
        self.log.write_bytes(b"")
        self.stages = [Stage(name) for name in arguments.stages]
        self.machine: dict[str, Any] = {}
        self.date = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")

    def run(self) -> int:
        for stage in self.stages:
            print(f"{stage.name} …", flush=True)
            self.say(f"\n===== {stage.name} =====")
            start, position = time.monotonic(), self.log.stat().st_size
            try:
                stage.summary = STAGES[stage.name](self, stage.details)
                stage.status = "passed"
            except StageError as error:
                stage.status, stage.summary = "FAILED", str(error)
            except Exception as error:  # of this script: the other stages run nevertheless
                stage.status, stage.summary = "FAILED", f"{type(error).__name__}: {error}"
            stage.seconds = round(time.monotonic() - start, 1)
            if stage.status == "FAILED":
                print(
                    "".join(f"    {line}\n" for line in self.said_since(position).splitlines()[-TAIL:]),
                    end="",
                    flush=True,
                )
            self.write_json()  # after each stage: a machine's time may end at any moment
        self.say(f"\n{table(self.stages)}")
        failed = [stage.name for stage in self.stages if stage.status != "passed"]
        print(f"\n{table(self.stages)}\n\n{self.out / 'gpu-check.json'}\n{self.log}")
        return 1 if failed else 0

    def say(self, text: str) -> None:
        with self.log.open("a", encoding="utf-8") as log:
            log.write(f"{text}\n")

    def said_since(self, position: int) -> str:
        return self.log.read_bytes()[position:].decode(errors="replace")

    def call(self, *command: object, environment: dict[str, str] | None = None, cwd: Path = WORK) -> int:
        """Runs a command, its output into the log; returns its exit status."""
        words = [str(word) for word in command]
        env = {**environ(), **(environment or {})}
        self.say(f"$ {' '.join(words)}")
        if shutil.which(words[0], path=env["PATH"]) is None:
            raise StageError(f"{words[0]} is missing")
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                words, stdout=log, stderr=subprocess.STDOUT, cwd=cwd, env=env, start_new_session=True
            )
        try:
            return process.wait(self.limit)
        except subprocess.TimeoutExpired:
            raise StageError(f"stopped after {self.limit:.0f} s: {words[0]}") from None
        finally:
            if process.poll() is None:  # also when this script is interrupted
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def write_json(self) -> None:
        result = {
            "protocol": 1,
            "date": self.date,
            "commit": commit(),
            "machine": self.machine,
            "stages": [dataclasses.asdict(stage) for stage in self.stages],
        }
        (self.out / "gpu-check.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def commit() -> str:
    """The commit that is checked, or what $COMMIT says where the sources came without a repository."""
    if given := os.environ.get("COMMIT"):
        return given
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def environ() -> dict[str, str]:
    """Of every command: tools beside this Python and of an nvcc that is not on the PATH, and the built package."""
    folders = [str(Path(sys.executable).parent), *os.environ.get("PATH", "").split(os.pathsep)]
    folders += [os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin"]
    return {**os.environ, "PATH": os.pathsep.join(folders), "PYTHONPATH": str(SITE), "PYTHONUNBUFFERED": "1"}


def which(tool: str) -> str | None:
    return shutil.which(tool, path=environ()["PATH"])


def first_line(*command: str, matching: str = "") -> str:
    """The first line of what a command says, or the first that matches."""
    if (tool := which(command[0])) is None:
        return "missing"
    try:
        said = subprocess.run([tool, *command[1:]], capture_output=True, text=True, timeout=60, env=environ())
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"unusable: {error}"
    lines = [line.strip() for line in (said.stdout + said.stderr).splitlines() if re.search(matching, line)]
    return lines[0] if lines else "unknown"


# --- The stages: each returns a summary, or raises StageError ---------------------------------------------------------


def look(check: Check, details: dict[str, Any]) -> str:
    """Names what is missing, and describes the machine."""
    missing = [name for name in MODULES if importlib.util.find_spec(name) is None]
    missing += [tool for tool in TOOLS if which(tool) is None]
    absent = [name for name in OPTIONAL_MODULES if importlib.util.find_spec(name) is None]
    versions = {}
    for name in (*MODULES, *OPTIONAL_MODULES):
        try:
            versions[name] = importlib.metadata.version(
                {"xdist": "pytest-xdist", "sklearn": "scikit-learn"}.get(name, name)
            )
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "missing"
    check.machine.update(
        python=sys.version.split()[0],
        packages=versions,
        cmake=first_line("cmake", "--version"),
        compiler=first_line("c++", "--version"),
        nvcc=first_line("nvcc", "--version", matching="release"),
        sanitizer=first_line("compute-sanitizer", "--version", matching="ersion"),
        driver=first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
    )
    details.update(missing=missing, absent=absent)
    for what, version in check.machine.items():
        check.say(f"{what}: {version}")
    problems = [f"missing: {', '.join(missing)}"] if missing else []
    if "torch" not in missing:
        problems += look_at_torch(check)
    if problems:
        raise StageError("; ".join(problems))
    without = f"; without {', '.join(absent)}, what needs them is skipped" if absent else ""
    return f"{', '.join(check.machine['gpus'])}, torch {check.machine['torch']}{without}"


def look_at_torch(check: Check) -> list[str]:
    import torch

    check.machine.update(torch=torch.__version__, torch_cuda=torch.version.cuda)
    problems = []
    if tuple(int(number) for number in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
        problems.append(f"torch {torch.__version__} is older than {'.'.join(map(str, OLDEST_TORCH))}")
    if not torch.cuda.is_available():
        return [*problems, f"torch {torch.__version__} sees no GPU"]
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    check.machine.update(
        gpus=[gpu.name for gpu in gpus],
        capability=f"{gpus[0].major}.{gpus[0].minor}",
        memory_bytes=gpus[0].total_memory,
        multiprocessors=gpus[0].multi_processor_count,
    )
    check.archs = check.archs or f"{gpus[0].major}{gpus[0].minor}"
    return problems


def build(check: Check, details: dict[str, Any]) -> str:
    """Builds the package into SITE, as setup.py would, but without pip."""
    if not check.archs and not check.machine:
        look_at_torch(check)
    if not check.archs:
        raise StageError("no GPU, so no architecture to build for; --archs gives one")
    package = SITE / "fused_sgd"
    shutil.rmtree(SITE, ignore_errors=True)
    shutil.copytree(
        ROOT / "fused_sgd", package, ignore=shutil.ignore_patterns("__pycache__", "_C.*.so", "_build_info.py")
    )
    # The environment is stronger than -D, and make sets it.
    environment = {"FUSED_SGD_CUDA": "1", "FUSED_SGD_CUDA_ARCHS": check.archs}
    options = [f"-DPython_EXECUTABLE={sys.executable}", "-DCMAKE_BUILD_TYPE=Release"]
    cmake = which("cmake") or "cmake"
    for command in (
        [cmake, "-S", ROOT, "-B", WORK / "cmake", "-G", "Ninja", *options],
        [cmake, "--build", WORK / "cmake"],
        [cmake, "--install", WORK / "cmake", "--prefix", package],
    ):
        if check.call(*command, environment=environment) != 0:
            raise StageError(f"{' '.join(map(str, command[:2]))} … failed")
    details["archs"] = check.archs
    return f"for {check.archs}"


def self_test(check: Check, details: dict[str, Any]) -> str:
    """`python -m fused_sgd`, which tests every GPU."""
    require_build()
    if check.call(sys.executable, "-m", "fused_sgd") != 0:
        raise StageError("python -m fused_sgd failed")
    return "equal to the reference to the bit"


def tests(check: Check, details: dict[str, Any]) -> str:
    """The whole suite, on the CPU and on the GPU; then the tests that need the GPU for themselves."""
    require_build()
    parallel = ["-n", str(min(os.cpu_count() or 1, 16))] if importlib.util.find_spec("xdist") else []
    suite = ROOT / "tests"
    threads = {"OMP_NUM_THREADS": "2"} if parallel else {}  # for each of the workers
    where = [f"--devices={check.devices}"] if check.devices else []
    if check.devices == "cuda":
        where += ["-k", "cuda"]  # in tests' names: their folder, or the device among their parameters
    first, details["together"], _ = pytest(
        check, "together", *parallel, *where, "--ignore", suite / "integrations", suite, environment=threads
    )
    second, details["alone"], _ = pytest(check, "alone", "-m", "exclusive", suite / "cuda")
    counts = {key: sum(run[key] for run in details.values()) for key in ("passed", "on_cuda", "failed", "skipped")}
    summary = "{passed} passed, {on_cuda} of them on CUDA; {failed} failed, {skipped} skipped".format(**counts)
    if first or second:
        raise StageError(summary)
    if counts["on_cuda"] == 0:
        raise StageError(f"{summary}: no test ran on a GPU")
    return summary


def sanitizer(tool: str) -> Callable[[Check, dict[str, Any]], str]:
    """The stage that runs the reduced set under one of compute-sanitizer's tools."""

    def run(check: Check, details: dict[str, Any]) -> str:
        require_build()
        # Errors that calls of the API return are torch's affair: it asks for what may not be there.
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "86", "--report-api-errors", "no"]
        # Every tensor gets memory of its own, so that leaving it shows.
        environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        status, details["tests"], text = pytest(
            check, tool, "-m", "sanitizer", ROOT / "tests" / "cuda", prefix=command, environment=environment
        )
        details["summary"] = re.findall(r"[A-Z]+ SUMMARY: .*", text)
        counts = details["tests"]
        found = f"{counts['passed']} tests passed, {counts['failed']} failed, {counts['skipped']} skipped"
        found = "; ".join([found, *details["summary"]])
        clean = all("SUMMARY: 0 " in line for line in details["summary"]) and details["summary"]
        if status or counts["passed"] == 0 or counts["skipped"] or not clean:
            raise StageError(found)
        return found

    return run


def benchmark(check: Check, details: dict[str, Any]) -> str:
    """The speed of one step: beside other implementations, with what surrounds it, in each storage mode, in training.

    The files are kept in the JSON.
    """
    require_build()
    shutil.rmtree(RESULTS, ignore_errors=True)
    RESULTS.mkdir(parents=True)
    ended = {}
    for command in BENCHMARKS:
        arguments = ("-m", "benchmarks", *command, f"--output={RESULTS}")
        status = check.call(sys.executable, *arguments, environment={"PYTHONPATH": f"{SITE}{os.pathsep}{ROOT}"})
        if status != 0:
            ended[command[0]] = status
    details["files"] = {path.name: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    if ended:
        raise StageError(", ".join(f"{name} ended with {status}" for name, status in ended.items()))
    if len(details["files"]) < len(BENCHMARKS):
        raise StageError(f"{len(details['files'])} files were written, of {len(BENCHMARKS)}")
    return ", ".join(details["files"])


def require_build() -> None:
    if not any((SITE / "fused_sgd").glob("_C.*.so")):
        raise StageError("nothing was built; the stage `build` comes first")


def pytest(
    check: Check,
    name: str,
    *arguments: object,
    prefix: Sequence[str] = (),
    environment: dict[str, str] | None = None,
) -> tuple[int, dict[str, Any], str]:
    """Runs tests; returns pytest's exit status, what became of the tests, and what was printed."""
    report = WORK / f"{name}.xml"
    report.unlink(missing_ok=True)
    position = check.log.stat().st_size
    # From another folder, since `python -m` puts its own on the path; and other versions may have other warnings.
    environment = {**(environment or {}), "FAILURES": str(check.out / "failures.txt")}
    status = check.call(
        *prefix, sys.executable, "-m", "pytest", f"--rootdir={ROOT}", f"--config-file={ROOT / 'pyproject.toml'}",
        "-p", "no:cacheprovider", "-W", "default", f"--junitxml={report}", *arguments, environment=environment,
    )  # fmt: skip
    return status, count(report), check.said_since(position)


STAGES: dict[str, Callable[[Check, dict[str, Any]], str]] = {
    "look": look,
    "build": build,
    "selftest": self_test,
    "tests": tests,
    "memcheck": sanitizer("memcheck"),
    "racecheck": sanitizer("racecheck"),
    "initcheck": sanitizer("initcheck"),
    "benchmark": benchmark,
}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    def stages(text: str) -> list[str]:
        names = [name for name in text.split(",") if name] or list(STAGES)
        if unknown := [name for name in names if name not in STAGES]:
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; there are {', '.join(STAGES)}")
        return [name for name in STAGES if name in names or name == "look"]  # `look` always comes first

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=stages, default="", help=f"some of {','.join(STAGES)}; `look` always runs")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu-check", help="where the JSON and the log go")
    parser.add_argument("--devices", default="", help="where tests run: cpu,cuda by default")
    parser.add_argument("--archs", default="", help="compute capabilities to build for, as in 90; default: the GPU's")
    parser.add_argument("--limit", type=float, default=1800, help="seconds that one command of a stage may take")
    arguments = parser.parse_args(argv)
    arguments.out = arguments.out.resolve()
    return arguments


if __name__ == "__main__":
    sys.exit(Check(parse(None)).run())
