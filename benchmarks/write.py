"""Writing and learning, end to end, against the plain loop; and what the adapter costs our own decoder.

All sides write greedily after the same given text. `exact` computes what the plain loop computes, so it must
write the same tokens; `default` is what a user gets; `base` is our decoder with nothing to learn.
"""

import time
from typing import Any

from benchmarks import shapes
from benchmarks.learn import start_of
from benchmarks.measure import Column, Spread, in_child, parser, peak_mb, ratio, save_table
from benchmarks.plain import PlainLoop

SIDES: dict[str, tuple[str, dict[str, Any]]] = {
    "exact": ("paper", {"dropout": 0.0, "chunk": 256}),
    "cached": ("paper", {"dropout": 0.0, "chunk": 256, "context_from": "cache", "cache": "reuse"}),
    "default": ("default", {}),
    "base": ("default", {"learning_rate": 0.0}),
}


def ours(shape: str, given: int, tokens: int, window: int, side: str) -> tuple[float, Any, float]:
    """Seconds of writing, the tokens, peak memory in MB."""
    recipe, keys = SIDES[side]
    session = shapes.base(shape).session(recipe, seed=1, window=window, context=window, **keys)
    session.extend(shapes.ids(shape, 1 + given), "")
    for _ in session.learning():
        pass
    started = time.perf_counter()
    for _ in session.write(tokens, temperature=0.0, repetition_penalty=1.0, score_base=False):
        pass
    return time.perf_counter() - started, session.ids[1 + given :], peak_mb()


def plain(shape: str, given: int, tokens: int, window: int, start: Any) -> tuple[float, Any, float]:
    """The same, of the plain loop."""
    loop, ids = PlainLoop(shapes.build(shape), start), shapes.ids(shape, 1 + given)
    chunk = SIDES["exact"][1]["chunk"]
    loop.score(ids, window, chunk)
    started = time.perf_counter()
    text = loop.write(ids, tokens, window, chunk)
    return time.perf_counter() - started, text[1 + given :], peak_mb()


def measure(shape: str, given: int, tokens: int, window: int, rounds: int) -> dict[str, Any]:
    """All of one shape."""
    start = start_of(shape)
    seconds: dict[str, list[float]] = {"plain": [], **{side: [] for side in SIDES}}
    texts: dict[str, Any] = {}
    peaks: dict[str, float] = {}
    for _ in range(rounds):
        for side, made in seconds.items():
            run, how = (plain, start) if side == "plain" else (ours, side)
            taken, texts[side], peaks[side] = in_child(run, shape, given, tokens, window, how)
            made.append(taken)
    pairs = list(zip(texts["exact"], texts["plain"], strict=True))
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), tokens)
    # Two orders of adding up part ways where two words are equally likely; before that all must agree.
    assert same >= min(tokens, SIDES["exact"][1]["chunk"]), f"the texts part ways after {same} tokens"
    return {
        "shape": shape,
        "tokens": tokens,
        "window": window,
        "same_tokens": same,
        "seconds": seconds,
        "peak_mb": peaks,
        "faster": {side: ratio(seconds["plain"], seconds[side]) for side in SIDES},
        "overhead": ratio(seconds["default"], seconds["base"]),
    }


def main() -> None:
    """Measure and save."""
    arguments = parser(__doc__ or "")
    arguments.add_argument("--tokens", type=int, default=1024)
    arguments.add_argument("--shapes", nargs="+", default=["novelist", "30m"], choices=[*shapes.NAMES])
    wishes = arguments.parse_args()
    names, given, tokens, window = wishes.shapes, 1024, wishes.tokens, 1024
    if wishes.toy:
        names, given, tokens, window = shapes.TOY, 256, 256, 64
    results = [measure(name, given, tokens, window, wishes.rounds) for name in names]
    columns: dict[str, Column] = {
        "base": lambda r: r["shape"],
        "plain loop, tokens/s": lambda r: f"{r['tokens'] / Spread.of(r['seconds']['plain']).median:.0f}",
        "`exact` is faster": lambda r: r["faster"]["exact"].text(" ×"),
        "`cached`": lambda r: r["faster"]["cached"].text(" ×"),
        "`default`": lambda r: r["faster"]["default"].text(" ×"),
        "`default` against no adapter: time": lambda r: r["overhead"].text(" ×"),
        "tokens alike": lambda r: f"{r['same_tokens']} of {r['tokens']}",
    }
    save_table(wishes.out, "write", results, columns)


if __name__ == "__main__":
    main()
