"""Sharded parameters: FSDP2 (DTensor), distributed checkpoints and ZeRO, in two processes on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

PREAMBLE = """
    import copy, os, sys, torch, torch.distributed as dist
    from torch import nn
    from fused_sgd import FusedSGD
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=int(sys.argv[2]), world_size=2)
    OPTIONS = dict(lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True)

    def train(model, optimizer, steps, start=0):
        for step in range(start, start + steps):
            torch.manual_seed(step)
            optimizer.zero_grad()
            model(torch.randn(4, 5)).pow(2).sum().backward()
            optimizer.step()
"""


def run_two(tmp_path: Path, code: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(PREAMBLE) + textwrap.dedent(code) + "\ndist.destroy_process_group()\n")
    env = {**os.environ, "PYTHONWARNINGS": "ignore"}
    processes = [
        subprocess.Popen(
            [sys.executable, script, tmp_path / "store", str(rank)], stderr=subprocess.PIPE, text=True, cwd="/", env=env
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=240)[1] for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(errors)


def test_fsdp2(tmp_path: Path) -> None:
    """torch's fused SGD has no sharding strategy for a DTensor (2.15.0). 7 rows over 2 ranks: uneven shards."""
    run_two(
        tmp_path,
        """
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, init_device_mesh
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    def make():
        torch.manual_seed(7)
        model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1))
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        return model

    mine, theirs = make(), make()
    a = FusedSGD(mine.parameters(), **OPTIONS, fused=True)
    b = torch.optim.SGD(theirs.parameters(), **OPTIONS, foreach=False)
    train(mine, a, 3), train(theirs, b, 3)
    assert {row.path for row in a.explain()} == {"kernel"}, a.explain()
    for p, q in zip(mine.parameters(), theirs.parameters()):
        assert type(p.data) is DTensor
        assert torch.equal(p.to_local(), q.to_local())
        buffer = a.state[p]["momentum_buffer"]
        assert type(buffer) is DTensor and buffer.placements == p.placements
        assert torch.equal(buffer.to_local(), b.state[q]["momentum_buffer"].to_local())
        assert p._version > 0

    # a checkpoint by name, loaded into a fresh optimizer
    saved = get_optimizer_state_dict(mine, a)
    again = FusedSGD(mine.parameters(), **OPTIONS, fused=True)
    set_optimizer_state_dict(mine, again, saved)
    train(mine, again, 2, 3), train(theirs, b, 2, 3)
    for p, q in zip(mine.parameters(), theirs.parameters()):
        assert torch.equal(p.to_local(), q.to_local())
    """,
    )


def test_dtensors_of_other_placements_take_the_reference(tmp_path: Path) -> None:
    run_two(
        tmp_path,
        """
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh
    mesh = init_device_mesh("cpu", (2,))
    p = nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)]))
    p.grad = distribute_tensor(torch.ones(4, 3), mesh, [Replicate()])
    optimizer = FusedSGD([p], lr=0.5)
    assert optimizer.explain()[0].path == "reference" and "placed as" in optimizer.explain()[0].reason
    optimizer.step()
    assert torch.equal(p.full_tensor(), torch.full((4, 3), 0.5))
    """,
    )


def test_zero_redundancy_optimizer(tmp_path: Path) -> None:
    run_two(
        tmp_path,
        """
    from torch.distributed.optim import ZeroRedundancyOptimizer
    from torch.nn.parallel import DistributedDataParallel

    torch.manual_seed(7)
    mine = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1))
    theirs = copy.deepcopy(mine)
    mine, theirs = DistributedDataParallel(mine), DistributedDataParallel(theirs)
    a = ZeroRedundancyOptimizer(mine.parameters(), FusedSGD, **OPTIONS)
    b = torch.optim.SGD(theirs.parameters(), **OPTIONS)
    train(mine, a, 3), train(theirs, b, 3)
    for p, q in zip(mine.parameters(), theirs.parameters()):
        assert torch.equal(p, q)
    """,
    )
