"""Scoring and learning a text against the plain loop, at the authors' settings, and whether both get its NLL.

`exact` is recipe `paper` without dropout: the same gradients, also through the context. `cached` takes the
context's keys from the cache, which leaves that gradient out; `rounded` also multiplies in bf16, where the
CPU has instructions for it, and is `cached` elsewhere.
"""

import time
from typing import Any

from benchmarks import shapes
from benchmarks.learn import start_of
from benchmarks.measure import (
    CASE,
    Column,
    Spread,
    cases,
    in_child,
    name_of,
    parse,
    parser,
    ratio,
    save_bars,
    save_table,
    shares,
    sizes,
)
from benchmarks.needs import Needs, recipe
from benchmarks.plain import PlainLoop
from benchmarks.roofline import highest, limits, of_shape, share
from templora.events import ChunkScored

CACHED: dict[str, Any] = {"dropout": 0.0, "context_from": "cache", "cache": "reuse"}
SIDES: dict[str, dict[str, Any]] = {
    "exact": {"dropout": 0.0},
    "cached": CACHED,
    "rounded": CACHED | {"precision": "auto"},
}


def ours(shape: str, tokens: int, window: int, chunk: int, changes: dict[str, Any]) -> tuple[float, float]:
    """Seconds, and mean NLL in nats."""
    sizes = {"window": window, "context": window, "chunk": chunk}
    session = shapes.base(shape).session("paper", seed=1, **sizes, **changes)
    session.extend(shapes.ids(shape, 1 + tokens), "")
    started, nll = time.perf_counter(), 0.0
    for event in session.learning():
        nll += event.adapted_nll if isinstance(event, ChunkScored) else 0.0
    return time.perf_counter() - started, nll / tokens


def plain(shape: str, tokens: int, window: int, chunk: int, start: Any) -> tuple[float, float]:
    """The same, of the plain loop."""
    loop, ids = PlainLoop(shapes.build(shape), start), shapes.ids(shape, 1 + tokens)
    started = time.perf_counter()
    nll = loop.score(ids, window, chunk)
    return time.perf_counter() - started, nll


def measure(shape: str, tokens: int, window: int, chunk: int, rounds: int) -> dict[str, Any]:
    """All of one shape and size."""
    start = start_of(shape)
    seconds: dict[str, list[float]] = {"plain": [], **{side: [] for side in SIDES}}
    nll: dict[str, float] = {}
    rates = list[dict[str, float]]()
    for _ in range(rounds):
        rates.append(of_shape(shape, chunk))
        for side, made in seconds.items():
            if side == "plain":
                taken, nll[side] = in_child(plain, shape, tokens, window, chunk, start)
            else:
                taken, nll[side] = in_child(ours, shape, tokens, window, chunk, SIDES[side])
            made.append(taken)
    apart = {side: nll[side] / nll["plain"] - 1 for side in SIDES}
    assert abs(apart["exact"]) < 1e-4, f"NLLs must be the same, but are {apart['exact']:+.2%} apart"
    # Without gradients through the context a little less is learned, the more so the longer the text.
    for side in ("cached", "rounded"):
        assert abs(apart[side]) < 1e-2, f"NLLs must be within 1 %, but are {apart[side]:+.2%} apart"
    faster = {side: ratio(seconds["plain"], seconds[side]) for side in SIDES}
    least = recipe("paper", window=window, context=window, chunk=chunk, **CACHED)
    limit = limits(highest(rates)).seconds(Needs(shapes.build(shape).config, least).scored(tokens))
    return {
        "shape": shape,
        "tokens": tokens,
        "window": window,
        "chunk": chunk,
        "seconds": seconds,
        "nll": nll,
        "apart": apart,
        "faster": faster,
        "rates": highest(rates),
        "limit_seconds": limit,
        "share_of_limit": {side: share(limit, made) for side, made in seconds.items()},
    }


def main() -> None:
    """Measure and save."""
    arguments = parser(__doc__ or "")
    sizes(arguments, ["novelist"], [256, 1024], [256], shapes.NAMES)
    arguments.add_argument("--tokens", type=int, default=2048)
    wishes = parse(arguments)
    wanted, tokens = ([("toy", 16, 16)], 64) if wishes.toy else (cases(wishes), wishes.tokens)
    results = [measure(name, tokens, window, chunk, wishes.rounds) for name, window, chunk in wanted]
    columns: dict[str, Column] = {
        **CASE,
        "plain loop": lambda r: Spread.of(r["seconds"]["plain"]).text(" s"),
        "`exact` is faster": lambda r: r["faster"]["exact"].text(" ×"),
        "`exact`: NLL": lambda r: f"{100 * r['apart']['exact']:+.4f} %",
        "`cached` is faster": lambda r: f"**{r['faster']['cached'].text(' ×')}**",
        "`cached`: NLL": lambda r: f"{100 * r['apart']['cached']:+.4f} %",
        "`rounded` is faster": lambda r: f"**{r['faster']['rounded'].text(' ×')}**",
        "`rounded`: NLL": lambda r: f"{100 * r['apart']['rounded']:+.4f} %",
        "share of the limit: plain, `exact`, `cached`": lambda r: shares(r, "plain", "exact", "cached"),
    }
    save_table(wishes.out, "score", results, columns)
    bars = {
        name_of(r): {side: Spread.of([r["tokens"] / s for s in made]) for side, made in r["seconds"].items()}
        for r in results
    }
    save_bars(wishes.out, "score", bars, "tokens a second")


if __name__ == "__main__":
    main()
