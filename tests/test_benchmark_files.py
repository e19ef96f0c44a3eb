"""Result files: older ones are read, broken ones refused; the report and the comparison say what the files say."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rich")
from benchmark_support import BENCHMARKS, benchmarks, command

RESULTS = BENCHMARKS / "results"
OLD = RESULTS / "step-cpu-20261123T171757Z-e0fdc98.json"


def changed(**fields: Any) -> str:
    return json.dumps({**json.loads(OLD.read_text()), **fields})


def test_the_committed_report_is_what_the_committed_files_give() -> None:
    done = command("report", "--check")
    assert done.returncode == 0, done.stderr


def test_the_report_and_its_plots(tmp_path: Path) -> None:
    image = pytest.importorskip("matplotlib.image")
    (tmp_path / OLD.name).write_bytes(OLD.read_bytes())
    assert command("report", f"--results={tmp_path}").returncode == 0
    text = (tmp_path / "REPORT.md").read_text()
    rows = [row for row in json.loads(OLD.read_text())["rows"] if (row["shapes"], row["threads"]) == ("resnet50", 2)]
    fused = next(row for row in rows if row["peer"] == "fused")["ratio_to_ours"]
    assert f"{fused['median']:.2f} ({fused['q1']:.2f}–{fused['q3']:.2f})" in text
    drawn = {path.name for path in (tmp_path / "plots").iterdir()}
    assert drawn == {line.split("plots/")[1][:-1] for line in text.splitlines() if line.startswith("![")}
    for name in drawn:  # an opaque card, so that it is readable on any page
        pixels = image.imread(tmp_path / "plots" / name)
        assert pixels.shape[2] == 3 or pixels[..., 3].min() == 1
    # The check sees a figure that was changed by hand.
    assert command("report", "--check", f"--results={tmp_path}").returncode == 0
    (tmp_path / "REPORT.md").write_text(text.replace("resnet50", "resnet51"))
    done = command("report", "--check", f"--results={tmp_path}")
    assert done.returncode == 1
    assert "is not what" in done.stderr


def test_older_files_are_read() -> None:
    run = benchmarks("files").read(OLD)
    assert run.benchmark == "step"
    assert {row["percent_of_copy"] for row in run.rows} == {None}
    assert {row["curve"] for row in run.rows} == {None}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"protocol": 1, "rows": [', "is no JSON"),
        ("[1, 2]", "is no result file: it names no protocol"),
        ('{"protocol": 99}', "is of protocol 99, and this program reads 1 to 2"),
        ('{"protocol": "2"}', "is of protocol 2, and this program reads 1 to 2"),
        ('{"protocol": 2, "rows": []}', "is no complete result file: it lacks benchmark, date"),
        (b"\xff\xfe\x00", "is no JSON"),
        (changed(dirty=None), "is no result file: dirty cannot be None"),
        (changed(date=None), "is no result file: date cannot be None"),
        (changed(device=None), "is no result file: device cannot be None"),
        (changed(device={"kind": "cpu", "cores": 2}), "is no result file: name cannot be None"),
        (changed(rows=[{"peer": "ours", "microseconds": "7"}]), "is no result file: its rows are not"),
    ],
)
@pytest.mark.parametrize("how", ["report", "compare"])
def test_bad_files(content: str | bytes, message: str, how: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    arguments = [f"--results={tmp_path}"] if how == "report" else [file, OLD]
    done = command(how, *arguments)
    assert done.returncode == 2
    assert f"bad.json: {message}" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["bad.json"]


def test_no_files(tmp_path: Path) -> None:
    done = command("report", f"--results={tmp_path}")
    assert (done.returncode, "there is no result file" in done.stderr) == (2, True)
    assert "cannot be read" in command("compare", tmp_path / "none.json", OLD).stderr


def changed(folder: Path, name: str, factor: float, **header: Any) -> Path:
    """The old file with every time multiplied."""
    content = json.loads(OLD.read_text())
    content.update(header)
    for row in content["rows"]:
        if row["microseconds"]:
            row["microseconds"] = {key: value * factor for key, value in row["microseconds"].items()}
    file = folder / name
    file.write_text(json.dumps(content))
    return file


def test_comparison_with_a_band_from_repeated_runs(tmp_path: Path) -> None:
    read, compare = benchmarks("files").read, benchmarks("compare")
    before = read(changed(tmp_path, "a.json", 1))
    again = read(changed(tmp_path, "b.json", 1.1))
    after = read(changed(tmp_path, "c.json", 0.5, commit="f" * 40))
    band, source = compare.noise_band(before, after, [again])
    assert band == pytest.approx(1.1)
    assert source.startswith("1 pairs of repeated runs")
    changes = compare.compare(before, after, band, all_peers=False)
    assert {change.key[-1] for change in changes} == {"ours"}
    assert {change.verdict for change in changes} == {"faster"}
    assert all(math.isclose(change.ratio, 0.5) for change in changes)
    assert {change.verdict for change in compare.compare(before, again, 1.2, False)} == {"within the noise"}
    assert {change.verdict for change in compare.compare(after, before, band, True)} == {"slower"}
    # What is asked about proves nothing of itself.
    assert "for want of repeated runs" in compare.noise_band(before, again, [])[1]


def test_comparison_of_tasks_and_storage_modes() -> None:
    """Rows that differ in their task alone, and rows of ours under the names of modes."""
    compare, files = benchmarks("compare"), benchmarks("files")

    def run(factor: float) -> Any:
        kinds = [("full", "ours", "ours"), ("lars", "ours", "ours"), ("lars", "peer", "torch"), (None, "ours", "split")]
        rows = [
            {"task": task, "shapes": "a", "role": role, "peer": peer, "microseconds": {"median": time * factor}}
            for time, (task, role, peer) in enumerate(kinds, 1)
        ]
        return files.Run(Path("a.json"), {}, rows)

    found = {(change.key[0], change.key[-1]): change.ratio for change in compare.compare(run(1), run(2), 1.1, False)}
    assert found == {("full", "ours"): 2, ("lars", "ours"): 2, (None, "split"): 2}


def test_comparison_on_the_command_line(tmp_path: Path) -> None:
    files = [changed(tmp_path, f"{index}.json", 1 + index / 10) for index in range(3)]
    done = command("compare", files[0], files[1], "--repeats", files[2])
    assert done.returncode == 0, done.stderr
    assert "Geometric mean 1.100" in done.stdout
    assert "pairs of repeated runs" in done.stdout
    other = changed(tmp_path, "other.json", 1, benchmark="curves")
    done = command("compare", files[0], other)
    assert (done.returncode, "nothing to compare" in done.stderr) == (2, True)
    done = command("compare", files[0], files[1], "--repeats", changed(tmp_path, "d.json", 1, commit="e" * 40))
    assert (done.returncode, "is a repeated run of neither" in done.stderr) == (2, True)


def test_straight_lines() -> None:
    fits = benchmarks("fits")
    line = fits.fit_line([1, 10, 100, 1000], [5 + 3 * x for x in (1, 10, 100, 1000)])
    assert (line.at_zero, line.slope) == (pytest.approx(5), pytest.approx(3))
    assert line.worst < 1e-9
    assert fits.fit_line([1, 2], [1, 2]) is None
    rows = [
        {
            "curve": curve,
            "x": count,
            "peer": "ours",
            "role": "ours",
            "clock": "wall",
            "status": "ok",
            "microseconds": {"median": 10 + 0.03 * count + 0.2 * max(0, count - 1000)},
            "working_set_bytes": 1,
        }
        for curve in ("tensors", "alone")
        for count in (1, 10, 100, 1000, 3000, 10_000)
    ]
    said = fits.sentences(rows, "wall", None)
    for few, many, how in zip(said[::2], said[1::2], ("alone", "in turn with others"), strict=True):
        assert few.startswith(f"ours, {how}: 30.0 ns per extra tensor up to 1000 (wall time, 4 points")
        assert many.startswith(f"ours, {how}: 230.0 ns per extra tensor beyond 1000 (wall time, 3 points")


def test_older_runs_complete_the_newest() -> None:
    files = benchmarks("files")

    def run(date: int, *shapes: str, quick: bool = False, vectors: str = "AVX2") -> Any:
        header = {
            "benchmark": "step",
            "device": {"kind": "cpu", "name": "a", "cores": 1},
            "torch_instruction_set": vectors,
            "torch": "2",
            "quick": quick,
            "date": str(date),
        }
        rows = [{"shapes": name, "dtype": "float32", "threads": 1, "date": date} for name in shapes]
        return files.Run(Path(f"{date}.json"), header, rows)

    runs = [
        run(1, "a", "b", "c"),
        run(2, "b", "d"),
        run(3, "e", quick=True),
        run(4, "a"),
        run(5, "f", vectors="AVX512"),
    ]
    found, other = files.completed(runs, "step")
    assert (found.machine, other.machine) == ("a (AVX2), 1 cores", "a (AVX512), 1 cores")
    assert [row["shapes"] for row in other.rows] == ["f"]
    assert {row["shapes"]: row["date"] for row in found.rows} == {"a": 4, "b": 2, "d": 2, "c": 1}
    completed_by = {file: list(names) for file, names in found.header["completed_by"].items()}
    assert completed_by == {"2.json": ["b · float32", "d · float32"], "1.json": ["c · float32"]}


def test_curves_and_training_run(tmp_path: Path) -> None:
    quick = ("--quick", "--device=cpu", "--threads=1", "--peers=ours,foreach,timm", f"--output={tmp_path}")
    done = command("curves", "--curves=groups", *quick)
    assert done.returncode == 0, done.stderr
    done = command("training", "--models=resnet18", *quick)
    assert done.returncode == 0, done.stderr
    found = {run.benchmark: run for run in benchmarks("files").read_folder(tmp_path)}
    groups = [(row["param_groups"], row["x"]) for row in found["curves"].rows if row["peer"] == "ours"]
    assert groups == [(1, 1), (30, 30), (1000, 1000)]
    ours = next(row for row in found["training"].rows if row["peer"] == "ours")
    assert 0 < ours["share_percent"]["median"] < 100
    assert ours["elements"] == 11_689_512  # as torchvision counts
    assert command("report", f"--results={tmp_path}").returncode == 0
    assert "whole step, times ours" in (tmp_path / "REPORT.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("curves", "--curves=tensor"), "unknown curve 'tensor'; choose from tensors, alone, threads, bytes, groups"),
        (("training", "--models=vgg"), "unknown model 'vgg'; choose from resnet18, gpt"),
        (("steps",), "invalid choice: 'steps'"),
    ],
)
def test_unknown_names(arguments: tuple[str, ...], message: str) -> None:
    done = command(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_breakdown_adds_up() -> None:
    breakdown, measuring = benchmarks("breakdown"), benchmarks("measure")
    shapes = benchmarks("shapes").ShapeSet("small", "", 20 * ((16,),), param_groups=4)
    parts = breakdown.break_down(shapes, measuring.Effort(min_rounds=3, max_rounds=3, seconds=0.1))
    assert len(parts) == len(breakdown.PARTS) + 2
    assert parts[0].median > 0
    # Each round adds up to the whole; with one round, so would the medians.
    one = breakdown._differences([[1.0, 1.0], [3.0, 3.0], [7.0, 7.0]])
    assert [part.median for part in one] == [1, 2, 4]
