"""From novels to batches: read, check for overlap, encode once, cut into windows.

The stream of a data set is its documents one after another, each preceded by the boundary token.
Documents are taken as they are, hard-wrapped lines included: the dev novels are wrapped in the same
proportion, and a reader of either kind of text should find its own kind continued.
"""

from __future__ import annotations

import glob
import json
import lzma
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from overlap import overlaps
from tokenizers import Tokenizer

BOUNDARY = "<|endoftext|>"
GROUP_BLOCKS = 64
DOCUMENTS_AT_ONCE = 16  # encoded side by side, a core each


@dataclass(frozen=True)
class Document:
    """One text and its title."""

    title: str
    text: str


def read_documents(path: str | Path) -> list[Document]:
    """Read a `.jsonl.xz` of `{"title", "text"}` lines, or one plain `.txt.xz`."""
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        if str(path).endswith(".txt.xz"):
            return [Document(Path(path).name, lines.read())]
        return [Document(row["title"], row["text"]) for row in map(json.loads, lines)]


def hold_out(documents: list[Document], every: int | None) -> tuple[list[Document], list[Document]]:
    """Part documents into those to train on, and each `every`-th, from which adapters learn where to begin.

    A base has come so far on what it was trained on that an adapter finds nothing to learn there.
    """
    if every is None:
        return documents, []
    held = documents[every - 1 :: every]
    return [document for number, document in enumerate(documents, 1) if number % every], held


def drop_overlapping(
    documents: list[Document], unseen_paths: Sequence[str | Path], limit: float
) -> list[Document]:
    """Return the documents that share at most `limit` of their 13-word runs with unseen texts.

    Prints every document that shares anything, and what it drops.
    """
    unseen = [document.text for path in unseen_paths for document in read_documents(path)]
    if not unseen:
        return documents
    kept = []
    for document, found in zip(
        documents, overlaps([(d.title, d.text) for d in documents], unseen), strict=True
    ):
        verdict = "dropped" if found.share > limit else "kept"
        if found.shared:
            print(f"overlap {verdict} {found.shared}/{found.runs} {found.title}", flush=True)
        if verdict == "kept":
            kept.append(document)
    print(f"overlap: {len(kept)} of {len(documents)} documents kept", flush=True)
    return kept


def encode(documents: list[Document], tokenizer: Tokenizer) -> np.ndarray:
    """Encode documents into one uint16 stream, a boundary before each and one at the end."""
    boundary = tokenizer.token_to_id(BOUNDARY)
    if tokenizer.get_vocab_size() > 2**16:
        raise ValueError("the token cache is uint16: at most 65,536 tokens of vocabulary")
    edge = np.array([boundary], np.uint16)
    pieces = [edge]
    for start in range(0, len(documents), DOCUMENTS_AT_ONCE):
        texts = [document.text for document in documents[start : start + DOCUMENTS_AT_ONCE]]
        for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False):
            pieces += [np.array(encoding.ids, np.uint16), edge]
    return np.concatenate(pieces)


def load_stream(
    data: Path,
    unseen: Sequence[str],
    tokenizer: Tokenizer,
    cache: Path,
    limit: float,
    held: int | None = None,
) -> np.ndarray:
    """Return the encoded training stream, from `cache` when it is there.

    Args:
        data: the training documents (`.jsonl.xz`).
        unseen: glob patterns of the texts that must not be in them.
        tokenizer: encodes the text.
        cache: `.npy` file to read, or to write.
        limit: the share of common 13-word runs above which a document is dropped.
        held: one document in so many is left out.
    """
    if not cache.exists():
        paths = sorted(path for pattern in unseen for path in glob.glob(pattern))
        documents, _ = hold_out(read_documents(data), held)
        documents = drop_overlapping(documents, paths, limit)
        cache.parent.mkdir(parents=True, exist_ok=True)
        np.save(cache, encode(documents, tokenizer))
    return np.load(cache)


@dataclass(frozen=True)
class Batches:
    """Training windows as a pure function of how many tokens were already taken.

    The stream is cut into blocks of the longest window; a pass visits each block once, in random
    order. 64 blocks make a group, whose blocks are cut to the current window and shuffled again, so
    that short windows of one batch come from many places. Nothing but the count needs saving, and
    the window may grow at any point.

    Args:
        stream: token ids, `[tokens]`.
        longest: the longest window, in tokens; every window must divide it.
        seed: fixes the order.
    """

    stream: np.ndarray
    longest: int
    seed: int

    def take(self, taken: int, batch_tokens: int, window: int) -> torch.Tensor:
        """Return the next batch, `[batch_tokens / window, window + 1]`: inputs and the last target.

        Args:
            taken: tokens taken before, a multiple of `batch_tokens`.
            batch_tokens: tokens of this batch.
            window: tokens a row.
        """
        group_tokens = self.group_blocks * self.longest
        group, inside = divmod(taken, group_tokens)
        starts = self._starts(group, window)
        first = inside // window
        chosen = starts[first : first + batch_tokens // window]
        rows = [self.stream[start : start + window + 1] for start in chosen]
        return torch.from_numpy(np.stack(rows).astype(np.int64))

    @property
    def group_blocks(self) -> int:
        """Blocks in a group: 64, or all there are in a tiny stream."""
        return min(GROUP_BLOCKS, self._blocks)

    @property
    def _blocks(self) -> int:
        # One block is given up for the random shift of each pass.
        return (len(self.stream) - 1) // self.longest - 1

    def _starts(self, group: int, window: int) -> np.ndarray:
        groups = self._blocks // self.group_blocks
        epoch, nth = divmod(group, groups)
        rng = np.random.default_rng([self.seed, epoch])
        shift = rng.integers(self.longest)
        blocks = rng.permutation(self._blocks)[nth * self.group_blocks :][: self.group_blocks]
        starts = blocks[:, None] * self.longest + np.arange(0, self.longest, window) + shift
        return np.random.default_rng([self.seed, group]).permutation(starts.ravel())
