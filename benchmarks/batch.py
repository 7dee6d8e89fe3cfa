"""Several texts at once on one base against one after another: score and write, by how many there are.

Recipe `default`, as a user gets it; written texts have a window to read first. At once is either a thread for
each, as a CPU runs a small base, or one pass for all. All sides must come to the same NLL.
"""

import time
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

from benchmarks import shapes
from benchmarks.measure import (
    GREEDY,
    Column,
    Spread,
    cases,
    in_child,
    parse,
    parser,
    peak_mb,
    ratio,
    save_table,
    sizes,
)
from benchmarks.willing import willing
from templora.base import Base
from templora.batch import Batch
from templora.crew import Crew
from templora.events import ChunkScored, End, Event
from templora.half import native
from templora.pen import Wishes
from templora.session import Session
from templora.tasks import batch as together
from templora.tasks.score import scoring

SAME = 1e-3 if native() else 1e-4  # bf16 products of other sizes round otherwise
OTHERS = ("threads", "lockstep")
STEP = 16  # tokens by which one text is further than the last

Sizes = dict[str, int]


def documents(shape: str, texts: int, tokens: int) -> list[list[int]]:
    """Token ids of texts that differ, each one token longer than what is scored of it."""
    ids = shapes.ids(shape, 1 + tokens + STEP * (texts - 1))
    return [ids[STEP * n : STEP * n + 1 + tokens] for n in range(texts)]


def loop(task: str, text: Session, ids: list[int], tokens: int) -> Iterator[Event]:
    """All that is done with one text: scored, or its window read and written on."""
    if task == "score":
        yield from scoring(text, ids)
        return
    willing(text).extend(ids, "")
    yield from text.learning(score_base=True)
    yield from text.write(tokens, sampling=GREEDY)


def alone(task: str, base: Base, documents: list[list[int]], tokens: int, sizes: Sizes) -> Iterator[Event]:
    """One after another."""
    for ids in documents:
        session = base.session("default", seed=1, **sizes)
        yield from loop(task, session, ids, tokens)
        session.discard()


def threads(task: str, base: Base, documents: list[list[int]], tokens: int, sizes: Sizes) -> Iterator[Event]:
    """A thread for each."""
    crew = Crew(base, size=len(documents), **sizes)
    loops = (partial(loop, task, ids=ids, tokens=tokens) for ids in documents)
    yield from let_go(crew.run(enumerate(loops), seed=1))


def lockstep(task: str, base: Base, documents: list[list[int]], tokens: int, sizes: Sizes) -> Iterator[Event]:
    """One pass for all."""
    batch = Batch(base, size=len(documents), **sizes)
    if task == "score":
        yield from let_go(together.scoring(batch, documents, seed=1))
        return
    group = [willing(batch.text(own, seed=1, number=number)) for number, own in enumerate(documents)]
    yield from let_go(together.reading(batch, group, score_base=True))
    yield from let_go(together.going_on(batch, Wishes(tokens, GREEDY)))


def let_go(events: Iterable[tuple[Session, Event | None]]) -> Iterator[Event]:
    """Discard each text at its end."""
    for text, event in events:
        if event is not None:
            yield event
        if event is None or isinstance(event, End):
            text.discard()


SIDES = {"alone": alone, "threads": threads, "lockstep": lockstep}


def timed(
    side: str, task: str, shape: str, texts: int, tokens: int, sizes: Sizes
) -> tuple[float, float, float]:
    """Seconds, NLL of all in nats, and peak memory in MB."""
    base, length = shapes.base(shape), tokens if task == "score" else sizes["window"]
    own = documents(shape, texts, length)
    started = time.perf_counter()
    events = SIDES[side](task, base, own, tokens, sizes)
    nll = sum(event.adapted_nll for event in events if isinstance(event, ChunkScored))
    return time.perf_counter() - started, nll, peak_mb()


def measure(task: str, shape: str, texts: int, tokens: int, sizes: Sizes, rounds: int) -> dict[str, Any]:
    """One task at one size."""
    made = {side: list[tuple[float, float, float]]() for side in SIDES}
    for _ in range(rounds):
        for side, runs in made.items():
            runs.append(in_child(timed, side, task, shape, texts, tokens, sizes))
    seconds, nll, peak = ({s: [run[i] for run in runs] for s, runs in made.items()} for i in range(3))
    apart = {side: nll[side][0] / nll["alone"][0] - 1 for side in OTHERS}
    # What is written is not given: where two words are equally likely, rounding may choose another text.
    most = SAME if task == "score" else 0.05
    assert all(abs(own) < most for own in apart.values()), f"NLLs are {apart} apart"
    return {
        "task": task,
        "shape": shape,
        "texts": texts,
        "tokens": tokens,
        **sizes,
        "seconds": seconds,
        "peak_mb": {side: max(peaks) for side, peaks in peak.items()},
        "apart": apart,
        "faster": {side: ratio(seconds["alone"], seconds[side]) for side in OTHERS},
    }


def main() -> None:
    """Measure and save."""
    arguments = parser(__doc__ or "", rounds=3)
    sizes(arguments, ["novelist"], [256, 1024], [64], shapes.NAMES)
    arguments.add_argument("--tokens", type=int, default=1024, help="scored or written of each text")
    arguments.add_argument("--texts", type=int, nargs="+", default=[1, 2, 4, 8])
    wishes = parse(arguments)
    wanted, tokens, counts = cases(wishes), wishes.tokens, wishes.texts
    if wishes.toy:
        wanted, tokens, counts = [("toy", 32, 16)], 64, [1, 3]
    results = [
        measure(
            task, shape, texts, tokens, {"window": window, "context": window, "chunk": chunk}, wishes.rounds
        )
        for shape, window, chunk in wanted
        for task in ("score", "write")
        for texts in counts
    ]
    columns: dict[str, Column] = {
        "base": lambda r: r["shape"],
        "task": lambda r: r["task"],
        "window": lambda r: str(r["window"]),
        "texts": lambda r: str(r["texts"]),
        "one by one, tokens/s": lambda r: rate(r, "alone"),
        "a thread for each": lambda r: f"**{r['faster']['threads'].text(' ×')}**",
        "in lockstep": lambda r: f"**{r['faster']['lockstep'].text(' ×')}**",
        "NLL of these": lambda r: ", ".join(f"{100 * r['apart'][side]:+.4f} %" for side in OTHERS),
        "MB of all three": lambda r: ", ".join(f"{peak:.0f}" for peak in r["peak_mb"].values()),
    }
    save_table(wishes.out, "batch", results, columns)


def rate(result: Any, side: str) -> str:
    """Tokens per second of all texts."""
    return f"{result['texts'] * result['tokens'] / Spread.of(result['seconds'][side]).median:.0f}"


if __name__ == "__main__":
    main()
