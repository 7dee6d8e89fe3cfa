"""Does a name from the first chapter come back in the twentieth? What an adapter is worth on names.

A name is a capitalised word in the middle of a sentence; names are told apart by how long ago each was seen
last. Both sides see the same window and the chunk so far; where the last time is further back than that, the
base cannot know the name from this text, and the adapter only by having learned it.
"""

import math
import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import templora
from benchmarks.measure import Column, in_child, parse, parser, save_table
from templora.base import Base
from templora.commands.inputs import text_of
from templora.events import ChunkScored
from templora.loading import EMBEDDED
from templora.sizes import sizes
from templora.testing import ByteTokenizer, tiny_llama

NAME = re.compile(r"(?<=[a-z,;]\s)[A-Z][a-z]+\b")
LONG = 16  # windows: chapters ago
KINDS = ("never", "in the window", f"up to {LONG} windows ago", "longer ago", "other words")


def nll_by_token(base: Base, ids: Sequence[int], window: int, **changes: Any) -> list[float]:
    """NLL in nats of each token by an adapter that has learned all chunks before it; 0 in the last chunk."""
    session = base.session("default", seed=1, window=window, context=window, **changes)
    found = [0.0] * (len(ids) + 1)  # a token may stand before the text
    session.extend(ids, "")
    for event in session.learning():
        if isinstance(event, ChunkScored) and session.study.nll is not None:
            found[event.start : event.start + event.tokens] = session.study.nll.tolist()
    session.discard()
    return found[len(session.ids) - len(ids) :]


def kinds_of(text: str, ends: Sequence[int], window: int) -> list[tuple[int, int, str]]:
    """Each word of a text as its tokens [start, stop) and its kind. ends: of each token, in characters."""
    names = {match.start() for match in NAME.finditer(text)}
    last = dict[str, int]()
    found: list[tuple[int, int, str]] = []
    for match in re.finditer(r"[^\W\d_]+", text):
        word, start, stop = (
            match.group(),
            bisect_right(ends, match.start()),
            bisect_left(ends, match.end()) + 1,
        )
        kind = KINDS[-1]
        if match.start() in names:
            ago = start - last[word] if word in last else math.inf
            kind = KINDS[0 if ago == math.inf else 1 if ago <= window else 2 if ago <= LONG * window else 3]
        last[word] = start
        found.append((start, stop, kind))
    return found


def measure(model: str, path: Path | None, tokens: int, window: int) -> dict[str, Any]:
    """Words and their NLL under both sides, by kind."""
    base = templora.load(model) if path else templora.load(model=tiny_llama(), tokenizer=ByteTokenizer())
    text = text_of(path or Path(__file__).parent.parent / "LICENSE")
    ids = base.encode(text)[:tokens]
    text = base.decode(ids)
    ends = list(accumulate(sizes(base, ids, text)))
    bare = nll_by_token(base, ids, window, learning_rate=0.0)
    adapted = nll_by_token(base, ids, window)
    sums: dict[str, list[float]] = {kind: [0, 0.0, 0.0] for kind in KINDS}
    for start, stop, kind in kinds_of(text, ends, window):
        if all(nll[start] for nll in (bare, adapted)) and stop <= len(ids):
            own = (1, sum(bare[start:stop]), sum(adapted[start:stop]))
            sums[kind] = [a + b for a, b in zip(sums[kind], own, strict=True)]
    return sums


def main() -> None:
    """Measure and save."""
    arguments = parser(__doc__ or "", rounds=1)
    arguments.add_argument("books", nargs="*", type=Path, help="text files, plain or .xz")
    arguments.add_argument("--model", default=EMBEDDED, help="the base, by name")
    arguments.add_argument("--tokens", type=int, default=65_536)
    arguments.add_argument("--window", type=int, default=256)
    wishes = parse(arguments)
    if not wishes.books and not wishes.toy:
        arguments.error("give the books to measure on")
    tokens, window = (700, 16) if wishes.toy else (wishes.tokens, wishes.window)
    books = [None] if wishes.toy else wishes.books
    made = [in_child(measure, wishes.model, book, tokens, window) for book in books]
    results = [_summed(kind, made) for kind in KINDS]
    columns: dict[str, Column] = {
        "seen last": lambda r: r["seen last"],
        "words": lambda r: f"{r['words']:,}",
        "nats a word: base": lambda r: _mean(r, "base"),
        "adapter": lambda r: _mean(r, "adapted"),
        "times as likely": lambda r: f"**{math.exp((r['base'] - r['adapted']) / (r['words'] or 1)):.2f}**",
    }
    name = "names" if wishes.model == EMBEDDED else f"names-{Path(wishes.model).stem}"
    save_table(wishes.out, name, results, columns)


def _summed(kind: str, books: Sequence[dict[str, list[float]]]) -> dict[str, Any]:
    words, base, adapted = (sum(values) for values in zip(*(book[kind] for book in books), strict=True))
    return {"seen last": kind, "words": round(words), "base": base, "adapted": adapted}


def _mean(result: dict[str, Any], side: str) -> str:
    return f"{result[side] / (result['words'] or 1):.2f}"


if __name__ == "__main__":
    main()
