"""How exact is momentum in 8 bits? Errors against float32 for each block size; what INT8_BLOCK was chosen by.

    python benchmarks/int8_error.py [--steps 1000]

Momentum is accumulated for some steps, b = 0.9 b + g, in float32 and in 8 bits. Gradients: Gaussian; the same with one
element in 1000 a hundred times as large; log-normal scales per element (spread e^1.5); a small constant direction below
noise; a constant alone, without noise to dither what is rounded away; and the gradients of a small network on
scikit-learn's digits, which is trained meanwhile.

`error` is rms(b8 - b32) / rms(b32) over all elements and the last half of the steps. `own` is the same of each element
alone, averaged over those that are not as good as zero (below 1e-4 of all elements' rms): it shows small ones that
share a block with large ones. In percent, on 2026-11-24 (torch 2.13.0, CPU, 1000 steps; l: linear, q: quadratic):

              32            64            128           256      elements a block
gaussian   l   1.10   1.11   1.22   1.24   1.33   1.35   1.44   1.45
gaussian   q   1.23   1.24   1.32   1.33   1.39   1.40   1.45   1.46
outliers   l   2.48   2.40   3.51   3.84   4.97   6.57   6.98  11.64
outliers   q   0.55   1.41   0.70   1.68   0.90   2.11   1.21   2.83
log_normal l   2.09  26.99   2.83  35.32   3.73  44.19   4.82  52.41
log_normal q   0.75   5.59   0.95   7.00   1.18   8.62   1.42  10.37
direction  l   1.10   1.12   1.23   1.24   1.33   1.35   1.44   1.45
constant   l   0.48   2.26   0.53   2.51   0.58   2.71   0.62   2.86
digits     l   1.11   8.35   1.22   8.73   1.32   9.11   1.44   9.51
digits     q   1.21   3.16   1.30   3.33   1.37   3.50   1.43   3.65

A block of 64 costs 1/16 byte an element more than its codes. Halving it takes a tenth (Gaussian) to three tenths
(outliers) off the error and costs another 1/16; doubling it adds as much. Codes of square roots are three to five times
as exact on heavy tails, and two to three times for small elements of any data; in rms on the others they are not. Their
square root costs 0.2 to 0.35 ns an element with AVX2 (one thread, in cache), where the whole step takes 0.5 to 0.7.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import torch
from fused_sgd import _storage
from torch import Tensor

MOMENTUM = 0.9
ROWS, ROW = 32, 1024
BLOCKS = (32, 64, 128, 256)


def gaussian() -> Iterator[Tensor]:
    """Independent and all alike."""
    while True:
        yield torch.randn(ROWS, ROW)


def outliers() -> Iterator[Tensor]:
    """One element in 1000 is a hundred times as large."""
    scale = torch.where(torch.rand(ROWS, ROW) < 1e-3, 100.0, 1.0)
    while True:
        yield torch.randn(ROWS, ROW) * scale


def log_normal() -> Iterator[Tensor]:
    """Every element has a size of its own."""
    scale = (1.5 * torch.randn(ROWS, ROW)).exp()
    while True:
        yield torch.randn(ROWS, ROW) * scale


def direction() -> Iterator[Tensor]:
    """A constant direction below noise."""
    constant = 0.05 * torch.randn(ROWS, ROW)
    while True:
        yield constant + torch.randn(ROWS, ROW)


def constant() -> Iterator[Tensor]:
    """No noise at all: nothing dithers what is rounded away."""
    gradient = torch.randn(ROWS, ROW)
    while True:
        yield gradient


def digits() -> Iterator[Tensor]:
    """The middle layer's of a small network that learns scikit-learn's digits."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.data, dtype=torch.float32) / 16
    labels = torch.tensor(data.target)
    model = torch.nn.Sequential(
        torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=MOMENTUM)
    while True:
        batch = torch.randint(len(images), (64,))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
        gradient = model[2].weight.grad
        assert gradient is not None
        yield gradient.clone()
        optimizer.step()


def linear(b: Tensor, block: int) -> Tensor:
    """The format as it is."""
    return _storage.int8_dequantize(*_storage.int8_quantize(b, block), block)


def quadratic(b: Tensor, block: int) -> Tensor:
    """An alternative: codes of square roots, finer near zero and coarser near the largest magnitude."""
    blocks = b.unflatten(1, (-1, block))
    largest = blocks.abs().amax(-1, keepdim=True).clamp(min=1e-30)
    code = (blocks.abs() / largest).sqrt().mul(127).round()
    return ((code / 127) ** 2 * largest * blocks.sign()).flatten(1)


class Measured:
    """One code with one block size, beside float32."""

    def __init__(self, code: Callable[[Tensor, int], Tensor], block: int) -> None:
        self.code, self.block = code, block
        self.b = torch.zeros(())
        self.square = self.exact_square = torch.zeros(())  # of an element, summed over steps

    def step(self, g: Tensor, exact: Tensor, count: bool) -> None:
        """Accumulates a gradient; `exact` is the float32 momentum after it."""
        new = MOMENTUM * self.b + g  # a parameter's update uses it before it is rounded
        self.b = self.code(new, self.block)
        if count:
            self.square = self.square + (new - exact).square()
            self.exact_square = self.exact_square + exact.square()

    def error(self) -> float:
        """Over all elements."""
        return (self.square.sum() / self.exact_square.sum()).sqrt().item()

    def own(self) -> float:
        """Of an element, averaged."""
        counted = self.exact_square > 1e-8 * self.exact_square.mean()
        return (self.square[counted] / self.exact_square[counted]).sqrt().mean().item()


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    steps = parser.parse_args().steps
    print(f"{'gradients':12} {'code':10}" + "".join(f"{f'block {block}: error':>18}{'own':>8}" for block in BLOCKS))
    for gradients in (gaussian, outliers, log_normal, direction, constant, digits):
        torch.manual_seed(0)
        measured = {code: [Measured(code, block) for block in BLOCKS] for code in (linear, quadratic)}
        exact = torch.zeros(())
        for step, g in zip(range(steps), gradients(), strict=False):
            exact = MOMENTUM * exact + g
            for code in measured:
                for each in measured[code]:
                    each.step(g, exact, count=step >= steps // 2)
        for code, all_blocks in measured.items():
            cells = "".join(f"{each.error():>18.2%}{each.own():>8.2%}" for each in all_blocks)
            print(f"{gradients.__name__:12} {code.__name__:10}{cells}", flush=True)


if __name__ == "__main__":
    main()
