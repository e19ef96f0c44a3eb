"""Norms over shards, in two processes on the CPU: every step equals that of the whole tensors."""

from __future__ import annotations

from pathlib import Path

from two_processes import run_two


def test_plain_shards(tmp_path: Path) -> None:
    """norm_process_group: rows of each tensor, one of which has rows for one rank alone."""
    run_two(
        tmp_path,
        """
    shapes, cut = [(6, 5), (1, 7), (4098, 2)], [3, 1, 1000]
    def shard(t, at): return (t[:at] if RANK == 0 else t[at:]).clone()

    KINDS = [
        (FusedSGD, dict(max_grad_norm=0.5)),
        (FusedSGD, dict(max_grad_norm=0.5, skip_nonfinite=True, decoupled_weight_decay=True)),
        (FusedSGD, dict(skip_nonfinite=True)),
        (FusedLARS, dict(trust_coeff=0.1)),
        (FusedLARS, dict(trust_coeff=0.1, max_grad_norm=0.5, skip_nonfinite=True)),
    ]
    for kind, extra in KINDS:
        for fused in (True, False):
            if kind is FusedLARS and not fused:
                continue
            torch.manual_seed(1)
            whole = [torch.randn(shape).requires_grad_() for shape in shapes]
            mine = [shard(p.detach(), at).requires_grad_() for p, at in zip(whole, cut)]
            options = dict(lr=0.1, momentum=0.9, weight_decay=0.1, fused=fused, **extra)
            a, b = kind(mine, **options, norm_process_group=dist.group.WORLD), kind(whole, **options)
            for step in range(4):
                for p, q, at in zip(whole, mine, cut):
                    p.grad = torch.randn(p.shape)
                    if step == 2 and extra.get("skip_nonfinite") and p.shape[0] == 4098:
                        p.grad[4097, 1] = math.nan  # only rank 1 has it
                    q.grad = shard(p.grad, at)
                a.step(), b.step()
                torch.testing.assert_close(a.grad_norm, b.grad_norm, rtol=1e-13, atol=0, equal_nan=True)
                for p, q, at in zip(whole, mine, cut):
                    torch.testing.assert_close(q, shard(p.detach(), at), rtol=1e-6, atol=1e-6)
            assert a.skipped_steps == b.skipped_steps == (1 if extra.get("skip_nonfinite") else 0)
            sums = [torch.zeros(2, dtype=torch.float64) for _ in range(2)]
            dist.all_gather(sums, torch.stack([a.grad_norm, a.grad_norm]))
            assert torch.equal(sums[0], sums[1]), "to the bit the same on both"

    # and without the group the norms are the shards'
    c = FusedSGD(mine, lr=0.1, max_grad_norm=0.5, fused=True)
    c.step()
    assert abs(c.grad_norm - torch.cat([p.grad.flatten() for p in mine]).norm()) < 1e-3
    """,
    )


def test_one_process_has_no_gradient(tmp_path: Path) -> None:
    """It takes part in the sum all the same."""
    run_two(
        tmp_path,
        """
    for fused in (True, False):
        p = torch.ones(3).requires_grad_()
        optimizer = FusedSGD([p], lr=1.0, max_grad_norm=1.0, fused=fused, norm_process_group=dist.group.WORLD)
        p.grad = torch.tensor([0.0, 3.0, 4.0]) if RANK == 0 else None
        optimizer.step()
        assert optimizer.grad_norm == 5.0
        torch.testing.assert_close(p.detach(), torch.tensor([1.0, 0.4, 0.2]) if RANK == 0 else torch.ones(3))
    """,
    )


