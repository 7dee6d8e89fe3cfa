"""Learning and writing with bf16 products against fp32's, by two sessions of one base: time and NLL.

Recipe `default` but for `precision`, every chunk learned. The sessions learn each chunk, and then write each
token, in turn, so that what disturbs one side disturbs the other. `1b` is a random Llama of a billion
parameters.
"""

from statistics import median
from time import perf_counter
from typing import Any

from benchmarks import shapes
from benchmarks.measure import CASE, Column, cases, in_child, parse, parser, ratio, save_table, sizes
from benchmarks.willing import willing
from templora.events import ChunkScored, Token
from templora.half import native

SIDES = ("fp32", "bf16")
WARM = 2  # chunks, and tokens: weights are rounded at the first, and merged


def measure(shape: str, window: int, chunk: int, chunks: int, tokens: int) -> dict[str, Any]:
    """Seconds of each chunk and written token by side, and how far apart their NLLs are over all chunks."""
    base = shapes.base(shape)
    ids = shapes.ids(shape, 1 + window + (WARM + chunks) * chunk)
    given: dict[str, Any] = {"window": window, "context": window, "chunk": chunk, "seed": 1}
    sessions = {side: willing(base.session(precision=side, **given)) for side in SIDES}
    for session in sessions.values():
        session.extend(ids[: 1 + window], "")
        session.chunk = window // chunk  # the first chunks only fill the window
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    nats = {side: {"base": 0.0, "adapted": 0.0} for side in SIDES}
    for at in range(1 + window, len(ids), chunk):
        for side, session in sessions.items():
            session.extend(ids[at : at + chunk], "")
            started = perf_counter()
            events = list(session.learning(score_base=True))
            seconds[side].append(perf_counter() - started)
            (scored,) = (event for event in events if isinstance(event, ChunkScored))
            assert scored.base_nll is not None
            nats[side]["base"] += scored.base_nll
            nats[side]["adapted"] += scored.adapted_nll
    pens = {side: session.write(WARM + tokens) for side, session in sessions.items()}
    writing: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(WARM + tokens):
        for side, pen in pens.items():
            started = perf_counter()
            assert isinstance(next(pen), Token)
            writing[side].append(perf_counter() - started)
    counted = {side: made[WARM:] for side, made in seconds.items()}
    written = {side: made[WARM:] for side, made in writing.items()}
    return {
        "shape": shape,
        "window": window,
        "chunk": chunk,
        "seconds": counted,
        "faster": ratio(counted["fp32"], counted["bf16"]),
        "token_seconds": written,
        "writes_faster": ratio(written["fp32"], written["bf16"]),
        "apart": {who: nats["bf16"][who] / nats["fp32"][who] - 1 for who in ("base", "adapted")},
    }


def main() -> None:
    """Measure and save."""
    arguments = parser(__doc__ or "")
    arguments.add_argument("--count", type=int, default=10, help="chunks of each base")
    arguments.add_argument("--written", type=int, default=40, help="tokens, fewer than a chunk")
    sizes(arguments, [*shapes.NAMES, "1b"], [512], [64], [*shapes.NAMES, "1b"])
    wishes = parse(arguments)
    count, written = wishes.count, wishes.written
    if wishes.toy:
        wishes.shapes, wishes.windows, wishes.chunks, count = ["novelist"], [64], [32], 3
        written = 4
    results = [in_child(measure, *case, count, written) for case in cases(wishes)]
    columns: dict[str, Column] = {
        **CASE,
        "fp32, s a chunk": lambda r: f"{median(r['seconds']['fp32']):.2f}",
        "bf16 learns faster": lambda r: f"**{r['faster'].text(' ×')}**",
        "fp32, ms a token": lambda r: f"{1e3 * median(r['token_seconds']['fp32']):.0f}",
        "bf16 writes faster": lambda r: f"**{r['writes_faster'].text(' ×')}**",
        "NLL of the base": lambda r: f"{r['apart']['base']:+.3%}",
        "of the adapter": lambda r: f"{r['apart']['adapted']:+.3%}",
        "instructions": lambda _: "yes" if native() else "no",
    }
    save_table(wishes.out, "precision", results, columns)


if __name__ == "__main__":
    main()
