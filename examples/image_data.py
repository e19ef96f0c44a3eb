"""Image data for train.py: scikit-learn's digits, or a folder of images. Needs scikit-learn and pillow."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (its usual name)
from torch.utils.data import Dataset, TensorDataset

IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
CHANNELS = {"grey": 1, "rgb": 3}
PILLOW_MODES = {"grey": "L", "rgb": "RGB"}


class InputError(Exception):
    """What the user gave cannot be used; the message says why and what to do."""


@dataclass
class Data:
    """A training and a test set of (image, label); an image is (channels, height, width) in [0, 1]."""

    name: str
    train: Dataset[tuple[Tensor, ...]]
    test: Dataset[tuple[Tensor, ...]]
    channels: int
    classes: int


class ImageFolder(Dataset[tuple[Tensor, ...]]):
    """Images read with Pillow when asked for, resized to a square."""

    def __init__(self, samples: list[tuple[Path, int]], size: int, color: str) -> None:
        self.samples = samples
        self.size = size
        self.color = color

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        path, label = self.samples[index]
        try:
            with Image.open(path) as file:
                image = file.convert(PILLOW_MODES[self.color]).resize((self.size, self.size), Image.Resampling.BILINEAR)
        except OSError as error:
            raise InputError(f"{path} cannot be read as an image: {error}") from error
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)  # height, width, channels
        pixels = pixels.view(self.size, self.size, CHANNELS[self.color]).permute(2, 0, 1)
        return pixels.float() / 255, torch.tensor(label)


def load_data(args: argparse.Namespace) -> Data:
    """Loads what ``--data`` names."""
    return load_digits() if args.data == "digits" else load_folder(Path(args.data), args)


def load_digits() -> Data:
    """The 1797 handwritten digits of 8x8 pixels that come with scikit-learn; a quarter is for the test."""
    from sklearn import datasets
    from sklearn.model_selection import train_test_split

    digits = datasets.load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    train, test = train_test_split(range(len(labels)), test_size=0.25, stratify=digits.target, random_state=0)
    train_set, test_set = (TensorDataset(images[rows], labels[rows]) for rows in (train, test))
    return Data("digits", train_set, test_set, channels=1, classes=10)


def load_folder(path: Path, args: argparse.Namespace) -> Data:
    """Reads ``path/train/class/*`` and ``path/val/class/*`` (or ``test``), or splits ``path/class/*``."""
    if not path.is_dir():
        raise InputError(f"--data: {path} is neither 'digits' nor a folder")
    root = path / "train" if (path / "train").is_dir() else path
    classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if len(classes) < 2:
        raise InputError(f"--data: {root} holds {len(classes)} class folders; at least two are needed")
    train = list_images(root, classes)
    held_out = next((path / name for name in ("val", "test") if root != path and (path / name).is_dir()), None)
    if held_out is None:
        train, test = split(train, args.seed)
    else:
        test = list_images(held_out, classes)
    train_set, test_set = (ImageFolder(samples, args.image_size, args.color) for samples in (train, test))
    return Data(path.resolve().name, train_set, test_set, CHANNELS[args.color], len(classes))


def list_images(root: Path, classes: list[str]) -> list[tuple[Path, int]]:
    """All images of all classes, in an order that does not depend on the file system.

    Raises:
        InputError: a class has no folder or no image.
    """
    samples = []
    for label, name in enumerate(classes):
        images = sorted(file for file in (root / name).rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
        if not images:
            raise InputError(f"--data: {root / name} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))})")
        samples += [(image, label) for image in images]
    return samples


def split(samples: list[tuple[Path, int]], seed: int) -> tuple[list[tuple[Path, int]], list[tuple[Path, int]]]:
    """Splits 80 to 20, the same way for the same seed."""
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed)).tolist()
    cut = max(1, len(samples) // 5)
    return [samples[index] for index in order[cut:]], [samples[index] for index in order[:cut]]


def shift(images: Tensor, generator: torch.Generator) -> Tensor:
    """Augmentation: moves each image by up to an eighth of its size, with zeros coming in."""
    count, channels, height, width = images.shape
    margin = height // 8
    down, right = torch.randint(2 * margin + 1, (2, count, 1), generator=generator)
    rows = (down + torch.arange(height)).view(count, 1, height, 1)
    columns = (right + torch.arange(width)).view(count, 1, 1, width)
    numbers, planes = torch.arange(count).view(-1, 1, 1, 1), torch.arange(channels).view(-1, 1, 1)
    return F.pad(images, (margin,) * 4)[numbers, planes, rows, columns]
