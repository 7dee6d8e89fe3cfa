"""Which training documents share text with texts that must stay unseen.

A shared run of 13 words is counted per document. Single shared runs are quotations (a Bible verse,
a song); a shared share above `limit` means the same book, or a large piece of it. This file knows
nothing about tokenizers or models.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

RUN = 13
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Overlap:
    """One training document's 13-word runs: how many it has, how many are in the unseen texts."""

    title: str
    runs: int
    shared: int

    @property
    def share(self) -> float:
        """The fraction of this document's runs that the unseen texts contain."""
        return self.shared / max(self.runs, 1)


def run_hashes(text: str) -> np.ndarray:
    """Return one 64-bit hash per run of 13 consecutive words, case and punctuation ignored.

    The hashes hold within one process only (Python salts its string hashes).
    """
    words = np.fromiter((hash(word) for word in _WORD.findall(text.lower())), np.int64)
    words = words.view(np.uint64)
    if len(words) < RUN:
        return np.empty(0, np.uint64)
    count = len(words) - RUN + 1
    hashes = np.zeros(count, np.uint64)
    for offset in range(RUN):  # a polynomial in _FACTOR, modulo 2**64
        hashes = hashes * _FACTOR + words[offset : offset + count]
    return hashes


def overlaps(documents: Iterable[tuple[str, str]], unseen: Iterable[str]) -> list[Overlap]:
    """Compare each (title, text) document with all unseen texts together."""
    held = np.unique(np.concatenate([run_hashes(text) for text in unseen]))
    found = []
    for title, text in documents:
        hashes = run_hashes(text)
        found.append(Overlap(title, len(hashes), int(np.isin(hashes, held).sum())))
    return found
