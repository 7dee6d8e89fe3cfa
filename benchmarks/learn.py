"""One learning step against the plain loop, at the authors' settings: time, peak memory, and the same NLL.

`rounded` is ours with bf16 products, where the CPU has instructions for them; elsewhere it is the same.

Window = context, two epochs. Our step counts the pass over the context that makes its keys, and the
pass that scores the chunk, which is its first epoch; the plain loop's scoring pass is not counted. The chunks
that only fill the context are skipped on both sides, so that every step sees all of it. The first chunk's NLL
must be the same on both sides; after a step they part, for ours takes no gradient through the context.
"""

import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks import shapes
from benchmarks.measure import (
    CASE,
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
    wait,
)
from benchmarks.needs import Needs, recipe
from benchmarks.plain import PlainLoop
from benchmarks.roofline import highest, limits, of_shape, share
from templora.base import Base
from templora.events import ChunkLearned, ChunkScored

# The context's keys without gradients; the rest is recipe `paper`.
OURS: dict[str, Any] = {"dropout": 0.0, "context_from": "cache"}
# And where the CPU has instructions for it, bf16 products.
ROUNDED = OURS | {"precision": "auto"}
WARM, COUNTED = 1, 1  # steps of each process
FILLED = 2  # at least so many chunks are skipped: the authors' rate is 0 on the first and half on the second


