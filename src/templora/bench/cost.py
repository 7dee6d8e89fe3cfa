"""What a window costs, and what it gives, with an adapter and without: the Pareto picture.

The base is scored as one does without an adapter, in strides of a quarter of its window, so that a long
window is not made again for each few tokens.
"""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from statistics import median
from time import perf_counter
from typing import Any

import torch

from templora.base import load
from templora.bench.result import peak_mb
from templora.bench.tables import table
from templora.recipe import Recipe, fitted
from templora.tasks.score import Scores, scoring

UNLIMITED = 4096  # tokens: the positions of a base that names none
LEAST_STRIDE = 64  # tokens that the base scores at once


@dataclass(frozen=True, slots=True)
class Cost:
    """One window, with or without an adapter.

    perplexity: of the text. scoring, writing: seconds per 1,000 tokens, learning and all. peak_mb: the
    largest resident memory of the process that did both.
    """

    window: int
    adapter: bool
    perplexity: float
    scoring: float
    writing: float
    peak_mb: float


def windows(positions: int, chunk: int) -> list[int]:
    """128, 256, 512, … and the largest that leaves room for a quarter of all positions, or for a chunk.

    chunk: with the sinks.
    """
    largest = positions - max(chunk, positions // 4)
    doubling = [128 << power for power in range(20) if 128 << power < largest]
    return [*doubling, largest]


def costs(
    model: str, recipe: Recipe, text: str, tokens: int, written: int, rounds: int, say: Callable[[str], None]
) -> list[Cost]:
    """Each window with and without the adapter, each time in a process of its own.

    All are measured in turn, and `rounds` times; times and memory are the medians.

    Args:
        recipe: its window and context are replaced.
        tokens: of the text, scored. written: tokens that are written after it.
        say: is told how far it is.
    """
    positions = load(model).positions
    _, recipe = fitted(recipe, positions)
    sizes = windows(positions or UNLIMITED, recipe.sinks + recipe.chunk)
    cases = [(window, adapter) for window in sizes for adapter in (False, True)]
    found: dict[tuple[int, bool], list[Cost]] = {case: [] for case in cases}
    for number in range(rounds):
        for case in cases:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                job = pool.submit(
                    _measure, model, recipe, text, tokens, written, torch.get_num_threads(), *case
                )
                found[case].append(job.result())
            say(f"round {number + 1}: {_line(found[case][-1])}")
    return [_middle(runs) for runs in found.values()]


def _measure(
    model: str, recipe: Recipe, text: str, tokens: int, written: int, threads: int, window: int, adapter: bool
) -> Cost:
    torch.set_num_threads(threads)
    base = load(model)
    changes: dict[str, Any] = {"window": window, "context": window}
    if not adapter:
        most = (base.positions or UNLIMITED) - window - recipe.sinks
        stride = min(max(LEAST_STRIDE, window // 4), most)
        changes |= {"learning_rate": 0.0, "chunk": stride}
    session = base.session(recipe, **changes)
    scores, started = Scores(), perf_counter()
    for event in scoring(session, base.encode(text)[:tokens], score_base=False):
        scores.take(event)
    scored = perf_counter()
    for _ in session.write(written, score_base=False):
        pass
    ended = perf_counter()
    perplexity = scores.adapted.perplexity
    assert perplexity is not None
    return Cost(
        window,
        adapter,
        perplexity,
        1000 * (scored - started) / scores.adapted.tokens,
        1000 * (ended - scored) / written,
        peak_mb(),
    )


def _middle(runs: Sequence[Cost]) -> Cost:
    names = ("scoring", "writing", "peak_mb")
    return replace(runs[0], **{name: median(getattr(run, name) for run in runs) for name in names})


def _line(row: Cost) -> str:
    side = "adapter" if row.adapter else "base"
    return (
        f"window {row.window}, {side}: perplexity {row.perplexity:.2f}, "
        f"s per 1,000 tokens {row.scoring:.2f} scored, {row.writing:.2f} written"
    )


def cost_table(rows: Iterable[Cost]) -> str:
    """Markdown: what each window costs and gives, with and without the adapter."""
    cells = [
        [
            str(r.window),
            "adapter" if r.adapter else "base",
            f"{r.perplexity:.2f}",
            f"{r.scoring:.2f}",
            f"{r.writing:.2f}",
            f"{r.peak_mb:,.0f}",
        ]
        for r in rows
    ]
    heads = ["window", "", "perplexity", "s per 1,000 tokens scored", "written", "peak MB"]
    return table(heads, cells)
