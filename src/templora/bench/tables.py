"""Scores by position and by length of the document: sums per bin, divided once; and Markdown tables."""

from collections.abc import Iterable, Sequence
from typing import Any

from templora.metrics import Tally, change

# 20K steps show how the gain grows; the wide bins are the paper's.
STEPS = tuple((start, start + 20_000) for start in range(0, 200_000, 20_000))
PAPERS = ((0, 100_000), (100_000, 300_000), (300_000, 500_000), (500_000, None))
LENGTHS = ((0, 100_000), (100_000, 200_000), (200_000, 300_000), (300_000, None))

Bin = tuple[int, int | None]


def by_position(results: Iterable[dict[str, Any]], bins: Sequence[Bin]) -> list[tuple[Bin, Tally, Tally]]:
    """Base and adapted sums of all chunks that start in each bin, over all documents."""
    chunks = [chunk for entry in results for chunk in entry["chunks"]]
    return [(span, *sums(c for c in chunks if _within(c["start"], span))) for span in bins]


def by_length(results: Iterable[dict[str, Any]], bins: Sequence[Bin]) -> list[tuple[Bin, Tally, Tally]]:
    """Base and adapted sums of all documents whose length falls in each bin."""
    entries = list(results)
    return [
        (span, *sums(c for e in entries if _within(e["tokens"], span) for c in e["chunks"])) for span in bins
    ]


def _within(value: int, span: Bin) -> bool:
    return span[0] <= value and (span[1] is None or value < span[1])


def sums(chunks: Iterable[dict[str, Any]]) -> tuple[Tally, Tally]:
    """Base and adapted sums of these chunks."""
    base, adapted = Tally(), Tally()
    for chunk in chunks:
        adapted.add(chunk["adapted_nll"], chunk["tokens"])
        base.add(chunk["base_nll"], chunk["tokens"])
    return base, adapted


def markdown(rows: Iterable[tuple[Bin, Tally, Tally]], first: str) -> str:
    """A table of the bins that hold tokens; `first` names the first column."""
    cells = [
        [
            _name(span),
            f"{adapted.tokens:,}",
            _number(base.perplexity),
            _number(adapted.perplexity),
            _change(base, adapted),
        ]
        for span, base, adapted in rows
        if adapted.tokens
    ]
    return table([first, "tokens", "base", "adapter", "change"], cells)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are right-aligned."""
    lines = [head, [":--", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _name(span: Bin) -> str:
    start, stop = span
    return f"{start // 1000}K+" if stop is None else f"{start // 1000}–{stop // 1000}K"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _change(base: Tally, adapted: Tally) -> str:
    fraction = change(base.perplexity, adapted.perplexity)
    return "–" if fraction is None else f"{100 * fraction:+.1f} %"
