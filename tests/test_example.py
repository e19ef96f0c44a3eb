"""The example as a user runs it: a process of its own, judged by what it prints, draws and returns."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

Image, ImageDraw = pytest.importorskip("PIL.Image"), pytest.importorskip("PIL.ImageDraw")
for module in ("matplotlib", "rich", "sklearn"):
    pytest.importorskip(module)

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "train.py"
STUDY = SCRIPT.with_name("large_batch.py")
PRECISION_STUDY = SCRIPT.with_name("precision.py")
PRECISIONS = ("bfloat16", "bfloat16-split", "bfloat16-master", "bfloat16-stochastic")
EQUAL = "weights equal to the bit: yes"
TINY = ("--width", "4", "--epochs", "2", "--batch-size", "96")


def run_example(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    # One thread: threads that wait for each other are very slow where tests share the cores.
    return run_script(folder, SCRIPT, "--threads", "1", "--output", str(folder / "out" / "demo.png"), *options)


def run_script(folder: Path, script: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, script, *options]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8", "COLUMNS": "100", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, encoding="utf-8", timeout=300)


def assert_trained(
    result: subprocess.CompletedProcess[str], folder: Path, weights: str = EQUAL, optimizer: str = "FusedSGD"
) -> None:
    assert result.returncode == 0, result.stdout + result.stderr
    assert any(line.startswith(weights) for line in result.stdout.splitlines()), result.stdout
    for name in ("torch fused", "torch foreach", "torch for-loop", optimizer):
        assert name in result.stdout
    assert (folder / "out" / "demo.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def accuracies(result: subprocess.CompletedProcess[str]) -> list[float]:
    return [float(word[:-1]) for word in result.stdout.split() if word.endswith("%")]


def losses(result: subprocess.CompletedProcess[str]) -> list[str]:
    return re.findall(r"\d\.\d{6}", result.stdout)


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
    assert len(accuracies(result)) == 2
    assert min(accuracies(result)) > 90


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
    "options",
    [
        ("--accumulate", "3"),  # no power of two: both sides divide the summed gradients, and not the loss
        ("--clip", "1e9"),  # never reached: the coefficient is 1 on both sides
        ("--accumulate", "2", "--amp", "--clip", "1e9", "--ema", "0.9"),
    ],
)
def test_options_that_keep_the_bits(tmp_path, options):
    assert_trained(run_example(tmp_path, *TINY, *options), tmp_path)


def test_warmup_changes_the_schedule(tmp_path):
    none, long = (run_example(tmp_path, *TINY, "--warmup-epochs", epochs) for epochs in ("0", "1.5"))
    assert_trained(none, tmp_path)
    assert_trained(long, tmp_path)
    assert losses(none) != losses(long)


def test_clip_is_close_to_torch(tmp_path):
    result = run_example(tmp_path, *TINY, "--clip", "0.05", "--lr", "0.01")
    assert_trained(result, tmp_path, "weights equal to the bit: ")
    difference = re.search(r"the largest difference is (\S+) of", result.stdout)
    assert difference is None or float(difference[1]) < 1e-3
    unclipped = run_example(tmp_path, *TINY, "--lr", "0.01")
    assert losses(unclipped) != losses(result)


def test_ema_is_tested_too(tmp_path):
    result = run_example(tmp_path, *TINY, "--ema", "0.9")
    assert_trained(result, tmp_path)
    assert "averaged weights" in result.stdout
    torchs, averaged_by_torch, ours, averaged_by_us = accuracies(result)
    assert torchs == ours
    assert abs(averaged_by_torch - averaged_by_us) < 1


@pytest.mark.parametrize(
    "options", [(), ("--amp", "--accumulate", "2", "--clip", "5", "--ema", "0.9", "--sgd-lr", "0.2")]
)
def test_lars_beside_sgd(tmp_path, options):
    result = run_example(tmp_path, *TINY, "--optimizer", "lars", *options)
    assert_trained(result, tmp_path, "weights equal to the bit: not compared", "FusedLARS")
    assert "FusedSGD" not in result.stdout


@pytest.mark.parametrize("precision", PRECISIONS)
def test_precision_beside_float32(tmp_path, precision):
    result = run_example(tmp_path, "--width", "8", "--epochs", "4", "--batch-size", "64", "--precision", precision)
    assert_trained(result, tmp_path, "weights equal to the bit: not compared, FusedSGD trains bfloat16 weights")
    torchs, ours = accuracies(result)
    assert min(torchs, ours) > 80
    assert abs(torchs - ours) < 8


def test_split_trains_as_float32_masters_do(tmp_path):
    split, master = (run_example(tmp_path, *TINY, "--precision", f"bfloat16-{how}") for how in ("split", "master"))
    assert losses(split) == losses(master)


def test_float32_peer_does_not_depend_on_the_precision(tmp_path):
    plain, narrow = (run_example(tmp_path, *TINY, "--precision", precision) for precision in ("float32", "bfloat16"))
    assert losses(plain)[0] == losses(narrow)[0]
    assert losses(plain)[1] != losses(narrow)[1]


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        (("--momentum-dtype", "float32"), EQUAL),
        (("--momentum-dtype", "int8"), "weights equal to the bit: not compared, FusedSGD's momentum is int8"),
        (("--momentum-dtype", "bfloat16"), "weights equal to the bit: not compared, FusedSGD's momentum is bfloat16"),
    ],
)
def test_momentum_dtype(tmp_path, options, weights):
    assert_trained(run_example(tmp_path, "--width", "16", "--epochs", "1", *options), tmp_path, weights)


@pytest.mark.parametrize("optimizer", ["sgd", "lars"])
def test_precision_with_everything_around_the_step(tmp_path, optimizer):
    options = ("--precision", "bfloat16-split", "--momentum-dtype", "float16", "--accumulate", "2", "--clip", "1")
    result = run_example(tmp_path, *TINY, *options, "--ema", "0.9", "--optimizer", optimizer)
    assert_trained(result, tmp_path, "weights equal to the bit: not compared", optimizer="Fused")
    assert len(accuracies(result)) == 4


def test_study_of_precisions(tmp_path):
    guide = tmp_path / "guide.md"
    guide.write_text("before\n<!-- measured -->\nold\n<!-- end -->\nafter\n")
    options = ("--width", "2", "--epochs", "1", "--steps", "2", "--seeds", "2", "--guide", str(guide))
    result = run_script(tmp_path, PRECISION_STUDY, *options)
    assert result.returncode == 0, result.stdout + result.stderr
    text = guide.read_text(encoding="utf-8")
    assert text.startswith("before\n<!-- measured -->\n")
    assert text.endswith("<!-- end -->\nafter\n")
    assert "| split, int8 momentum | 2 | 3.062 | 5.062 |" in text
    assert guide.with_suffix(".png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    found = json.loads(guide.with_suffix(".json").read_text())
    assert len(found["runs"]) == 2 * 2 * 11
    # What the names promise: both keep the same float32 weights.
    by_mode = {(run["task"], run["mode"], run["seed"]): run["train_losses"] for run in found["runs"]}
    for task in ("digits", "characters"):
        assert by_mode[task, "split", 0] == by_mode[task, "float32 master", 0]
        assert by_mode[task, "split", 0] != by_mode[task, "split", 1]
        assert by_mode[task, "float32, rounded start", 0] != by_mode[task, "float32", 0]
    guide.with_suffix(".png").unlink()
    again = run_script(tmp_path, PRECISION_STUDY, "--redraw", "--guide", str(guide))
    assert again.returncode == 0, again.stdout + again.stderr
    assert guide.read_text(encoding="utf-8") == text
    assert guide.with_suffix(".png").exists()


def test_study_of_precisions_without_its_numbers(tmp_path):
    (tmp_path / "guide.md").write_text("<!-- measured -->\n<!-- end -->\n")
    result = run_script(tmp_path, PRECISION_STUDY, "--redraw", "--guide", "guide.md")
    assert result.returncode == 2
    assert "--redraw: guide.json cannot be read" in " ".join(result.stderr.split())


def test_study_of_batch_sizes(tmp_path):
    guide = tmp_path / "guide.md"
    guide.write_text("before\n<!-- measured -->\nold\n<!-- end -->\nafter\n")
    options = ("--width", "2", "--epochs", "1", "--seeds", "2", "--batch-sizes", "1024", "--guide", str(guide))
    result = run_script(tmp_path, STUDY, *options)
    assert result.returncode == 0, result.stdout + result.stderr
    text = guide.read_text(encoding="utf-8")
    assert text.startswith("before\n<!-- measured -->\n")
    assert text.endswith("<!-- end -->\nafter\n")
    assert "old" not in text
    assert "| 1024 | 1 |" in text
    assert guide.with_suffix(".png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@pytest.mark.parametrize("study", [STUDY, PRECISION_STUDY])
@pytest.mark.parametrize("text", [None, "no place for tables"])
def test_study_without_a_guide(tmp_path, study, text):
    if text is not None:
        (tmp_path / "guide.md").write_text(text)
    result = run_script(tmp_path, study, "--guide", "guide.md")
    assert result.returncode == 2
    assert "--guide: guide.md is no text with the lines <!-- measured -->" in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--data", "nowhere"), "nowhere is neither 'digits' nor a folder"),
        (("--data", "empty"), "empty holds 0 class folders"),
        (("--data", "hollow"), "holds no image"),
        (("--data", "broken"), "cannot be read as an image"),
        (("--device", "cuda"), "finds no usable GPU"),
        (("--epochs", "0"), "0 is not a finite int of at least 1"),
        (("--optimizer", "adam"), "--optimizer: invalid choice: 'adam'"),
        (("--optimizer", "lars", "--weight-decay", "0"), "--weight-decay must be above 0"),
        (("--sgd-lr", "1"), "--sgd-lr is for --optimizer lars"),
        (("--accumulate", "0"), "--accumulate: 0 is not a finite int of at least 1"),
        (("--accumulate", "3"), "a batch of 128 images has no 3 equal parts"),
        (("--accumulate", "4096"), "a batch of 128 images has no 4096 equal parts"),
        (("--batch-size", "0"), "--batch-size: 0 is not a finite int of at least 1"),
        (("--warmup-epochs", "-1"), "--warmup-epochs: -1 is not a finite float of at least 0"),
        (("--warmup-epochs", "20"), "--warmup-epochs 20 leaves nothing of --epochs 20"),
        (("--clip", "0"), "--clip: 0 is not a finite float above 0"),
        (("--clip", "nan"), "--clip: nan is not a finite float above 0"),
        (("--precision", "float8"), "--precision: invalid choice: 'float8'"),
        (("--precision", "bfloat16-split", "--amp"), "--amp is for float32 weights"),
        (("--momentum-dtype", "int4"), "--momentum-dtype: invalid choice: 'int4'"),
        (("--momentum-dtype", "int8", "--momentum", "0"), "a momentum that --momentum 0 does not have"),
        (("--ema", "1"), "--ema: 1 is not a finite float of at least 0 and below 1"),
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
