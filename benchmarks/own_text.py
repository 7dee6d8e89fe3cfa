"""What becomes of a long text that a model writes and learns by itself, with the guard and without it.

Sides: the same base, prompt, seeds and sampling; recipe `default` with the guard and without it, and the base
alone. By position: distinct 4-grams, entropy of the words used, and perplexity under the
bare base; over the whole: the longest span that stands in it twice.
"""

import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import product
from math import log2
from pathlib import Path
from typing import Any

import numpy as np

import templora
from benchmarks.measure import in_child, parser, save
from templora.bench.plot import canvas
from templora.bench.plot import save as save_plot
from templora.bench.tables import table
from templora.events import ChunkScored, ChunkSkipped, RolledBack
from templora.guard import distinct_4
from templora.metrics import Tally

PROMPT = "It was the last night of October, and the lighthouse keeper had counted the stairs again."
SIDES: dict[str, dict[str, Any]] = {
    "guard": {"guard": True},
    "no guard": {"guard": False},
    "no adapter": {"learning_rate": 0.0},
}
PARTS = 20  # of the text, each with its own figures
PICTURES = ("distinct-4", "entropy, bits", "perplexity, bare base")


def write(side: str, tokens: int, window: int, seed: int) -> dict[str, Any]:
    """Write one text; its figures by part, and what the guard did."""
    session = templora.load("novelist").session(
        "default", seed=seed, window=window, context=window, **SIDES[side]
    )
    session.extend(session.base.encode(PROMPT), PROMPT)
    given = len(session.ids)
    scored: list[ChunkScored] = []
    events: Counter[str] = Counter()
    for event in session.write(tokens):
        if isinstance(event, ChunkScored):
            scored.append(event)
        elif isinstance(event, ChunkSkipped):
            events[event.reason] += 1
        elif isinstance(event, RolledBack):
            events[event.kind] += 1
    ids = session.ids[given:]
    size = tokens // PARTS
    parts = [_part(ids[at : at + size], given + at, scored) for at in range(0, PARTS * size, size)]
    whole = Tally()
    for chunk in scored:
        assert chunk.base_nll is not None
        whole.add(chunk.base_nll, chunk.tokens)
    return {
        "side": side,
        "seed": seed,
        "parts": parts,
        "distinct-4": distinct_4(ids),
        "longest repeated span": longest_repeat(ids),
        "perplexity, bare base": whole.perplexity,
        "chunks": len(scored),
        "events": dict(events),
    }


def _part(ids: list[int], start: int, scored: list[ChunkScored]) -> dict[str, float | None]:
    tally = Tally()
    for chunk in scored:
        if start <= chunk.start < start + len(ids):
            assert chunk.base_nll is not None
            tally.add(chunk.base_nll, chunk.tokens)
    return {
        "distinct-4": distinct_4(ids),
        "entropy, bits": entropy(ids),
        "perplexity, bare base": tally.perplexity,
    }


def entropy(ids: list[int]) -> float:
    """Of the distribution of tokens, in bits: it falls when a text uses fewer words."""
    return -sum(n / len(ids) * log2(n / len(ids)) for n in Counter(ids).values())


def longest_repeat(ids: list[int]) -> int:
    """Tokens of the longest span that stands in the text at two places (which may overlap)."""
    data = np.array(ids, np.uint32).tobytes()
    least, most = 0, len(ids) - 1  # a span of `least` tokens stands twice; none longer than `most` does
    while least < most:
        length = (least + most + 1) // 2
        starts = len(ids) - length + 1
        spans = {hash(data[4 * start : 4 * (start + length)]) for start in range(starts)}
        least, most = (length, most) if len(spans) < starts else (least, length - 1)
    return least


def plot(results: list[dict[str, Any]], tokens: int, path: Path) -> None:
    """The figures by position, a panel each, a colour for each side, a line for each seed."""
    figure, panels = canvas(len(PICTURES))
    places = [(part + 0.5) * tokens / PARTS for part in range(PARTS)]
    for axes, name in zip(panels, PICTURES, strict=True):
        named = set[str]()
        for result in results:
            side = result["side"]
            label = None if side in named else side
            named.add(side)
            colour = f"C{list(SIDES).index(side)}"
            axes.plot(places, [part[name] for part in result["parts"]], color=colour, label=label)
        if name.startswith("perplexity"):  # without the guard it grows a thousandfold
            axes.set(xlabel="tokens written", title=name, yscale="log")
        else:
            axes.set(xlabel="tokens written", title=name, ylim=(0, None))
    save_plot(figure, panels, path)


def report(out: Path, tokens: int, window: int, results: list[dict[str, Any]]) -> None:
    """JSON, table and picture of the texts so far."""
    rows = [
        [
            r["side"],
            f"{r['seed']}",
            f"{r['distinct-4']:.3f}",
            f"{min(part['distinct-4'] for part in r['parts']):.3f}",
            f"{r['parts'][-1]['distinct-4']:.3f}",
            f"{r['longest repeated span']}",
            f"{r['parts'][0]['entropy, bits']:.2f} → {r['parts'][-1]['entropy, bits']:.2f}",
            f"{r['perplexity, bare base']:.1f}",
            ", ".join(f"{n} {name}" for name, n in r["events"].items()) or "–",
        ]
        for r in results
    ]
    heads = ["", "seed", "distinct-4", "least part", "last part", "longest repeat", "entropy"]
    heads += ["perplexity, bare base", "guard"]
    about = f"{tokens:,} tokens written by `novelist`, window {window}; least, last: of its {PARTS} parts"
    whole = {"tokens": tokens, "window": window, "results": results}
    save(out, "own_text", whole, f"{about}\n\n{table(heads, rows)}")
    plot(results, tokens, out / "own_text.png")


def earlier(out: Path, tokens: int, window: int) -> list[dict[str, Any]]:
    """The texts of this length and window that are in the folder already."""
    path = out / "own_text.json"
    whole = json.loads(path.read_text("utf-8")) if path.exists() else {}
    same = (whole.get("tokens"), whole.get("window")) == (tokens, window)
    return whole["results"] if same else []


def main() -> None:
    """Write, measure, save: after each text, since they take long."""
    arguments = parser(__doc__ or "", rounds=1)
    arguments.add_argument("--tokens", type=int, default=100_000)
    arguments.add_argument("--window", type=int, default=512)
    arguments.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    arguments.add_argument("--processes", type=int, default=1, help="texts written at the same time")
    arguments.add_argument("--resume", action="store_true", help="keep the texts that are in the folder")
    wishes = arguments.parse_args()
    tokens, window = (400, 64) if wishes.toy else (wishes.tokens, wishes.window)
    jobs = list(product(SIDES, wishes.seeds))
    kept = earlier(wishes.out, tokens, window) if wishes.resume else []
    done = {(r["side"], r["seed"]): r for r in kept}
    with ThreadPoolExecutor(wishes.processes) as pool:
        running = [
            pool.submit(in_child, write, side, tokens, window, seed)
            for side, seed in sorted(jobs, key=lambda job: job[1])  # all sides of a seed, then the next
            if (side, seed) not in done
        ]
        for text in as_completed(running):
            result = text.result()
            done[result["side"], result["seed"]] = result
            report(wishes.out, tokens, window, [done[job] for job in jobs if job in done])


if __name__ == "__main__":
    main()
