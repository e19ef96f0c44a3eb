"""Values that an option or hyperparameter may not have: a clear error that names it, and nothing written."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from error_support import assert_refused, ready
from fused_sgd import FusedLARS, FusedSGD

from support import make_params, set_grads, snapshot

pytestmark = pytest.mark.usefixtures("device")

NAN = float("nan")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -0.5}, "Invalid learning rate: -0.5"),
        ({"lr": NAN}, "Invalid learning rate: nan"),
        ({"lr": torch.tensor(NAN)}, "Invalid learning rate: nan"),
        ({"lr": torch.ones(2)}, "Tensor lr must be 1-element"),
        ({"weight_decay": torch.ones(2)}, "Tensor weight_decay must be 1-element"),
        ({"momentum": -0.5}, "Invalid momentum value: -0.5"),
        ({"momentum": NAN}, "Invalid momentum value: nan"),
        ({"weight_decay": -1}, "Invalid weight_decay value: -1"),
        ({"weight_decay": NAN}, "Invalid weight_decay value: nan"),
        ({"momentum": 0.9, "dampening": NAN}, "Invalid dampening value: nan"),
        ({"nesterov": True}, "Nesterov momentum requires a momentum and zero dampening"),
        (
            {"nesterov": True, "momentum": 0.9, "dampening": 0.1},
            "Nesterov momentum requires a momentum and zero dampening",
        ),
    ],
)
def test_constructor_values(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FusedSGD(make_params([(2,)]), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fused": True, "foreach": True}, "`fused` and `foreach` cannot be `True` together."),
        ({"fused": True, "differentiable": True}, "`fused` does not support `differentiable`"),
    ],
)
def test_options_that_exclude_each_other(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        FusedSGD(make_params([(2,)]), **options)
    optimizer = FusedSGD(make_params([(2,)]))
    with pytest.raises(RuntimeError, match=message):
        optimizer.add_param_group({"params": make_params([(2,)]), **options})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("options", [{"lr": float("inf")}, {"momentum": 1.5}, {"momentum": 0.9, "dampening": -3}])
def test_what_torch_accepts_is_accepted(options: dict[str, Any]) -> None:
    FusedSGD(make_params([(2,)]), **options)


@pytest.mark.parametrize("key", ["lr", "momentum", "dampening", "weight_decay"])
@pytest.mark.parametrize("value", [NAN, np.float32("nan")])
def test_nan_in_a_group(key: str, value: float) -> None:
    optimizer, _ = ready()
    optimizer.param_groups[0][key] = value
    assert_refused(optimizer, r"Invalid .*nan \(param group 0\)", ValueError)
    optimizer, _ = ready()
    with pytest.raises(ValueError, match=r"param group 1"):
        optimizer.add_param_group({"params": make_params([(2,)]), key: value})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("value", ["0.1", None, object(), 1j])
@pytest.mark.parametrize("key", ["lr", "momentum", "dampening", "weight_decay"])
def test_a_hyperparameter_that_is_no_number(key: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"{key} must be a number, and is"):
        FusedSGD(make_params([(2,)]), **{key: value})
    optimizer, _ = ready()
    optimizer.param_groups[0][key] = value
    assert_refused(optimizer, rf"{key} must be a number, and is .*\(param group 0\)", TypeError)


@pytest.mark.parametrize(
    ("scale", "error"),
    [
        *((scale, ValueError) for scale in (0, -2.0, NAN, float("inf"), 1e-50, 1e300, 10**400)),
        ("2", TypeError),
        (torch.ones(2), TypeError),
    ],
)
def test_a_bad_grad_scale(scale: Any, error: type[Exception]) -> None:
    optimizer, _ = ready()
    optimizer.grad_scale = scale
    assert_refused(optimizer, "grad_scale", error)
    assert optimizer.grad_scale is scale  # the user set it, the user keeps it


def test_a_found_inf_of_two_elements() -> None:
    optimizer, _ = ready()
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.zeros(2)
    assert_refused(optimizer, r"found_inf must be .* of shape \(2,\)", TypeError)


@pytest.mark.parametrize("key", ["max_grad_norm", "ema_decay"])
def test_an_option_that_is_no_number(key: str) -> None:
    with pytest.raises(TypeError, match=f"{key} must be a number, and is '0.5'"):
        FusedSGD(make_params([(5,)]), lr=0.1, **{key: "0.5"})


@pytest.mark.parametrize(("fused", "path"), [(0, "reference"), (1, "kernel")])
def test_path_options_count_as_truths(fused: int, path: str) -> None:
    optimizer, params = ready(fused=fused)
    assert optimizer.explain()[0].path == path
    if fused:
        params[1].grad = params[1].grad.to_sparse()
        assert_refused(optimizer, "`fused=True` cannot be honoured")


def test_a_missing_hyperparameter() -> None:
    optimizer, _ = ready()
    del optimizer.param_groups[0]["weight_decay"]
    unchanged = snapshot(optimizer)
    with pytest.raises(KeyError, match="weight_decay"):
        optimizer.step()
    unchanged()


@pytest.mark.parametrize("key", ["lr", "momentum", "dampening", "weight_decay", "max_grad_norm"])
def test_a_number_beyond_float64(key: str) -> None:
    with pytest.raises(ValueError, match=r"it does not fit a float"):
        FusedSGD(make_params([(2,)]), **{key: 10**400})
    optimizer, _ = ready()
    optimizer.param_groups[0][key] = 10**400
    assert_refused(optimizer, r"it does not fit a float \(param group 0\)", ValueError)


@pytest.mark.parametrize("key", ["momentum", "dampening"])
def test_a_hyperparameter_of_two_elements(key: str) -> None:
    with pytest.raises(TypeError, match=f"{key} must be a number"):
        FusedSGD(make_params([(2,)]), **{key: torch.ones(2)})


@pytest.mark.parametrize("key", ["lr", "momentum"])
def test_a_complex_hyperparameter(key: str) -> None:
    with pytest.raises(TypeError, match=f"{key} must be a number"):
        FusedSGD(make_params([(2,)]), **{key: torch.tensor(0.5 + 0j)})


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    "value", [Fraction(1, 2), Decimal("0.5"), torch.tensor([[0.5]]), torch.tensor(0.5, dtype=torch.float16)], ids=repr
)
@pytest.mark.parametrize("key", ["lr", "momentum", "dampening", "weight_decay"])
def test_what_has_a_number_is_one_on_both_paths(key: str, value: Any, fused: bool) -> None:
    params, expected = make_params([(4, 3)]), make_params([(4, 3)])
    options = {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.1}
    mine, theirs = FusedSGD(params, **{**options, key: value}, fused=fused), FusedSGD(expected, **{**options, key: 0.5})
    for step in range(3):
        set_grads(params, expected, seed=step)
        mine.step()
        theirs.step()
        assert torch.equal(params[0], expected[0])


@pytest.mark.parametrize("key", ["max_grad_norm", "trust_coeff", "eps"])
def test_what_is_used_as_a_double_may_be_beyond_float32(key: str) -> None:
    results = []
    for fused in (True, False):
        params = make_params([(4, 3)])
        set_grads(params, seed=0)
        FusedLARS(params, lr=0.1, weight_decay=0.1, **{key: 1e39}, fused=fused).step()
        results.append(params[0].detach())
    torch.testing.assert_close(*results)


def test_an_option_of_lars_in_a_group_of_sgd() -> None:
    optimizer, _ = ready()
    optimizer.param_groups[0]["trust_coeff"] = 0.001
    assert_refused(optimizer, r"eps must be a number, and is None \(param group 0\)", TypeError)
