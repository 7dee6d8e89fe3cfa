"""The paper's tables on a folder of books, and what a window costs with and without an adapter."""

import resource
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter
from typing import Any

from templora.base import load
from templora.bench.tables import LENGTHS, PAPERS, STEPS, by_length, by_position, markdown, table
from templora.metrics import Tally
from templora.tasks.score import Scores, scoring


@dataclass(frozen=True, slots=True)
class Cost:
    """One row of the cost table: one window, with or without an adapter. seconds: per 1,000 tokens."""

    window: int
    adapter: bool
    perplexity: float
    seconds: float
    peak_mb: float


def windows(positions: int, chunk: int) -> list[int]:
    """128, 256, 512, … and the largest that leaves room for a chunk."""
    largest = positions - chunk
    doubling = [128 << power for power in range(20) if 128 << power < largest]
    return [*doubling, largest]


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


def cost(model: str, recipe: str, text: str, tokens: int, say: Callable[[str], None]) -> list[Cost]:
    """Perplexity, seconds and peak memory for each window, each measured in a process of its own."""
    base = load(model)
    chunk = base.session(recipe).plan.chunk
    sizes = windows(base.positions or 4096, chunk)
    rows: list[Cost] = []
    for window in sizes:
        for adapter in (False, True):
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                row = pool.submit(_measure, model, recipe, text, tokens, window, adapter).result()
            rows.append(row)
            say(f"window {window}, {'adapter' if adapter else 'base'}: perplexity {row.perplexity:.2f}")
    return rows


def _measure(model: str, recipe: str, text: str, tokens: int, window: int, adapter: bool) -> Cost:
    base = load(model)
    ids = base.encode(text)[:tokens]
    changes: dict[str, Any] = {} if adapter else {"learning_rate": 0.0, "chunk": max(64, window // 4)}
    session = base.session(recipe, window=window, context=window, **changes)
    scores, started = Scores(), perf_counter()
    for event in scoring(session, ids, score_base=False):
        scores.take(event)
    seconds = perf_counter() - started
    perplexity = scores.adapted.perplexity
    assert perplexity is not None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return Cost(window, adapter, perplexity, seconds / scores.adapted.tokens * 1000, peak)


def cost_table(rows: Iterable[Cost]) -> str:
    """Markdown: what each window costs and gives, with and without the adapter."""
    cells = [
        [
            str(r.window),
            "adapter" if r.adapter else "base",
            f"{r.perplexity:.2f}",
            f"{r.seconds:.2f}",
            f"{r.peak_mb:,.0f}",
        ]
        for r in rows
    ]
    return table(["window", "", "perplexity", "s per 1,000 tokens", "peak MB"], cells)


def quarters(results: Sequence[dict[str, Any]]) -> str:
    """A sentence: the change of perplexity in the first and last quarter, the mean over the documents."""
    first = [c for entry in results if (c := _change(entry, 0.0, 0.25)) is not None]
    last = [c for entry in results if (c := _change(entry, 0.75, 1.0)) is not None]
    if not (first and last):
        return "Too short for quarters."
    means = (100 * sum(changes) / len(changes) for changes in (first, last))
    return "First quarter {:+.1f} %, last quarter {:+.1f} %.".format(*means)


def _change(entry: dict[str, Any], low: float, high: float) -> float | None:
    base, adapted = Tally(), Tally()
    for chunk in entry["chunks"]:
        if low <= chunk["start"] / entry["tokens"] < high:
            base.add(chunk["base_nll"], chunk["tokens"])
            adapted.add(chunk["adapted_nll"], chunk["tokens"])
    if base.perplexity is None or adapted.perplexity is None:
        return None
    return adapted.perplexity / base.perplexity - 1


def books(folder: Path) -> list[Path]:
    """The .txt and .txt.xz files of a folder, in order of name."""
    return sorted(p for p in folder.iterdir() if p.name.endswith((".txt", ".txt.xz")))
