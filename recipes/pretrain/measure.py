"""Loss on held-out text: per token, per byte, per character, and by position in the window."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

BINS = (0, 256, 512, 1024, 2048)


def _byte_of_letter() -> dict[str, int]:
    # Byte-level BPE writes each byte as one printable letter; bytes that print are themselves, the
    # rest take the letters from U+0100 on, in order.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(rest)}


@dataclass(frozen=True)
class TextLengths:
    """Bytes and characters of each token, `[vocab]` each. Special tokens have none."""

    byte_counts: np.ndarray
    character_counts: np.ndarray

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> TextLengths:
        """Read them off a byte-level BPE vocabulary."""
        alphabet = _byte_of_letter()
        special = {i for i, t in tokenizer.get_added_tokens_decoder().items() if t.special}
        size = tokenizer.get_vocab_size()
        byte_counts, character_counts = np.zeros(size, np.int64), np.zeros(size, np.int64)
        for token, index in tokenizer.get_vocab().items():
            if index in special:
                continue
            content = [alphabet[letter] for letter in token]
            byte_counts[index] = len(content)
            # A UTF-8 character is counted at its first byte; continuation bytes are 10xxxxxx.
            character_counts[index] = sum(byte & 0xC0 != 0x80 for byte in content)
        return cls(byte_counts, character_counts)


@dataclass
class LossCount:
    """Sums of loss, tokens and text, and of loss by position; divided only to report."""

    lengths: TextLengths
    nats: float = 0.0
    tokens: int = 0
    byte_count: int = 0
    characters: int = 0
    bin_nats: list[float] = field(default_factory=lambda: [0.0] * (len(BINS) - 1))
    bin_tokens: list[int] = field(default_factory=lambda: [0] * (len(BINS) - 1))

    def add(self, losses: Tensor, targets: Tensor) -> None:
        """Count scored tokens: their losses in nats and their ids, same shape."""
        ids = targets.cpu().numpy()
        self.nats += float(losses.double().sum())
        self.tokens += ids.size
        self.byte_count += int(self.lengths.byte_counts[ids].sum())
        self.characters += int(self.lengths.character_counts[ids].sum())

    def add_positions(self, losses: Tensor) -> None:
        """Count `[rows, window]` losses by their position in the window."""
        for index, (start, end) in enumerate(pairwise(BINS)):
            part = losses[:, start:end]
            self.bin_nats[index] += float(part.double().sum())
            self.bin_tokens[index] += part.numel()

    def report(self) -> dict[str, float | int | dict[str, float]]:
        """Return nats per token, bits per byte and character, and nats per token by position."""
        bits = self.nats / math.log(2)
        return {
            "tokens": self.tokens,
            "nats_per_token": round(self.nats / max(self.tokens, 1), 4),
            "bits_per_byte": round(bits / max(self.byte_count, 1), 4),
            "bits_per_character": round(bits / max(self.characters, 1), 4),
            "nats_by_position": {
                f"{start}-{end}": round(nats / tokens, 4)
                for (start, end), nats, tokens in zip(
                    pairwise(BINS), self.bin_nats, self.bin_tokens, strict=True
                )
                if tokens
            },
        }


@dataclass
class MatchedPositions:
    """What `earlier` more tokens of context are worth, on the same tokens, by what they had without them.

    Bins by position hold different tokens, and one chapter is easier than another; here each is compared
    with itself, in two windows that overlap by half.
    """

    earlier: int
    gains: dict[str, list[float]] = field(default_factory=dict)

    def add(self, losses: Tensor, later_losses: Tensor) -> None:
        """Compare `[window]` losses with those of the window that begins `earlier` tokens later."""
        for start, end in pairwise(BINS):
            if end <= self.earlier:
                moved = slice(self.earlier + start, self.earlier + end)
                gain = later_losses[start:end].mean() - losses[moved].mean()
                self.gains.setdefault(f"{start}-{end}", []).append(float(gain))

    def report(self) -> dict[str, list[float]]:
        """Return mean gain and its standard error over windows, in nats per token, by position."""
        values = {name: np.array(gains) for name, gains in self.gains.items()}
        return {
            name: [round(float(v.mean()), 4), round(float(v.std(ddof=1) / len(v) ** 0.5), 4)]
            for name, v in values.items()
            if len(v) > 1
        }


def sample_windows(stream: np.ndarray, window: int, count: int) -> Tensor:
    """Return `count` windows spread evenly over a stream, `[count, window + 1]`."""
    starts = np.linspace(0, len(stream) - window - 1, count).astype(int)
    return torch.from_numpy(np.stack([stream[s : s + window + 1] for s in starts]).astype(np.int64))
