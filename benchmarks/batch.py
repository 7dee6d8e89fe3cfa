"""Several texts at once on one base against one after another: score and write, by how many there are.

Recipe `default`, as a user gets it. Both sides must come to the same NLL.
"""

import time
from typing import Any

from benchmarks import shapes
from benchmarks.measure import GREEDY, Column, Spread, in_child, parse, parser, ratio, save_table
from benchmarks.willing import willing
from templora.batch import Batch
from templora.events import ChunkScored
from templora.half import native
from templora.pen import Wishes
from templora.tasks import batch as together
from templora.tasks.score import scoring

SAME = 1e-3 if native() else 1e-4  # bf16 products of other sizes round otherwise
STEP = 16  # tokens by which one text is further than the last


def documents(shape: str, texts: int, tokens: int) -> list[list[int]]:
    """Token ids of texts that differ, each one token longer than what is scored of it."""
    ids = shapes.ids(shape, 1 + tokens + STEP * (texts - 1))
    return [ids[STEP * n : STEP * n + 1 + tokens] for n in range(texts)]


def sum_of(events: Any) -> float:
    """Summed NLL of the chunks that were scored, in nats."""
    return sum(event.adapted_nll for event in events if isinstance(event, ChunkScored))


def alone(task: str, shape: str, texts: int, tokens: int, sizes: dict[str, int]) -> tuple[float, float]:
    """Seconds of one after another, and summed NLL in nats."""
    base, spent, nll = shapes.base(shape), 0.0, 0.0
    for ids in documents(shape, texts, tokens):
        session = base.session("default", seed=1, **sizes)
        if task == "write":
            willing(session).extend(ids, "")
            for _ in session.learning(score_base=True):
                pass
        started = time.perf_counter()
        events = scoring(session, ids) if task == "score" else session.write(tokens, sampling=GREEDY)
        nll += sum_of(events)
        spent += time.perf_counter() - started
        session.discard()
    return spent, nll


def batched(task: str, shape: str, texts: int, tokens: int, sizes: dict[str, int]) -> tuple[float, float]:
    """The same, of all of them at once."""
    batch, ids = Batch(shapes.base(shape), size=texts, **sizes), documents(shape, texts, tokens)
    if task == "score":
        started = time.perf_counter()
        nll = sum_of(event for _, event in together.scoring(batch, ids, seed=1))
        return time.perf_counter() - started, nll
    group = [willing(batch.text(own, seed=1, number=number)) for number, own in enumerate(ids)]
    for _ in together.reading(batch, group, score_base=True):
        pass
    started = time.perf_counter()
    nll = sum_of(event for _, event in together.going_on(batch, Wishes(tokens, GREEDY)))
    return time.perf_counter() - started, nll


def measure(
    task: str, shape: str, texts: int, tokens: int, sizes: dict[str, int], rounds: int
) -> dict[str, Any]:
    """One task at one size."""
    seconds: dict[str, list[float]] = {"alone": [], "batched": []}
    nll: dict[str, float] = {}
    for _ in range(rounds):
        for side, run in (("alone", alone), ("batched", batched)):
            taken, nll[side] = in_child(run, task, shape, texts, tokens, sizes)
            seconds[side].append(taken)
    apart = nll["batched"] / nll["alone"] - 1
    # What is written is not given: where two words are equally likely, rounding may choose another text.
    assert abs(apart) < (SAME if task == "score" else 0.05), f"NLLs are {apart:+.4%} apart"
    return {
        "task": task,
        "shape": shape,
        "texts": texts,
        "tokens": tokens,
        **sizes,
        "seconds": seconds,
        "apart": apart,
        "faster": ratio(seconds["alone"], seconds["batched"]),
    }


def main() -> None:
    """Measure and save."""
    arguments = parser(__doc__ or "", rounds=3)
    arguments.add_argument("--tokens", type=int, default=1024, help="scored or written of each text")
    arguments.add_argument("--texts", type=int, nargs="+", default=[1, 2, 4, 8])
    arguments.add_argument("--windows", type=int, nargs="+", default=[256, 1024])
    wishes = parse(arguments)
    shape, tokens, counts, windows, chunk = "novelist", wishes.tokens, wishes.texts, wishes.windows, 64
    if wishes.toy:
        shape, tokens, counts, windows, chunk = "toy", 64, [1, 3], [32], 16
    results = [
        measure(task, shape, texts, tokens, {"window": w, "context": w, "chunk": chunk}, wishes.rounds)
        for task in ("score", "write")
        for w in windows
        for texts in counts
    ]
    columns: dict[str, Column] = {
        "base": lambda r: r["shape"],
        "task": lambda r: r["task"],
        "window": lambda r: str(r["window"]),
        "texts": lambda r: str(r["texts"]),
        "one by one, tokens/s": lambda r: rate(r, "alone"),
        "at once, tokens/s": lambda r: rate(r, "batched"),
        "faster": lambda r: f"**{r['faster'].text(' ×')}**",
        "NLL": lambda r: f"{100 * r['apart']:+.4f} %",
    }
    save_table(wishes.out, "batch", results, columns)


def rate(result: Any, side: str) -> str:
    """Tokens per second of all texts."""
    return f"{result['texts'] * result['tokens'] / Spread.of(result['seconds'][side]).median:.0f}"


if __name__ == "__main__":
    main()
