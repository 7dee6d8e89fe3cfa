"""Whether base and adapter slow down as a text grows: the same work late in a short text and in a long one.

Both texts are sessions of one process on one base, and take turns. What is timed is as many tokens as lie
positions allow until the window goes back to the first ones, so that each side does that once; before each
round both are put back to where they were. How they got there is not timed.
"""

import time
from collections.abc import Callable, Iterable
from typing import Any

from benchmarks import shapes
from benchmarks.measure import ratio
from benchmarks.willing import willing
from templora.events import ChunkLearned, Event
from templora.recipe import load

PIECES = 4  # turns in each round
RECENT = 8192  # tokens of the given text before it repeats itself


def given(shape: str, tokens: int) -> list[int]:
    """A text of any length."""
    part = shapes.ids(shape, min(tokens, RECENT))
    return (part * (tokens // len(part) + 1))[:tokens]


def grown(base: Any, ids: list[int], window: int, *, learned: bool) -> Any:
    """A session that has these tokens behind it. learned: each chunk was learned; else only the last few."""
    session = willing(base.session("default", seed=1, window=window, context=window))
    session.extend(ids, "")
    if not learned:
        session.chunk = max(0, (len(ids) - 1) // session.plan.chunk - PIECES)
    for _ in session.learning():
        pass
    return session


def learned_chunks(events: Iterable[Event]) -> int:
    """How many chunks were learned; runs the loop to its end."""
    return sum(isinstance(event, ChunkLearned) for event in events)


def writing(session: Any, ids: list[int]) -> int:
    """Write as many tokens, with the default sampling, and learn it."""
    return learned_chunks(session.write(len(ids), score_base=False))


def reading(session: Any, ids: list[int]) -> int:
    """Read a given piece and learn it."""
    session.extend(ids, "")
    return learned_chunks(session.learning())


def rounds_of(
    sessions: dict[str, Any], run: Callable[[Any, list[int]], int], pieces: list[list[int]], rounds: int
) -> dict[str, Any]:
    """Seconds of each side in each round, and the chunks that it learned in the last."""
    states = {name: session.state() for name, session in sessions.items()}
    seconds: dict[str, list[float]] = {name: [] for name in sessions}
    learned: dict[str, int] = {}
    for _ in range(rounds):
        for name, session in sessions.items():
            session.load_state(states[name])
        spent, learned = dict.fromkeys(sessions, 0.0), dict.fromkeys(sessions, 0)
        for number, piece in enumerate(pieces):
            names = list(sessions) if number % 2 == 0 else list(sessions)[::-1]
            for name in names:
                started = time.perf_counter()
                learned[name] += run(sessions[name], piece)
                spent[name] += time.perf_counter() - started
        for name, taken in spent.items():
            seconds[name].append(taken)
    return {"seconds": seconds, "learned": learned, "speed": ratio(seconds["short"], seconds["long"])}


def measure(shape: str, window: int, short: int, long: int, rounds: int, learned: bool) -> dict[str, Any]:
    """Rates over the last tokens of a short text and of a long one; for a process of its own."""
    base = shapes.base(shape, positions=2 * window + load("default").sinks)
    cycle = window
    text = given(shape, long)
    sessions = {
        name: grown(base, text[: tokens - cycle], window, learned=learned)
        for name, tokens in (("short", short), ("long", long))
    }
    size = cycle // PIECES
    pieces = [text[at : at + size] for at in range(0, PIECES * size, size)]
    kinds = {"write": writing, "learn": reading}
    runs = {kind: rounds_of(sessions, run, pieces, rounds) for kind, run in kinds.items()}
    sizes = {"shape": shape, "window": window, "short": short, "long": long, "tokens": PIECES * size}
    return {**sizes, "history_learned": learned, **runs}
