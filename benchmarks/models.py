"""Two models in plain torch, for the training view: ResNet-18 and a small GPT."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn


class _Block(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2015)."""

    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(into, out, 3, stride, 1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(inplace=True),
            nn.Conv2d(out, out, 3, 1, 1, bias=False),
            nn.BatchNorm2d(out),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or into != out:
            self.shortcut = nn.Sequential(nn.Conv2d(into, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        """Of a batch, (N, into, H, W)."""
        return F.relu(self.main(x) + self.shortcut(x))


class ResNet18(nn.Sequential):
    """ImageNet's ResNet-18: 11.7 M parameters in 62 tensors."""

    def __init__(self) -> None:
        layers: list[nn.Module] = [
            nn.Conv2d(3, 64, 7, 2, 3, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, 1),
        ]
        into = 64
        for width in (64, 128, 256, 512):
            layers += [_Block(into, width, 1 if width == 64 else 2), _Block(width, width, 1)]
            into = width
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000))


class _Layer(nn.Module):
    """Attention and MLP, each behind a layer norm, as in GPT-2."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Of a batch of sequences, (N, T, width)."""
        n, t, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, t, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(n, t, width))
        return x + self.mlp(self.norm2(x))


class SmallGPT(nn.Module):
    """Six layers of 384, a vocabulary of 8192: 17.0 M parameters in 77 tensors, head and embedding apart."""

    vocabulary, length = 8192, 128

    def __init__(self, width: int = 384, layers: int = 6) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(self.vocabulary, width), nn.Embedding(self.length, width)
        self.layers = nn.Sequential(*(_Layer(width, heads=6) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, self.vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of a batch of sequences, (N, T)."""
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        logits: Tensor = self.head(self.norm(self.layers(x))).flatten(0, 1)
        return logits


@dataclass(frozen=True)
class Training:
    """A model and one random batch that fits it; ``batch`` is of a device's kind."""

    name: str
    description: str
    model: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[Tensor, Tensor]]
    batch: dict[str, int]

    def make(self, device: str) -> tuple[nn.Module, Callable[[], None]]:
        """The model, and what computes its gradients."""
        torch.manual_seed(0)
        model = self.model().to(device)
        inputs, targets = (tensor.to(device) for tensor in self.inputs(self.batch[device]))

        def gradients() -> None:
            F.cross_entropy(model(inputs), targets).backward()

        return model, gradients


def _images(batch: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 3, 96, 96), torch.randint(1000, (batch,))


def _texts(batch: int) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(SmallGPT.vocabulary, (batch, SmallGPT.length + 1))
    return tokens[:, :-1], tokens[:, 1:].flatten()


TRAININGS = {
    training.name: training
    for training in (
        Training("resnet18", "ResNet-18, images of 96 x 96", ResNet18, _images, {"cpu": 8, "cuda": 256}),
        Training("gpt", "GPT of 6 layers of 384, 128 tokens", SmallGPT, _texts, {"cpu": 4, "cuda": 64}),
    )
}