def test_copies_keep_the_process_group(tmp_path: Path) -> None:
    run_two(
        tmp_path,
        """
    p = torch.full((2,), float(RANK)).requires_grad_()
    optimizer = FusedSGD([p], lr=1.0, max_grad_norm=1.0, fused=True, norm_process_group=dist.group.WORLD)
    optimizer.load_state_dict(optimizer.state_dict())
    other = copy.deepcopy(optimizer)
    for it in (optimizer, other):
        q = it.param_groups[0]["params"][0]
        q.grad = torch.full((2,), 1.0 + RANK)
        it.step()
        assert abs(it.grad_norm - math.sqrt(10)) < 1e-12, it.grad_norm
    """,
    )


def test_fsdp2(tmp_path: Path) -> None:
    """DTensors tell by themselves; 7 rows over 2 ranks, and a tensor of one row: rank 1 has none of it."""
    run_two(
        tmp_path,
        """
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, init_device_mesh

    def make(sharded):
        torch.manual_seed(7)
        model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1))
        if sharded:
            fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        return model

    KINDS = [
        (FusedSGD, dict(max_grad_norm=0.5)),
        (FusedSGD, dict(max_grad_norm=0.5, skip_nonfinite=True, ema_decay=0.9, dampening=0.2)),
        (FusedLARS, dict(trust_coeff=0.1)),
        (FusedLARS, dict(trust_coeff=0.1, max_grad_norm=0.5, skip_nonfinite=True, ema_decay=0.9)),
    ]
    for kind, extra in KINDS:
        for fused in (True, None, False):
            mine, theirs = make(True), make(False)
            a = kind(mine.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1, fused=fused, **extra)
            b = kind(theirs.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1, fused=fused, **extra)
            if kind is FusedLARS and fused is False:
                try:
                    train(mine, a, 1)
                except RuntimeError as error:
                    assert "with shards in several processes" in str(error)
                    continue
                raise AssertionError("the reference does not know the norms of the whole tensors")
            train(mine, a, 3), train(theirs, b, 3)
            if fused is not False:
                assert {row.path for row in a.explain()} == {"kernel"}, a.explain()
            if a.grad_norm is not None:
                torch.testing.assert_close(a.grad_norm, b.grad_norm, rtol=1e-5, atol=0)
            for p, q in zip(mine.parameters(), theirs.parameters()):
                torch.testing.assert_close(p.full_tensor(), q.detach(), rtol=1e-5, atol=1e-5)
                if "ema_decay" in extra:
                    average = a.state[p]["ema"]
                    assert type(average) is DTensor and average.placements == p.placements
                    torch.testing.assert_close(average.full_tensor(), b.state[q]["ema"], rtol=1e-5, atol=1e-5)
            if "ema_decay" in extra:
                before = [p.detach().full_tensor().clone() for p in mine.parameters()]
                with a.swap_ema():
                    for p in mine.parameters():
                        assert torch.equal(p.to_local(), a.state[p]["ema"].to_local())
                assert all(torch.equal(p.full_tensor(), q) for p, q in zip(mine.parameters(), before))
            if extra.get("skip_nonfinite"):  # found by one rank, skipped by both
                p = next(mine.parameters())
                if RANK == 1:
                    p.grad.to_local()[-1, -1] = math.inf
                before = [q.full_tensor().clone() for q in mine.parameters()]
                a.step()
                assert a.skipped_steps == 1
                assert all(torch.equal(q.full_tensor(), kept) for q, kept in zip(mine.parameters(), before))
    """,
    )


def test_shards_without_a_plan_are_refused(tmp_path: Path) -> None:
    """The reference would take the norms of the shards for those of the whole tensors."""
    run_two(
        tmp_path,
        """
    from torch.utils._python_dispatch import TorchDispatchMode

    class Nothing(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    p = torch.ones(3).requires_grad_()
    p.grad = torch.full((3,), 1.0 + RANK)
    optimizer = FusedLARS([p], lr=1.0, norm_process_group=dist.group.WORLD)
    with Nothing():
        try:
            optimizer.step()
        except RuntimeError as error:
            assert "FusedLARS with shards in several processes" in str(error)
        else:
            raise AssertionError("stepped")
    assert torch.equal(p.detach(), torch.ones(3))
    """,
    )
