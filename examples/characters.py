"""A character language model over the text of Python's standard library, for precision.py."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (its usual name)

CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))  # everything else is one more, unknown
VOCABULARY = len(CHARACTERS) + 1
CONTEXT = 64  # characters


class Text:
    """The sources that lie directly in the standard library's folder, by name; every tenth file is for the test.

    Attributes:
        train: character numbers, 1-D.
        test: windows of ``CONTEXT + 1`` numbers, evenly spaced over the test files.
    """

    def __init__(self, max_characters: int = 3_000_000, test_windows: int = 256) -> None:
        parts: dict[bool, list[Tensor]] = {False: [], True: []}
        self.files = self.characters = 0
        for number, file in enumerate(sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))):
            numbers = encode(file.read_text(encoding="utf-8", errors="replace"))
            if self.characters + len(numbers) > max_characters:
                break
            parts[number % 10 == 9].append(numbers)
            self.files += 1
            self.characters += len(numbers)
        self.train, held_out = torch.cat(parts[False]), torch.cat(parts[True])
        starts = torch.linspace(0, len(held_out) - CONTEXT - 1, test_windows).long()
        self.test = held_out[starts.unsqueeze(1) + torch.arange(CONTEXT + 1)]

    def batch(self, size: int, generator: torch.Generator) -> Tensor:
        """Windows of the training text, at random places."""
        starts = torch.randint(len(self.train) - CONTEXT, (size, 1), generator=generator)
        return self.train[starts + torch.arange(CONTEXT + 1)]


def encode(text: str) -> Tensor:
    """Numbers of characters."""
    numbers = torch.full((128,), VOCABULARY - 1)
    numbers[[ord(character) for character in CHARACTERS]] = torch.arange(len(CHARACTERS))
    codes = torch.frombuffer(bytearray(text.encode("ascii", errors="replace")), dtype=torch.uint8)
    return numbers[codes.long()]


class CharacterModel(nn.Module):
    """A recurrent network of one layer: 0.28 M parameters."""

    def __init__(self, width: int = 64, hidden: int = 256) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.recurrent = nn.GRU(width, hidden, batch_first=True)
        self.head = nn.Linear(hidden, VOCABULARY)

    def forward(self, characters: Tensor) -> Tensor:
        """Numbers (batch, length) to scores of each next character (batch, length, vocabulary)."""
        scores: Tensor = self.head(self.recurrent(self.embedding(characters))[0])
        return scores


def loss_of(model: nn.Module, windows: Tensor) -> Tensor:
    """The mean cross entropy of each window's characters after the first, in nats."""
    return F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def test_loss(model: nn.Module, text: Text) -> float:
    """Of the test files."""
    return torch.stack([loss_of(model, windows) for windows in text.test.split(64)]).mean().item()
