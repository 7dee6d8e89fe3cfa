"""Writing while learning against writing and learning in turn, and what a chunk of staleness costs.

Recipe `default`. All sides write after the same given text: `turn`, on one thread of torch; `turn2`, on two;
`parallel`, one thread for the writer and one for the learner; `alone` and `alone2`, with nothing to learn, on
one and on two. What staleness costs is measured on a given text, where both are asked for the same tokens:
scored by the adapter that has learned all before a chunk, and by the one that has learned all but the last
chunk.
"""

import time
from typing import Any

import torch

from benchmarks import shapes
from benchmarks.measure import CASE, GREEDY, Column, Spread, in_child, parser, ratio, save_table
from benchmarks.willing import willing
from templora.adapter import Adapter
from templora.metrics import perplexity
from templora.passes import Passes
from templora.session import Session

# Threads of torch, and what the session is told.
SIDES: dict[str, tuple[int, dict[str, Any]]] = {
    "turn": (1, {}),
    "turn2": (2, {}),
    "parallel": (1, {"parallel": True}),
    "alone": (1, {"learning_rate": 0.0}),
    "alone2": (2, {"learning_rate": 0.0}),
}
ALONE = ("alone", "alone2")


def writing(shape: str, given: int, tokens: int, sizes: dict[str, int], side: str) -> tuple[float, list[int]]:
    """Seconds, with what is learned of the last chunk; and the tokens."""
    threads, own = SIDES[side]
    torch.set_num_threads(threads)
    session = willing(shapes.base(shape).session("default", seed=1, **sizes, **own))
    session.extend(shapes.ids(shape, 1 + given), "")
    for _ in session.learning():
        pass
    started = time.perf_counter()
    for _ in session.write(tokens, sampling=GREEDY, score_base=False):
        pass
    return time.perf_counter() - started, session.ids[1 + given :]


def staleness(shape: str, tokens: int, sizes: dict[str, int]) -> dict[str, float]:
    """Perplexity of a given text by base, newest adapter and the one of a chunk ago."""
    keys: dict[str, Any] = {"guard": False, **sizes}
    session: Session = shapes.base(shape).session("default", seed=1, **keys)
    base, plan, recipe, ids = session.base, session.plan, session.recipe, shapes.ids(shape, 1 + tokens)
    # With keys of its own, as a writer has them.
    behind = Adapter(base.model, recipe, 1)
    passes = Passes(base, behind, plan, recipe)
    nll, scored = {"base": 0.0, "newest": 0.0, "a chunk ago": 0.0}, 0
    for span in plan.spans(len(ids)):
        if span.tokens < plan.chunk:
            break
        with torch.no_grad(), behind.attached():
            nll["a chunk ago"] += float(passes.nll(ids, span, plan.window).sum())
        behind.restore(session.adapter.flat, session.adapter.version)
        first = session.study.finish(ids, span, 0, score_base=True)[0].as_dict()
        nll["newest"] += first["adapted_nll"]
        nll["base"] += first["base_nll"]
        scored += span.tokens
    return {name: perplexity(total, scored) for name, total in nll.items()}


def measure(shape: str, given: int, tokens: int, sizes: dict[str, int], rounds: int) -> dict[str, Any]:
    """All of one shape and size."""
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    texts: dict[str, list[list[int]]] = {side: [] for side in SIDES}
    for _ in range(rounds):
        for side, made in seconds.items():
            taken, text = in_child(writing, shape, given, tokens, sizes, side)
            made.append(taken)
            texts[side].append(text)
    assert all(text == of[0] for of in texts.values() for text in of), "a side wrote another text this time"
    learners = [side for side in SIDES if side not in ALONE]
    return {
        "shape": shape,
        "given": given,
        "tokens": tokens,
        **sizes,
        "seconds": seconds,
        "faster": {side: ratio(seconds[side], seconds["parallel"]) for side in ("turn", "turn2")},
        "overhead": {
            side: {alone: ratio(seconds[side], seconds[alone]) for alone in ALONE} for side in learners
        },
        "perplexity": in_child(staleness, shape, given, sizes),
    }


def speed(result: Any, side: str) -> str:
    """Tokens a second, for a table."""
    return Spread.of([result["tokens"] / seconds for seconds in result["seconds"][side]]).text(digits=0)


def overhead(result: Any, side: str, alone: str) -> str:
    """Its time over that of writing alone, for a table."""
    return result["overhead"][side][alone].text(" ×")


def against_base(result: Any, who: str) -> str:
    """Change of perplexity, for a table."""
    return f"{100 * (result['perplexity'][who] / result['perplexity']['base'] - 1):+.2f} %"


def main() -> None:
    """Measure and save."""
    arguments = parser(__doc__ or "")
    arguments.add_argument("--tokens", type=int, default=1024, help="to write")
    arguments.add_argument("--given", type=int, default=4096, help="tokens before them, scored both ways")
    arguments.add_argument("--window", type=int, default=1024)
    arguments.add_argument("--chunks", nargs="+", type=int, default=[64, 256])
    arguments.add_argument("--shapes", nargs="+", default=["novelist", "30m"], choices=[*shapes.NAMES])
    wishes = arguments.parse_args()
    names, chunks, window = wishes.shapes, wishes.chunks, wishes.window
    given, tokens = wishes.given, wishes.tokens
    if wishes.toy:
        names, chunks, window, given, tokens = shapes.TOY, [32], 64, 256, 128
    results = [
        measure(name, given, tokens, {"window": window, "context": window, "chunk": chunk}, wishes.rounds)
        for name in names
        for chunk in chunks
    ]
    columns: dict[str, Column] = {
        **CASE,
        "in turn, tokens/s": lambda r: speed(r, "turn"),
        "in turn, 2 threads": lambda r: speed(r, "turn2"),
        "parallel, 1 + 1": lambda r: speed(r, "parallel"),
        "parallel is faster": lambda r: r["faster"]["turn"].text(" ×"),
        "than 2 threads": lambda r: r["faster"]["turn2"].text(" ×"),
        "time against nothing to learn: in turn": lambda r: overhead(r, "turn", "alone"),
        "parallel": lambda r: overhead(r, "parallel", "alone"),
        "against that on 2 threads: parallel": lambda r: overhead(r, "parallel", "alone2"),
        "newest adapter: perplexity against the base": lambda r: against_base(r, "newest"),
        "a chunk ago": lambda r: against_base(r, "a chunk ago"),
    }
    save_table(wishes.out, "parallel", results, columns)


if __name__ == "__main__":
    main()
