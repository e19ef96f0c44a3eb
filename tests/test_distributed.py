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


def test_precision_modes_of_shards(tmp_path: Path) -> None:
    """Equal to the tensors in one piece, on both paths: blocks of 8 bits do not cross rows. Uneven and empty shards."""
    run_two(
        tmp_path,
        """
    from torch.distributed.tensor import DTensor, Shard, init_device_mesh
    mesh = init_device_mesh("cpu", (2,))
    SHAPES = [(7, 64), (5,), (3, 2, 64), (1, 128), (4, 3)]

    def part(whole):
        chunks = whole.chunk(2)
        return (chunks[RANK] if RANK < len(chunks) else whole[:0]).clone()

    def shard(whole):
        return DTensor.from_local(
            part(whole), mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride()
        )

    MODES = [
        (torch.bfloat16, dict(master_weights="split")),
        (torch.bfloat16, dict(master_weights="split", momentum_dtype=torch.int8)),
        (torch.float16, dict(master_weights="float32", momentum_dtype=torch.int8)),
        (torch.float32, dict(momentum_dtype=torch.int8)),
        (torch.float32, dict(momentum_dtype=torch.bfloat16)),
    ]
    for dtype, mode in MODES:
        for fused in (True, False):
            torch.manual_seed(0)
            whole = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in SHAPES]
            parts = [nn.Parameter(shard(p.detach())) for p in whole]
            a = FusedSGD(whole, **OPTIONS, **mode, ema_decay=0.9)
            b = FusedSGD(parts, **OPTIONS, **mode, ema_decay=0.9, fused=fused)
            for step in range(6):
                if step == 4:  # through a checkpoint
                    saved = copy.deepcopy(b.state_dict())
                    b = FusedSGD(parts, **OPTIONS, **mode, ema_decay=0.9, fused=fused)
                    b.load_state_dict(saved)
                if step == 5:  # into another mode
                    for optimizer in (a, b):
                        masters = {"split": "float32", "float32": torch.float32}.get(mode.get("master_weights"))
                        optimizer.param_groups[0].update(momentum_dtype=None, master_weights=masters)
                for p, q in zip(whole, parts):
                    p.grad = torch.randn(p.shape).to(dtype)
                    q.grad = shard(p.grad)
                if step == 3:
                    with torch.no_grad():
                        whole[0][2] = 0.5
                        parts[0].to_local()[2 if RANK == 0 else slice(0)] = 0.5
                        parts[0].to_local().add_(0)
                a.step(), b.step()
                for p, q in zip(whole, parts):
                    where = (dtype, mode, fused, step, tuple(p.shape))
                    assert torch.equal(part(p.detach()), q.to_local()), where
                    assert a.state[p].keys() == b.state[q].keys(), where
                    for key, tensor in a.state[p].items():
                        other = b.state[q][key]
                        assert type(other) is DTensor and other.placements == q.placements, (where, key)
                        assert other.shape == tensor.shape and other.dtype == tensor.dtype, (where, key)
                        assert torch.equal(part(tensor), other.to_local()), (where, key)
            assert {row.path for row in b.explain()} == {"kernel" if fused else "reference"}
    """,
    )


def test_distributed_checkpoints_of_precision_modes(tmp_path: Path) -> None:
    """torch.distributed.checkpoint initialises the state by a step, saves it, and loads it in place."""
    run_two(
        tmp_path,
        """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import init_device_mesh
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    def make(seed):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(64, 7), nn.Tanh(), nn.Linear(7, 64)).to(torch.bfloat16)
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        return model

    def train(model, optimizer, steps):
        for step in steps:
            torch.manual_seed(step)
            optimizer.zero_grad()
            model(torch.randn(4, 64).bfloat16()).float().pow(2).sum().backward()
            optimizer.step()

    MODES = [
        dict(master_weights="split"),
        dict(master_weights="float32"),
        dict(master_weights="split", momentum_dtype=torch.int8),
        dict(stochastic_rounding=True, momentum_dtype=torch.int8),
    ]
    for number, mode in enumerate(MODES):
        for fused in (True, False):
            options = dict(OPTIONS, **mode, fused=fused)
            model, other = make(7), make(8)
            a, b = FusedSGD(model.parameters(), **options), FusedSGD(other.parameters(), **options)
            before = [p.to_local().clone() for p in other.parameters()]
            get_state_dict(other, b)
            assert all(torch.equal(x, p.to_local()) for x, p in zip(before, other.parameters())), "initialising"
            train(model, a, range(3))
            weights, state = get_state_dict(model, a)
            path = f"{os.path.dirname(sys.argv[1])}/{number}{fused}"
            dcp.save({"model": weights, "optimizer": state}, checkpoint_id=path)
            weights, state = get_state_dict(other, b)
            dcp.load({"model": weights, "optimizer": state}, checkpoint_id=path)
            set_state_dict(other, b, model_state_dict=weights, optim_state_dict=state)
            train(model, a, range(3, 5)), train(other, b, range(3, 5))
            for p, q in zip(model.parameters(), other.parameters()):
                assert torch.equal(p.to_local(), q.to_local()), (mode, fused)
                assert a.state[p].keys() == b.state[q].keys()
                for key in a.state[p]:
                    x, y = a.state[p][key], b.state[q][key]
                    x, y = (getattr(t, "_local_tensor", t) for t in (x, y))
                    assert x.dtype == y.dtype and torch.equal(x, y), (mode, fused, key)
    """,
    )
