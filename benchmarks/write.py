"""Writing and learning, end to end, against the plain loop; and what the adapter costs our own decoder.

All sides write greedily after the same given text. `exact` computes what the plain loop computes, so it must
write the same tokens; `default` is what a user gets; `base` is our decoder with nothing to learn, and
`plain base` what transformers' `generate` does without an adapter. Every chunk is learned, whatever it holds.
"""

import time
from typing import Any

from benchmarks import shapes
from benchmarks.learn import start_of
from benchmarks.measure import (
    CASE,
    GREEDY,
    Column,
    Spread,
    cases,
    in_child,
    name_of,
    parse,
    parser,
    peak_mb,
    ratio,
    save_bars,
    save_table,
    shares,
    sizes,
)
from benchmarks.needs import Needs, recipe
from benchmarks.plain import PlainLoop, generate
from benchmarks.roofline import highest, limits, of_shape, share
from benchmarks.willing import willing

PAPER: dict[str, Any] = {"dropout": 0.0}
REUSE: dict[str, Any] = {"context_from": "cache", "cache": "reuse"}
# Recipe `default` keeps its own chunk.
SIDES: dict[str, tuple[str, dict[str, Any]]] = {
    "exact": ("paper", PAPER),
    "cached": ("paper", PAPER | REUSE),
    "default": ("default", {}),
    "base": ("default", {"learning_rate": 0.0}),
}
# Whose work each of the other sides does.
LIKE = {"plain": "cached", "exact": "cached", "plain base": "base"}


def wished(side: str, window: int, chunk: int) -> tuple[str, dict[str, Any]]:
    """Recipe and keys of a side."""
    name, keys = SIDES[side]
    own = {"chunk": chunk} if name == "paper" else {}
    return name, {"window": window, "context": window, **own, **keys}


def ours(shape: str, given: int, tokens: int, window: int, chunk: int, side: str) -> tuple[float, Any, float]:
    """Seconds of writing, the tokens, peak memory in MB."""
    name, keys = wished(side, window, chunk)
    session = willing(shapes.base(shape).session(name, seed=1, **keys))
    session.extend(shapes.ids(shape, 1 + given), "")
    session.chunk = given // session.plan.chunk  # what is given is seen, not learned
    started = time.perf_counter()
    for _ in session.write(tokens, sampling=GREEDY, score_base=False):
        pass
    return time.perf_counter() - started, session.ids[1 + given :], peak_mb()


def plain(
    shape: str, given: int, tokens: int, window: int, chunk: int, start: Any
) -> tuple[float, Any, float]:
    """The same, of the plain loop."""
    loop, ids = PlainLoop(shapes.build(shape), start), shapes.ids(shape, 1 + given)
    loop.chunk = given // chunk
    started = time.perf_counter()
    text = loop.write(ids, tokens, window, chunk)
    return time.perf_counter() - started, text[1 + given :], peak_mb()


def plain_base(
    shape: str, given: int, tokens: int, window: int, chunk: int, _: Any
) -> tuple[float, Any, float]:
    """The same, of the bare model."""
    model, text = shapes.build(shape), shapes.ids(shape, 1 + given)
    started = time.perf_counter()
    while (left := 1 + given + tokens - len(text)) > 0:
        text += generate(model, text[-window:], min(chunk, left))
    return time.perf_counter() - started, text[1 + given :], peak_mb()


def limit(
    shape: str, given: int, tokens: int, window: int, chunk: int, rates: dict[str, float]
) -> dict[str, float]:
    """The least seconds for what each side does."""
    config, best = shapes.build(shape).config, limits(rates)
    least = dict[str, float]()
    for side in SIDES:
        name, keys = wished(side, window, chunk)
        needs = Needs(config, recipe(name, **keys))
        least[side] = best.seconds(needs.written(tokens, given, learned=side != "base"))
    return least | {side: least[like] for side, like in LIKE.items()}


def measure(shape: str, tokens: int, window: int, chunk: int, rounds: int) -> dict[str, Any]:
    """All of one shape and size. The window is full from the first token on."""
    given = -(-window // chunk) * chunk
    start, size = start_of(shape), (shape, given, tokens, window, chunk)
    runs = {
        "plain": (plain, start),
        "plain base": (plain_base, None),
        **{side: (ours, side) for side in SIDES},
    }
    seconds: dict[str, list[float]] = {side: [] for side in runs}
    texts: dict[str, Any] = {}
    peaks: dict[str, float] = {}
    rates = list[dict[str, float]]()
    for _ in range(rounds):
        rates.append(of_shape(shape, chunk))
        for side, (run, how) in runs.items():
            taken, texts[side], peaks[side] = in_child(run, *size, how)
            seconds[side].append(taken)
    pairs = list(zip(texts["exact"], texts["plain"], strict=True))
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), tokens)
    # Two orders of adding up part ways where two words are equally likely; before that all must agree.
    assert same >= min(tokens, chunk), f"the texts part ways after {same} tokens"
    least = limit(*size, highest(rates))
    return {
        "shape": shape,
        "tokens": tokens,
        "window": window,
        "chunk": chunk,
        "same_tokens": same,
        "seconds": seconds,
        "peak_mb": peaks,
        "faster": {side: ratio(seconds["plain"], seconds[side]) for side in SIDES},
        "overhead": ratio(seconds["default"], seconds["base"]),
        "overhead_plain_base": ratio(seconds["default"], seconds["plain base"]),
        "rates": highest(rates),
        "limit_seconds": least,
        "share_of_limit": {side: share(least[side], made) for side, made in seconds.items()},
    }


def speed(result: Any, side: str) -> Spread:
    """Tokens a second."""
    return Spread.of([result["tokens"] / seconds for seconds in result["seconds"][side]])


def main() -> None:
    """Measure and save."""
    arguments = parser(__doc__ or "", rounds=2)
    sizes(arguments, ["novelist", "30m"], [1024], [256], shapes.NAMES)
    arguments.add_argument("--tokens", type=int, default=2048)
    wishes = parse(arguments)
    wanted, tokens = cases(wishes), wishes.tokens
    if wishes.toy:
        wanted, tokens = [("toy", 64, 64)], 256
    results = [measure(name, tokens, *size, wishes.rounds) for name, *size in wanted]
    columns: dict[str, Column] = {
        **CASE,
        "plain loop, tokens/s": lambda r: f"{speed(r, 'plain').median:.0f}",
        "without adapter": lambda r: f"{speed(r, 'plain base').median:.0f}",
        "`exact` is faster": lambda r: r["faster"]["exact"].text(" ×"),
        "`cached`": lambda r: r["faster"]["cached"].text(" ×"),
        "`default`": lambda r: r["faster"]["default"].text(" ×"),
        "`default` against no adapter: time": lambda r: r["overhead"].text(" ×"),
        "against plain without": lambda r: r["overhead_plain_base"].text(" ×"),
        "tokens alike": lambda r: f"{r['same_tokens']} of {r['tokens']}",
        "share of the limit: plain, `exact`, `default`, `base`": lambda r: shares(
            r, "plain", "exact", "default", "base"
        ),
    }
    save_table(wishes.out, "write", results, columns)
    bars = {name_of(r): {side: speed(r, side) for side in r["seconds"]} for r in results}
    save_bars(wishes.out, "write", bars, "tokens a second", digits=0)


if __name__ == "__main__":
    main()
