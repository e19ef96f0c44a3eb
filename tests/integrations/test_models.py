"""Models of timm and torchvision, trained a few steps with both optimizers: equal to the bit."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import timm
import timm.optim
import torch
import torchvision
from fused_sgd import FusedSGD

from support import same_bits

MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    "timm vit_tiny": lambda: timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=10),
    "timm convnext_atto": lambda: timm.create_model("convnext_atto", num_classes=10),
    "torchvision resnet18": lambda: torchvision.models.resnet18(num_classes=10),
    "torchvision mobilenet_v3_small": lambda: torchvision.models.mobilenet_v3_small(num_classes=10),
}


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_training_is_equal_to_the_bit(name: str, channels_last: bool) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    mine = MODELS[name]().train()
    if channels_last:
        mine = mine.to(memory_format=torch.channels_last)
    theirs = copy.deepcopy(mine)
    options = {"lr": 0.05, "momentum": 0.9, "nesterov": True}
    optimizers = [
        make(timm.optim.param_groups_weight_decay(model, 0.05), **options)
        for make, model in ((FusedSGD, mine), (torch.optim.SGD, theirs))
    ]
    for step in range(3):
        images, target = torch.randn(2, 3, 64, 64), torch.tensor([step, step + 1])
        for model, optimizer in zip((mine, theirs), optimizers, strict=True):
            torch.manual_seed(step)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(images), target).backward()
            optimizer.step()
        for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
            assert same_bits(p, q), f"at step {step}"
    assert {row.path for row in optimizers[0].explain()} == {"kernel"}
