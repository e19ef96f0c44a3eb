"""The example as a user runs it: a process of its own, judged by what it prints, draws and returns."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

Image, ImageDraw = pytest.importorskip("PIL.Image"), pytest.importorskip("PIL.ImageDraw")
for module in ("matplotlib", "rich", "sklearn"):
    pytest.importorskip(module)

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "train.py"
EQUAL = "weights equal to the bit: yes"


def run_example(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    # One thread: threads that wait for each other are very slow where tests share the cores.
    command = [sys.executable, SCRIPT, "--threads", "1", "--output", folder / "out" / "demo.png", *options]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8", "COLUMNS": "100", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, encoding="utf-8", timeout=300)


def assert_trained(result: subprocess.CompletedProcess[str], folder: Path) -> None:
    assert result.returncode == 0, result.stdout + result.stderr
    assert EQUAL in result.stdout.splitlines()
    for name in ("torch fused", "torch foreach", "torch for-loop", "FusedSGD"):
        assert name in result.stdout
    assert (folder / "out" / "demo.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def make_images(root: Path, per_class: int, mode: str = "RGB") -> None:
    """Bars that stand or lie, at different places, and not square."""
    for name in ("lying", "standing"):
        (root / name).mkdir(parents=True)
        for number in range(per_class):
            image = Image.new(mode, (20, 24))
            box = (number, 0, number + 3, 23) if name == "standing" else (0, number, 19, number + 3)
            ImageDraw.Draw(image).rectangle(box, fill="white")
            image.save(root / name / f"{number}.png")


def test_digits(tmp_path):
    result = run_example(tmp_path, "--epochs", "4", "--batch-size", "64")
    assert_trained(result, tmp_path)
    accuracies = [float(word[:-1]) for word in result.stdout.split() if word.endswith("%")]
    assert len(accuracies) == 2
    assert min(accuracies) > 90


def test_amp(tmp_path):
    result = run_example(tmp_path, "--epochs", "1", "--amp")
    assert_trained(result, tmp_path)  # the scale is a power of two: unscaling is exact


def test_folder_with_a_test_set(tmp_path):
    make_images(tmp_path / "bars" / "train", per_class=12)
    make_images(tmp_path / "bars" / "val", per_class=3)
    options = ("--data", "bars", "--image-size", "16", "--epochs", "2", "--batch-size", "8")
    assert_trained(run_example(tmp_path, *options), tmp_path)


def test_folder_to_be_split_in_grey_without_momentum(tmp_path):
    make_images(tmp_path / "bars", per_class=12, mode="L")
    options = ("--data", "bars", "--color", "grey", "--image-size", "8", "--epochs", "1", "--momentum", "0")
    assert_trained(run_example(tmp_path, *options), tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--data", "nowhere"), "nowhere is neither 'digits' nor a folder"),
        (("--data", "empty"), "empty holds 0 class folders"),
        (("--data", "hollow"), "holds no image"),
        (("--data", "broken"), "cannot be read as an image"),
        (("--device", "cuda"), "finds no usable GPU"),
        (("--epochs", "0"), "0 is not a finite int of at least 1"),
    ],
)
def test_bad_input(tmp_path, options, message):
    (tmp_path / "empty").mkdir()
    for label in ("a", "b"):
        (tmp_path / "hollow" / label).mkdir(parents=True)
        (tmp_path / "broken" / label).mkdir(parents=True)
        for number in range(3):
            (tmp_path / "broken" / label / f"{number}.png").write_text("not an image")
    result = run_example(tmp_path, *options)
    assert result.returncode == 2
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
