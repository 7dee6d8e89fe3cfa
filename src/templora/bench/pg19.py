"""The paper's tables on a folder of books."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from templora.bench.tables import LENGTHS, PAPERS, STEPS, by_length, by_position, markdown, sums
from templora.metrics import change
from templora.window import FIRST_TARGET


def tables(results: Sequence[dict[str, Any]]) -> str:
    """Perplexity by position and by length, as Markdown."""
    whole = by_position(results, [(0, None)])
    return "\n\n".join(
        (
            "### All tokens\n\n" + markdown(whole, "position"),
            "### By position\n\n" + markdown(by_position(results, STEPS), "position"),
            "### By position, the paper's bins\n\n" + markdown(by_position(results, PAPERS), "position"),
            "### By length of the document\n\n" + markdown(by_length(results, LENGTHS), "length"),
        )
    )


def quarters(results: Sequence[dict[str, Any]]) -> str:
    """A sentence: the change of perplexity in the first and last quarter, the mean over the documents."""
    first = [c for entry in results if (c := _change(entry, 0.0, 0.25)) is not None]
    last = [c for entry in results if (c := _change(entry, 0.75, 1.0)) is not None]
    if not (first and last):
        return "Too short for quarters."
    means = (100 * sum(changes) / len(changes) for changes in (first, last))
    return "First quarter {:+.1f} %, last quarter {:+.1f} %.".format(*means)


def _change(entry: dict[str, Any], low: float, high: float) -> float | None:
    share = lambda chunk: (chunk["start"] - FIRST_TARGET) / entry["tokens"]  # noqa: E731
    base, adapted = sums(c for c in entry["chunks"] if low <= share(c) < high)
    return change(base.perplexity, adapted.perplexity)


def books(folder: Path) -> list[Path]:
    """The .txt and .txt.xz files of a folder, in order of name."""
    return sorted(p for p in folder.iterdir() if p.name.endswith((".txt", ".txt.xz")))
