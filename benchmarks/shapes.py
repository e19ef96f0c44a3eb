"""Shape sets: whose parameters an optimizer step is timed on, written down so that no model library is needed."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ShapeSet:
    """The shapes of a model's parameters, in the order of its ``parameters()``.

    ``offsets`` puts tensor i at that element of its storage, which misaligns it; none means a storage of its own.
    ``param_groups`` is how many the optimizer is given, each with about as many tensors.
    """

    name: str
    description: str
    shapes: tuple[Shape, ...]
    offsets: tuple[int, ...] = ()
    param_groups: int = 1

    @property
    def elements(self) -> int:
        """Of all tensors together."""
        return sum(prod(shape) for shape in self.shapes)

    def offset(self, index: int) -> int:
        """The element of its storage at which tensor ``index`` begins."""
        return self.offsets[index] if self.offsets else 0

    def capped(self, elements: int) -> ShapeSet:
        """The same set with no tensor above so many elements: as many dimensions and offsets, smaller sizes."""
        shapes = tuple(_capped(shape, elements) for shape in self.shapes)
        return ShapeSet(self.name, self.description, shapes, self.offsets, self.param_groups)


def _capped(shape: Shape, elements: int) -> Shape:
    sizes = list(shape)
    while prod(sizes) > elements:
        largest = sizes.index(max(sizes))
        sizes[largest] = max(1, sizes[largest] * elements // prod(sizes))
    return tuple(sizes)


def _batch_norm(channels: int) -> list[Shape]:
    return [(channels,), (channels,)]


def _conv_norm(out: int, into: int, kernel: int) -> list[Shape]:
    return [(out, into, kernel, kernel), *_batch_norm(out)]


def _linear(out: int, into: int) -> list[Shape]:
    return [(out, into), (out,)]


def _resnet50() -> list[Shape]:
    """He et al. 2015, as in torchvision: bottlenecks of 1x1, 3x3 and 1x1 convolutions, ImageNet head."""
    shapes = _conv_norm(64, 3, 7)
    into = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += _conv_norm(width, into, 1) + _conv_norm(width, width, 3) + _conv_norm(4 * width, width, 1)
            if block == 0:
                shapes += _conv_norm(4 * width, into, 1)
            into = 4 * width
    return shapes + _linear(1000, into)


def _resnet20() -> list[Shape]:
    """The CIFAR-10 network of He et al. 2015, with convolutions as its shortcuts."""
    shapes = _conv_norm(16, 3, 3)
    into = 16
    for width in (16, 32, 64):
        for _ in range(3):
            shapes += _conv_norm(width, into, 3) + _conv_norm(width, width, 3)
            if into != width:
                shapes += _conv_norm(width, into, 1)
            into = width
    return shapes + _linear(10, into)


def _transformer_layer(width: int) -> list[Shape]:
    """Layer norm, attention, layer norm, MLP: with biases everywhere, as in ViT and GPT-2."""
    attention = _linear(3 * width, width) + _linear(width, width)
    mlp = _linear(4 * width, width) + _linear(width, 4 * width)
    return _batch_norm(width) + attention + _batch_norm(width) + mlp


def _vit_b16() -> list[Shape]:
    """Dosovitskiy et al. 2020: 224 x 224 images in 16 x 16 patches, ImageNet head."""
    shapes: list[Shape] = [(1, 1, 768), (768, 3, 16, 16), (768,), (1, 197, 768)]
    return shapes + 12 * _transformer_layer(768) + _batch_norm(768) + _linear(1000, 768)


def _gpt2() -> list[Shape]:
    """The 124 M model; its head is the token embedding and counts once."""
    return [(50257, 768), (1024, 768), *(12 * _transformer_layer(768)), *_batch_norm(768)]


def _llama_layer(ranks: int = 8) -> list[Shape]:
    """One layer of Llama-3-8B, each tensor split along its first dimension over the ranks, as FSDP does."""
    width, keys, hidden = 4096, 1024, 14336
    attention = [(width, width), (keys, width), (keys, width), (width, width)]
    whole: list[Shape] = [*attention, (hidden, width), (hidden, width), (width, hidden), (width,), (width,)]
    return [(rows // ranks, *rest) for rows, *rest in whole]


# Primes and near powers of two: nearly every tensor ends with a part of a vector, and begins with one by its offset.
_ODD_SIZES = (1, 3, 7, 17, 31, 127, 257, 1021, 4097, 16411, 65537, 262147, 1048583)
_ODD = [((size,), offset) for size in _ODD_SIZES for offset in range(1, 8)]

_ALL = (
    ShapeSet("resnet50", "ResNet-50", tuple(_resnet50())),
    ShapeSet("vit_b16", "ViT-B/16", tuple(_vit_b16())),
    ShapeSet("gpt2", "GPT-2 124M", tuple(_gpt2())),
    ShapeSet("llama_layer", "a Llama-3-8B layer, one of 8 shards", tuple(_llama_layer())),
    ShapeSet("one100m", "one tensor of 100 M", ((100_000_000,),)),
    ShapeSet("resnet20", "ResNet-20 for CIFAR-10", tuple(_resnet20())),
    ShapeSet("tiny161", "161 tensors of 16", 161 * ((16,),)),
    ShapeSet("tiny161_groups", "161 tensors of 16, a param group each", 161 * ((16,),), param_groups=161),
    ShapeSet("many1000", "1000 tensors of 256", 1000 * ((256,),)),
    ShapeSet(
        "odd", "odd sizes, misaligned views", tuple(shape for shape, _ in _ODD), tuple(offset for _, offset in _ODD)
    ),
)

SHAPE_SETS = {shape_set.name: shape_set for shape_set in _ALL}

# What the models' own libraries count (tensors, elements).
for _name, _expected in {
    "resnet50": (161, 25_557_032),
    "vit_b16": (152, 86_567_656),
    "gpt2": (148, 124_439_808),
    "llama_layer": (9, 218_112_000 // 8),
    "resnet20": (65, 272_474),
}.items():
    _counted = (len(SHAPE_SETS[_name].shapes), SHAPE_SETS[_name].elements)
    assert _counted == _expected, f"{_name} has {_counted} tensors and elements, expected {_expected}"