def filled(window: int, chunk: int) -> int:
    """Chunks before the first that is learned."""
    return max(FILLED, -(-window // chunk))


def ids_of(shape: str, window: int, chunk: int) -> list[int]:
    """The text."""
    return shapes.ids(shape, 1 + chunk * (filled(window, chunk) + WARM + COUNTED))


def our_steps(
    base: Base, ids: list[int], window: int, chunk: int, changes: dict[str, Any] = OURS
) -> dict[str, Any]:
    """Seconds of each counted step, and NLL of each chunk."""
    session = base.session("paper", seed=1, window=window, context=window, chunk=chunk, **changes)
    session.extend(ids, "")
    session.chunk = filled(window, chunk)
    seconds, nll = list[float](), list[float]()
    for event in session.learning():
        if isinstance(event, ChunkLearned):
            seconds.append(event.seconds)
        elif isinstance(event, ChunkScored):
            nll.append(event.adapted_nll / event.tokens)
    session.discard()
    return {"seconds": seconds[WARM:], "nll": nll}


def plain_steps(loop: PlainLoop, ids: list[int], window: int, chunk: int) -> dict[str, Any]:
    """The same, of the plain loop."""
    device = loop.model.device.type
    loop.chunk = filled(window, chunk)
    seconds, nll = list[float](), list[float]()
    for first in range(1 + loop.chunk * chunk, len(ids) - chunk + 1, chunk):
        row, seen = ids[max(0, first - window) : first + chunk], min(first, window)
        with torch.no_grad():
            nll.append(float(loop.nll(row, seen).mean()))
        started = time.perf_counter()
        loop.learn(row, seen)
        wait(device)
        seconds.append(time.perf_counter() - started)
    return {"seconds": seconds[WARM:], "nll": nll}


def ours(shape: str, window: int, chunk: int, changes: dict[str, Any]) -> dict[str, Any]:
    """`our_steps` and peak memory in MB."""
    steps = our_steps(shapes.base(shape), ids_of(shape, window, chunk), window, chunk, changes)
    return steps | {"peak_mb": peak_mb()}


def plain(shape: str, window: int, chunk: int, start: dict[str, torch.Tensor]) -> dict[str, Any]:
    """`plain_steps` and peak memory in MB."""
    loop = PlainLoop(shapes.build(shape), start)
    return plain_steps(loop, ids_of(shape, window, chunk), window, chunk) | {"peak_mb": peak_mb()}


def loaded(shape: str) -> float:
    """Peak memory in MB of a process that only loads the model."""
    shapes.build(shape)
    return peak_mb()


def start_of(shape: str) -> dict[str, torch.Tensor]:
    """The adapter's weights before anything is learned, by PEFT's names."""
    session = shapes.base(shape).session("paper", seed=1, window=8, context=8, chunk=8, **OURS)
    with tempfile.TemporaryDirectory() as folder:
        session.adapter.save(folder)
        return load_file(Path(folder) / "adapter_model.safetensors")


def measure(shape: str, window: int, chunk: int, rounds: int) -> dict[str, Any]:
    """All of one shape and size."""
    start = start_of(shape)
    runs: dict[str, list[dict[str, Any]]] = {"ours": [], "plain": [], "rounded": []}
    rates = list[dict[str, float]]()
    for _ in range(rounds):
        runs["ours"].append(in_child(ours, shape, window, chunk, OURS))
        runs["plain"].append(in_child(plain, shape, window, chunk, start))
        runs["rounded"].append(in_child(ours, shape, window, chunk, ROUNDED))
        rates.append(of_shape(shape, chunk))
    theirs = runs["plain"][0]["nll"]
    nlls = {side: runs[side][0]["nll"] for side in ("ours", "rounded")}
    apart, *later = (
        {side: abs(nll[at] - exact) for side, nll in nlls.items()} for at, exact in enumerate(theirs)
    )
    assert max(apart.values()) < 1e-3, f"all sides must compute the same, but NLLs are {apart} apart"
    seconds = {side: [median(run["seconds"]) for run in made] for side, made in runs.items()}
    peaks = {side: [run["peak_mb"] for run in made] for side, made in runs.items()}
    empty = in_child(loaded, shape)
    needs = Needs(
        shapes.build(shape).config, recipe("paper", window=window, context=window, chunk=chunk, **OURS)
    )
    limit = limits(highest(rates)).seconds(needs.step(chunk, window))
    return {
        "shape": shape,
        "window": window,
        "chunk": chunk,
        "nll_apart": apart,
        "nll_apart_after_steps": {side: [nll[side] for nll in later] for side in nlls},
        "seconds": seconds,
        "peak_mb": peaks,
        "loaded_mb": empty,
        "faster": {side: ratio(seconds["plain"], seconds[side]) for side in nlls},
        "memory": {side: ratio(peaks[side], peaks["plain"]) for side in nlls},
        "memory_above_model": ratio(
            [peak - empty for peak in peaks["ours"]], [peak - empty for peak in peaks["plain"]]
        ),
        "rates": highest(rates),
        "limit_seconds": limit,
        "share_of_limit": {side: share(limit, made) for side, made in seconds.items()},
    }


def _both(apart: dict[str, float]) -> str:
    return f"{apart['ours']:.0e}, `rounded` {apart['rounded']:.0e}"


def main() -> None:
    """Measure and save."""
    arguments = parser(__doc__ or "", rounds=2)
    sizes(arguments, ["30m", "135m"], [1024], [1024], shapes.NAMES)
    wishes = parse(arguments)
    wanted = [("toy", 16, 16)] if wishes.toy else cases(wishes)
    results = [measure(*case, wishes.rounds) for case in wanted]
    columns: dict[str, Column] = {
        **CASE,
        "plain step": lambda r: Spread.of(r["seconds"]["plain"]).text(" s"),
        "ours": lambda r: Spread.of(r["seconds"]["ours"]).text(" s"),
        "faster": lambda r: f"**{r['faster']['ours'].text(' ×')}**",
        "`rounded` is faster": lambda r: f"**{r['faster']['rounded'].text(' ×')}**",
        "peak memory": lambda r: r["memory"]["ours"].text(" ×"),
        "of `rounded`": lambda r: r["memory"]["rounded"].text(" ×"),
        "above the model's": lambda r: r["memory_above_model"].text(" ×"),
        "NLL apart": lambda r: _both(r["nll_apart"]),
        "after a step": lambda r: _both({k: max(v) for k, v in r["nll_apart_after_steps"].items()}),
        "share of the limit: plain, ours": lambda r: shares(r, "plain", "ours"),
    }
    save_table(wishes.out, "learn", results, columns)
    bars = {name_of(r): {side: Spread.of(made) for side, made in r["seconds"].items()} for r in results}
    save_bars(wishes.out, "learn", bars, "seconds a step")


if __name__ == "__main__":
    main()
