"""The benchmark of steps: that it runs, what its file holds, and how it refuses. Not how fast anything is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("rich")
from benchmark_support import CHECKOUT, benchmarks, command

RIGHT = ("ours", "fused", "foreach", "loop", "nothing", "flat", "copy")
ROLES = {"ours": "ours", "nothing": "floor", "flat": "ceiling", "copy": "ceiling"}


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The file of a run over two small shape sets, of which one has a param group per tensor."""
    folder = tmp_path_factory.mktemp("results")
    sets = "--shapes=tiny161_groups,resnet20"
    done = command("step", "--quick", "--minutes=3", sets, "--device=cpu", "--threads=1", f"--output={folder}")
    assert done.returncode == 0, done.stderr
    assert "Summary" in done.stdout
    (file,) = folder.iterdir()
    assert str(file) in done.stdout
    assert benchmarks("files").read(file).rows  # what is written can be read
    return json.loads(file.read_text())


def test_header(result: dict[str, Any]) -> None:
    import fused_sgd
    from fused_sgd import _C

    assert result["protocol"] == 2
    assert result["benchmark"] == "step"
    assert result["torch"] == torch.__version__
    assert result["fused_sgd"] == {
        "version": fused_sgd.__version__,
        "instruction_set": _C.instruction_set(),
        "missing": None,
    }
    assert result["device"]["kind"] == "cpu"
    assert result["device"]["name"]
    assert result["threads"] == [1]
    assert result["clocks"] == ["wall"]
    assert result["quick"] is True
    assert result["left_out"] == []
    assert result["command"][:4] == ["python", "-m", "benchmarks", "step"]
    assert result["hyperparameters"]["momentum"] == 0.9
    assert {"commit", "dirty", "date", "compiler", "cuda", "python", "system", "load_average"} <= result.keys()
    # A second OpenMP runtime would disturb every figure.
    assert result["openmp_runtimes"] == 1


def test_one_row_for_each_peer_of_each_configuration(result: dict[str, Any]) -> None:
    found = [(row["shapes"], row["dtype"], row["threads"], row["peer"]) for row in result["rows"]]
    assert found == [
        (shapes, dtype, 1, peer)
        for dtype in ("float32", "bfloat16")
        for shapes in ("tiny161_groups", "resnet20")
        for peer in benchmarks("peers").PEERS
    ]


def test_rows(result: dict[str, Any]) -> None:
    for row in result["rows"]:
        assert row["role"] == ROLES.get(row["peer"], "peer")
        assert row["clock"] == "wall"
        item = {"float32": 4, "bfloat16": 2}[row["dtype"]]
        assert row["elements"] == {"tiny161_groups": 161 * 16, "resnet20": 272_474}[row["shapes"]]
        assert row["param_groups"] == {"tiny161_groups": 161, "resnet20": 1}[row["shapes"]]
        assert row["floor_bytes"] == 5 * item * row["elements"]
        if row["peer"] == "fused" and row["dtype"] == "bfloat16" and row["status"] == "wrong":
            continue  # torch 2.13
        if row["peer"] in RIGHT:
            assert row["status"] == "ok", row
        if row["status"] != "ok":
            continue
        time, ratio, percent = row["microseconds"], row["ratio_to_ours"], row["percent_of_ceiling"]
        assert 0 < time["q1"] <= time["median"] <= time["q3"]
        assert 0 < ratio["q1"] <= ratio["median"] <= ratio["q3"]
        assert row["rounds"] >= 3
        if row["role"] == "floor":
            assert percent is row["percent_of_copy"] is row["gb_per_second"] is None
        else:
            assert 0 < percent["q1"] <= percent["median"] <= percent["q3"]
            assert row["percent_of_copy"]["median"] > 0
            assert row["gb_per_second"] == pytest.approx(row["floor_bytes"] / time["median"] * 1e-3, rel=1e-3)
        same = {"ours": ratio, "flat": percent, "copy": row["percent_of_copy"]}.get(row["peer"])
        if same:
            assert same["median"] == {"ours": 1}.get(row["peer"], 100)


def test_footprints(result: dict[str, Any]) -> None:
    rows = {row["peer"]: row for row in result["rows"] if (row["shapes"], row["dtype"]) == ("resnet20", "float32")}
    assert rows["ours"]["operators"] == rows["ours"]["peak_extra_bytes"] == 0
    assert rows["loop"]["operators"] >= 3 * 65
    assert rows["ours"]["state_bytes_per_parameter"] == 4
    assert rows["flat"]["state_bytes_per_parameter"] is None


