"""What a session on disk costs: the share of time that saving takes, and how long a long one takes to open.

Sides: the same text written in memory and on disk. Beside it, the time inside the store itself is added up,
which noise on the machine cannot hide.
"""

import shutil
import tempfile
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

import templora
from benchmarks.measure import Spread, alternate, parser, ratio, save
from templora.base import Base
from templora.durable import DurableSession
from templora.events import ChunkScored

PROMPT = "It was the last night of October, and the lighthouse keeper had counted the stairs again."


class Saving:
    """Writing on disk, and the seconds of it that went into the store."""

    def __init__(self, base: Base, tokens: int) -> None:
        self.base, self.tokens = base, tokens
        self.shares: list[float] = []
        self.text = ""

    def __call__(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            started = perf_counter()
            session = self.base.session("default", dir=Path(folder) / "s")
            inside = [0.0]
            session.store.journal.append = timed(session.store.journal.append, inside)
            session.store.save = timed(session.store.save, inside)
            self.text = written(session, self.tokens)
            session.close()
            self.shares.append(inside[0] / (perf_counter() - started))


def timed(function: Callable[..., Any], inside: list[float]) -> Callable[..., Any]:
    """The function, adding its seconds up."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        started = perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            inside[0] += perf_counter() - started

    return run


def written(session: Any, tokens: int) -> str:
    """The text after so many tokens."""
    session.read(PROMPT)
    for _ in session.write(tokens):
        pass
    return session.text


def long_session(base: Base, folder: Path, tokens: int) -> None:
    """A journal as writing so many tokens makes it, without the hours of writing; one version at its end."""
    with base.session("default", dir=folder) as session:
        session.read(PROMPT)
        store, chunk = session.store, session.chunk
        while len(session.ids) < tokens:
            span = session.plan.span(chunk)
            while len(session.ids) < span.stop:
                store.own(100 + len(session.ids) % 3000, " word", len(session.ids))
            scored = ChunkScored(chunk, span.start, span.tokens, 150.0, 170.0)
            store.learn(span, True, scored, [scored.as_dict()])
            chunk += 1
        session.chunk = chunk
        session.passes.forget()


def opening(base: Base | None, folder: Path) -> Callable[[], None]:
    """Opens the session; without a base, loads that first."""

    def run() -> None:
        session: DurableSession = templora.resume(folder, base)
        session.store.close()

    return run


def main() -> None:
    """Measure and save."""
    arguments = parser(__doc__ or "")
    arguments.add_argument("--tokens", type=int, default=4096, help="written in each run")
    arguments.add_argument("--long", type=int, default=200_000, help="tokens of the session that is opened")
    wishes = arguments.parse_args()
    torch.set_num_threads(wishes.threads)
    base = templora.load("novelist")
    on_disk, texts = Saving(base, wishes.tokens), list[str]()
    in_memory = lambda: texts.append(written(base.session("default"), wishes.tokens))  # noqa: E731
    writing = alternate({"memory": in_memory, "disk": on_disk}, wishes.rounds)
    assert on_disk.text == texts[0], "both sides must write the same text"
    folder = Path(tempfile.mkdtemp()) / "s"
    try:
        long_session(base, folder, wishes.long)
        size = (folder / "journal.jsonl").stat().st_size
        seconds = alternate({"open": opening(base, folder), "load": opening(None, folder)}, wishes.rounds)
    finally:
        shutil.rmtree(folder.parent)
    share = Spread.of([100 * share for share in on_disk.shares])
    cost = ratio(writing["disk"], writing["memory"])
    opened, loaded = Spread.of(seconds["open"]), Spread.of(seconds["load"])
    page = f"""| what | median (least–most of {wishes.rounds}) |
|---|--:|
| writing {wishes.tokens:,} tokens: share of the time inside the store | {share.text(" %")} |
| writing on disk against in memory, same text: time | {cost.text(" ×")} |
| opening a session of {wishes.long:,} tokens ({size / 1e6:.1f} MB of journal) | {opened.text(" s")} |
| the same, loading the base first | {loaded.text(" s")} |"""
    result = {"tokens": wishes.tokens, "long": wishes.long, "share_percent": share, "cost": cost}
    save(wishes.out, "sessions", result | {"open": opened, "load": loaded, "seconds": writing}, page)


if __name__ == "__main__":
    main()
