"""Where nearest rounding stalls, and each remedy does not; and what examples/precision.py trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fused_sgd import FusedSGD
from fused_sgd._storage import split_join

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
LR, STEPS = 1e-3, 500  # half an ulp below 1 is 2e-3 in bfloat16 and 2.4e-4 in float16
REMEDIES = {
    "split": {"master_weights": "split"},
    "master": {"master_weights": torch.float32},
    # Momentum is rounded to nearest, also here: in bfloat16 it would stop 1 or 2 percent short of a constant gradient.
    "stochastic": {"stochastic_rounding": True, "momentum_dtype": torch.float32},
}
KERNEL, REFERENCE = {"fused": True}, {"fused": False}


def train(options: dict[str, Any], path: dict[str, bool], momentum: float = 0.0) -> tuple[torch.Tensor, FusedSGD]:
    """Weights of 1 under a gradient of 1, which is to take them to 1 - STEPS * LR."""
    param = torch.nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    param.grad = torch.full_like(param, 1 - momentum)  # so that the buffer comes to hold 1
    optimizer = FusedSGD([param], LR, momentum=momentum, **path, **options)
    for _ in range(STEPS):
        optimizer.step()
    return param, optimizer


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("path", [KERNEL, REFERENCE], ids=["kernel", "reference"])
class TestStall:
    @pytest.mark.parametrize("momentum_dtype", [None, torch.float32])
    def test_nearest_rounding_stalls(self, path: dict[str, bool], momentum_dtype: torch.dtype | None) -> None:
        param, _ = train({"momentum_dtype": momentum_dtype}, path, momentum=0.875)
        assert torch.equal(param, torch.ones_like(param))

    @pytest.mark.parametrize("options", REMEDIES.values(), ids=REMEDIES)
    @pytest.mark.parametrize("momentum", [0.0, 0.875])
    def test_each_remedy_makes_progress(self, path: dict[str, bool], options: dict[str, Any], momentum: float) -> None:
        param, _ = train(options, path, momentum)
        # With momentum the first steps are shorter: the sum of 1 - momentum^t falls as much short.
        expected = 1 - LR * (STEPS - momentum / (1 - momentum))
        mean = param.double().mean().item()
        # Rounded once, or 4096 random walks: each element is off by ulps of 2^-8, their mean by a 64th of that.
        assert mean == pytest.approx(expected, abs=1e-3 if "stochastic_rounding" in options else 2**-9)

    def test_masters_hold_what_float32_would(self, path: dict[str, bool]) -> None:
        wide = torch.nn.Parameter(torch.ones(64, 64))
        wide.grad = torch.ones_like(wide)
        optimizer = torch.optim.SGD([wide], LR, fused=False, foreach=False)
        for _ in range(STEPS):
            optimizer.step()
        split, by_split = train(REMEDIES["split"], path)
        master, by_master = train(REMEDIES["master"], path)
        assert torch.equal(split_join(split.detach(), by_split.state[split]["remainder"]), wide)
        assert torch.equal(by_master.state[master]["master"], wide)
        assert torch.equal(split, master)


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import narrow

    return narrow


def layers() -> torch.nn.Sequential:
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(32, 3)
    )


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
def test_a_narrow_model_has_bfloat16_weights_and_gradients(narrow: Any, compute_dtype: torch.dtype) -> None:
    model = narrow.Narrow(layers(), compute_dtype)
    outputs = model(torch.randn(5, 1, 4, 4))
    assert outputs.dtype == torch.float32
    outputs.square().sum().backward()
    for param in model.parameters():
        assert param.dtype == torch.bfloat16
        assert param.grad is not None
        assert param.grad.dtype == torch.bfloat16
        assert param.grad.any() or param.dim() == 1
    assert {buffer.dtype for buffer in model.buffers()} == {torch.float32, torch.int64}


def test_a_narrow_model_computes_with_its_weights(narrow: Any) -> None:
    plain = layers().eval()
    with torch.no_grad():
        for param in plain.parameters():
            param.copy_(param.bfloat16())
    images = torch.randn(5, 1, 4, 4)
    expected = plain(images)
    model = narrow.Narrow(plain, torch.float32)
    assert torch.equal(model(images), expected)
    with torch.no_grad():
        next(model.parameters()).zero_()
    assert not torch.equal(model(images), expected)