def test_a_peer_that_is_not_right_is_reported_and_never_timed(result: dict[str, Any]) -> None:
    for row in result["rows"]:
        if row["status"] != "ok":
            assert row["status"] in ("wrong", "skipped")
            assert "allowed" in row["reason"] if row["status"] == "wrong" else row["reason"]
            assert row["microseconds"] is row["ratio_to_ours"] is row["gb_per_second"] is None


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--shapes=resnet51", "unknown shape set 'resnet51'; choose from resnet50, vit_b16, gpt2,"),
        ("--dtypes=float32,int8", "unknown dtype 'int8'; choose from float32, bfloat16"),
        ("--threads=0", "unknown number of threads '0'; choose from 1"),
        ("--peers=ours,adam", "unknown peer 'adam'; choose from ours, fused, foreach, loop, compiled, optimi"),
        ("--minutes=0", "argument --minutes: must be above 0, got 0"),
        ("--device=tpu", "invalid choice: 'tpu'"),
        (f"--output={CHECKOUT / 'README.md'}", f"cannot write to {CHECKOUT / 'README.md'}"),
    ],
)
def test_bad_input(argument: str, message: str, tmp_path: Path) -> None:
    done = command("step", f"--output={tmp_path}", argument)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("end", [KeyboardInterrupt, SystemExit])
def test_a_run_that_is_ended_leaves_what_it_found(
    end: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever ends it: the file of the cases before is there, and names the others. Only an interruption is told."""
    runner = benchmarks("runner")
    whole, begun = runner.run_case, []

    def run_case(case: Any, *rest: Any) -> Any:
        begun.append(case)
        if len(begun) == 2:
            raise end
        yield from whole(case, *rest)

    monkeypatch.setattr(runner, "run_case", run_case)
    shapes, peers = "--shapes=tiny161,resnet20,tiny161_groups", "--peers=ours,nothing"
    arguments = ["step", "--quick", shapes, peers, "--dtypes=float32", "--device=cpu", "--threads=1"]
    main = benchmarks("commands").main
    if end is KeyboardInterrupt:
        assert main([*arguments, f"--output={tmp_path}"]) == 130
    else:
        with pytest.raises(end):
            main([*arguments, f"--output={tmp_path}"])
    (file,) = tmp_path.iterdir()
    result = json.loads(file.read_text())
    assert {row["shapes"] for row in result["rows"]} == {"tiny161"}
    assert [name.split()[0] for name in result["left_out"]] == ["resnet20", "tiny161_groups"]
    assert ("interrupted" in result["left_out"][0]) == (end is KeyboardInterrupt)


def test_no_device_is_a_message(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    done = command("step", f"--output={tmp_path}", "--device=cuda")
    assert (done.returncode, done.stdout) == (2, "")
    assert "argument --device: torch finds no CUDA device here" in done.stderr


def test_help_names_every_command() -> None:
    commands = benchmarks("commands")
    done = command("--help")
    assert done.returncode == 0
    for name in commands.COMMANDS:
        assert commands.load(name).HELP.split()[0] in done.stdout
        assert f"\n    {name}" in done.stdout


def test_wrong_and_broken_peers_are_told_apart() -> None:
    verify, base = benchmarks("verify"), benchmarks("peers.base")
    work = benchmarks("workload").make_workload(
        benchmarks("shapes").ShapeSet("small", "", ((5,), (3, 4))), torch.float32
    )
    expected = verify.sgd_in_float64(work, decoupled=False)

    def peer(step_of: Any) -> Any:
        def set_up(work: Any, lr: float) -> Any:
            params = work.fresh_params()
            return base.Contender(lambda: step_of(params), params)

        return base.Peer("test", set_up)

    def raises(params: Any) -> None:
        raise ValueError("no")

    def cannot(work: Any, lr: float) -> Any:
        raise base.CannotRun("not here")

    def scribbles(params: Any) -> None:
        params[0].grad.zero_()

    assert verify.check_peer(peer(lambda params: None), work, expected).status == "wrong"
    failed = verify.check_peer(peer(raises), work, expected)
    assert (failed.status, failed.reason) == ("failed", "ValueError: no")
    skipped = verify.check_peer(base.Peer("test", cannot), work, expected)
    assert (skipped.status, skipped.reason) == ("skipped", "not here")
    assert verify.check_peer(peer(scribbles), work.with_own_grads(), expected).writes_gradients
