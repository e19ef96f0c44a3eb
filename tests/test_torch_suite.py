"""The test suite that ships in torch for its own SGD, run on FusedSGD.

`torch.testing._internal.common_optimizers` lists the options, the bad options and the schedulers that torch tests its
optimizers with. It is private, and so read here rather than relied on anywhere else.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from fused_sgd import FusedSGD
from torch import Tensor
from torch.nn import Parameter

pytest.importorskip("expecttest")  # which torch.testing._internal imports
from torch.testing._internal.common_optimizers import optim_db

pytestmark = pytest.mark.usefixtures("device")

INFO = next(info for info in optim_db if info.optim_cls is torch.optim.SGD)
INPUTS = INFO.optim_inputs_func(device="cpu")
WAYS: list[dict[str, Any]] = [{}, {"fused": True}, {"foreach": True}, {"fused": False}]
by_desc = pytest.mark.parametrize("inputs", INPUTS, ids=lambda i: i.desc.replace(" ", "_"))
by_way = pytest.mark.parametrize("way", WAYS, ids=lambda w: ",".join(w) or "default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@by_way
@by_desc
def test_options(inputs: Any, way: dict[str, Any], dtype: torch.dtype) -> None:
    """As torch's own tests compare its implementations: two parameters, one of which gets no gradient for a while."""
    models = []
    for cls, kwargs in ((FusedSGD, way), (torch.optim.SGD, {"foreach": False})):
        torch.manual_seed(1)
        model = torch.nn.Sequential(torch.nn.Linear(1, 3), torch.nn.Sigmoid(), torch.nn.Linear(3, 1)).to(dtype)
        params = [*model.parameters(), Parameter(torch.empty(2, 2, dtype=dtype))]
        optimizer = cls(params, **copy.deepcopy(inputs.kwargs), **kwargs)
        data = torch.ones(4, 1, dtype=dtype)
        for _ in range(7):
            optimizer.zero_grad()
            model(data).sum().backward()
            optimizer.step()
        models.append(list(model.parameters()))
    for p, q in zip(*models, strict=True):
        assert torch.equal(p, q)


@by_desc
def test_schedulers_go_in_the_right_direction(inputs: Any) -> None:
    for schedulers in INFO.scheduler_inputs:
        torch.manual_seed(0)
        weight, bias, x = Parameter(torch.randn(10, 5)), Parameter(torch.randn(10)), torch.randn(5)
        kwargs = {k: v for k, v in inputs.kwargs.items() if not isinstance(v, Tensor)}
        optimizer = FusedSGD([weight, bias], **kwargs)
        made = [scheduler(optimizer) for scheduler in schedulers or []]

        def closure(
            optimizer: FusedSGD = optimizer, weight: Tensor = weight, bias: Tensor = bias, x: Tensor = x
        ) -> Tensor:
            optimizer.zero_grad()
            loss = (weight.mv(x) + bias).pow(2).sum()
            loss.backward()
            return loss

        first = closure().item()
        for _ in range(20):
            loss = optimizer.step(closure)
            for scheduler in made:
                if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
                    scheduler.step(loss.detach())
                else:
                    scheduler.step()
        last = closure().item()
        assert last > first if kwargs.get("maximize") else last < first


ERRORS = INFO.optim_error_inputs_func(device="cpu", dtype=torch.float32)


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: e.optimizer_error_input.desc.replace(" ", "_"))
def test_bad_options(error: Any) -> None:
    inputs = error.optimizer_error_input
    if error.error_type is UserWarning:  # a parameter twice in one group: torch warns, we refuse
        with pytest.raises(ValueError, match="is the same tensor as parameter"):
            FusedSGD(inputs.params, **inputs.kwargs)
        return
    with pytest.raises(error.error_type, match=error.error_regex):
        FusedSGD(inputs.params, **inputs.kwargs)


@by_desc
def test_state_dict_round_trip(inputs: Any) -> None:
    params = [Parameter(torch.randn(2, 3)) for _ in range(2)]
    optimizer = FusedSGD(params, **inputs.kwargs)
    for p in params:
        p.grad = torch.rand_like(p)
    optimizer.step()
    twins = [Parameter(p.detach().clone()) for p in params]
    twin = FusedSGD(twins, **inputs.kwargs)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for p, q in zip(params, twins, strict=True):
        p.grad = q.grad = torch.rand_like(p)
    optimizer.step()
    twin.step()
    assert all(torch.equal(p, q) for p, q in zip(params, twins, strict=True))


@by_desc
def test_deepcopy_and_named_parameters(inputs: Any) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = FusedSGD(model.named_parameters(), **inputs.kwargs)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert copy.deepcopy(optimizer).state_dict().keys() == optimizer.state_dict().keys()
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]


@by_desc
def test_no_gradients_at_all_is_a_step_that_does_nothing(inputs: Any) -> None:
    params = [Parameter(torch.randn(2, 3)) for _ in range(2)]
    before = [p.detach().clone() for p in params]
    FusedSGD(params, **inputs.kwargs).step()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))


def test_zero_grad() -> None:
    p = Parameter(torch.ones(3))
    optimizer = FusedSGD([p], fused=True)
    p.grad = torch.ones(3)
    optimizer.zero_grad(set_to_none=False)
    assert torch.equal(p.grad, torch.zeros(3))
    optimizer.zero_grad()
    assert p.grad is None
