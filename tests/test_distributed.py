"""Sharded parameters: FSDP2 (DTensor), distributed checkpoints and ZeRO, in two processes on the CPU."""

from __future__ import annotations

from pathlib import Path

from two_processes import run_two


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
