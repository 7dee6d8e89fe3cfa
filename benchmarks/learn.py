"""One learning step against the plain loop, at the authors' settings: time, peak memory, and the same NLL.

Window = context = chunk, two epochs. Our step counts the pass over the context that makes its keys, and the
pass that scores the chunk, which is its first epoch; the plain loop's scoring pass is not counted.
"""

import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks import shapes
from benchmarks.measure import Column, Spread, in_child, parser, peak_mb, ratio, save_table
from benchmarks.plain import PlainLoop
from templora.events import ChunkLearned, ChunkScored

# The context's keys without gradients; the rest is recipe `paper`.
OURS: dict[str, Any] = {"dropout": 0.0, "context_from": "cache"}
WARM = 2  # chunks that are not counted: the authors' rate is 0 on the first


def ours(shape: str, chunk: int, chunks: int) -> dict[str, Any]:
    """Seconds of each counted step, NLL of each chunk, peak memory in MB."""
    base = shapes.base(shape)
    session = base.session("paper", seed=1, window=chunk, context=chunk, chunk=chunk, **OURS)
    session.extend(shapes.ids(shape, 1 + chunk * chunks), "")
    seconds, nll = list[float](), list[float]()
    for event in session.learning():
        if isinstance(event, ChunkLearned):
            seconds.append(event.seconds)
        elif isinstance(event, ChunkScored):
            nll.append(event.adapted_nll / event.tokens)
    return {"seconds": seconds[WARM:], "nll": nll, "peak_mb": peak_mb()}


def plain(shape: str, chunk: int, chunks: int, start: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The same, of the plain loop."""
    loop, ids = PlainLoop(shapes.build(shape), start), shapes.ids(shape, 1 + chunk * chunks)
    seconds, nll = list[float](), list[float]()
    for first in range(1, len(ids) - chunk + 1, chunk):
        row, seen = ids[max(0, first - chunk) : first + chunk], min(first, chunk)
        with torch.no_grad():
            nll.append(float(loop.nll(row, seen).mean()))
        started = time.perf_counter()
        loop.learn(row, seen)
        seconds.append(time.perf_counter() - started)
    return {"seconds": seconds[WARM:], "nll": nll, "peak_mb": peak_mb()}


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


def measure(shape: str, chunk: int, chunks: int, rounds: int) -> dict[str, Any]:
    """All of one shape."""
    start = start_of(shape)
    runs: dict[str, list[dict[str, Any]]] = {"ours": [], "plain": []}
    for _ in range(rounds):
        runs["ours"].append(in_child(ours, shape, chunk, chunks))
        runs["plain"].append(in_child(plain, shape, chunk, chunks, start))
    apart = max(abs(a - b) for a, b in zip(runs["ours"][0]["nll"], runs["plain"][0]["nll"], strict=True))
    assert apart < 1e-3, f"both sides must compute the same, but NLLs are {apart} apart"
    seconds = {side: [median(run["seconds"]) for run in made] for side, made in runs.items()}
    peaks = {side: [run["peak_mb"] for run in made] for side, made in runs.items()}
    empty = in_child(loaded, shape)
    return {
        "shape": shape,
        "chunk": chunk,
        "nll_apart": apart,
        "seconds": seconds,
        "peak_mb": peaks,
        "loaded_mb": empty,
        "faster": ratio(seconds["plain"], seconds["ours"]),
        "memory": ratio(peaks["ours"], peaks["plain"]),
        "memory_above_model": ratio(
            [peak - empty for peak in peaks["ours"]], [peak - empty for peak in peaks["plain"]]
        ),
    }


def main() -> None:
    """Measure and save."""
    arguments = parser(__doc__ or "")
    arguments.add_argument("--shapes", nargs="+", default=["30m", "135m"], choices=[*shapes.NAMES])
    arguments.add_argument("--chunk", type=int, default=1024)
    wishes = arguments.parse_args()
    names, chunk, chunks = (shapes.TOY, 16, 4) if wishes.toy else (wishes.shapes, wishes.chunk, WARM + 1)
    results = [measure(name, chunk, chunks, wishes.rounds) for name in names]
    columns: dict[str, Column] = {
        "base": lambda r: r["shape"],
        "chunk": lambda r: str(r["chunk"]),
        "plain step": lambda r: Spread.of(r["seconds"]["plain"]).text(" s"),
        "ours": lambda r: Spread.of(r["seconds"]["ours"]).text(" s"),
        "faster": lambda r: f"**{r['faster'].text(' ×')}**",
        "peak memory": lambda r: r["memory"].text(" ×"),
        "above the model's": lambda r: r["memory_above_model"].text(" ×"),
        "NLL apart": lambda r: f"{r['nll_apart']:.0e}",
    }
    save_table(wishes.out, "learn", results, columns)


if __name__ == "__main__":
    main()
