"""What --precision means: bfloat16 weights, the arithmetic between them, and FusedSGD's options for them."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

# By name: how FusedSGD keeps what a bfloat16 weight has no bits for.
PRECISIONS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {},  # it does not: each step rounds to nearest
    "bfloat16-split": {"master_weights": "split"},
    "bfloat16-master": {"master_weights": torch.float32},
    "bfloat16-stochastic": {"stochastic_rounding": True},
}
MOMENTUM_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.int8}


class Narrow(nn.Module):
    """A model whose weights are bfloat16, and so are their gradients; batch norm's running statistics stay as they are.

    It computes with the weights in another dtype, which is exact. Float32 on a CPU: one without bfloat16 instructions
    takes 10 to 25 times as long in bfloat16. Batch norm, which wants its weights and statistics alike, is always
    given float32.
    """

    def __init__(self, model: nn.Module, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.compute_dtype = model, compute_dtype
        self._dtypes = {}
        for prefix, module in model.named_modules():
            for name, param in module.named_parameters(recurse=False):
                param.data = param.data.to(torch.bfloat16)
                dtype = torch.float32 if isinstance(module, nn.modules.batchnorm._NormBase) else compute_dtype
                self._dtypes[f"{prefix}.{name}" if prefix else name] = dtype

    def forward(self, inputs: Tensor) -> Tensor:
        """The model's outputs, in float32."""
        params = {name: param.to(self._dtypes[name]) for name, param in self.model.named_parameters()}
        if inputs.is_floating_point():
            inputs = inputs.to(self.compute_dtype)
        outputs: Tensor = functional_call(self.model, params, (inputs,))
        return outputs.float()


def with_precision(model: nn.Module, args: argparse.Namespace) -> nn.Module:
    """The model as ``--precision`` wants it: itself, or one of bfloat16 weights."""
    if args.precision == "float32":
        return model
    return Narrow(model, torch.bfloat16 if args.device == "cuda" else torch.float32)


def storage_options(args: argparse.Namespace) -> dict[str, Any]:
    """FusedSGD's options for ``--precision`` and ``--momentum-dtype``."""
    momentum_dtype = None if args.momentum_dtype is None else MOMENTUM_DTYPES[args.momentum_dtype]
    return {**PRECISIONS[args.precision], "momentum_dtype": momentum_dtype}
