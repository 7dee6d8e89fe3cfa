"""What this machine could do at best: the work that a method needs, over the rates that are measured here.

A phase takes as long as its products or its memory traffic, whichever is longer; phases follow one another.
`needs` counts the work.
"""

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from transformers import PretrainedConfig

from benchmarks import shapes
from benchmarks.measure import Spread, parse, parser, save, wait
from benchmarks.needs import Needs, Work, layers, recipe
from templora.bench.tables import table
from templora.kernels import pays
from templora.products import product

LARGE = 1 << 28  # bytes of a stream: far more than any cache
TRIES = 5


@dataclass(frozen=True, slots=True)
class Rates:
    """The best that this machine has shown, a second."""

    flops: float
    bytes: float

    def seconds(self, phases: list[Work]) -> float:
        """The least time for phases that follow one another."""
        return sum(max(work.flops / self.flops, work.bytes / self.bytes) for work in phases)


def best(run: Callable[[], Any], device: str = "cpu") -> float:
    """Seconds of the fastest of a few runs."""
    seconds = list[float]()
    for _ in range(TRIES):
        wait(device)
        started = perf_counter()
        run()
        wait(device)
        seconds.append(perf_counter() - started)
    return min(seconds)


def product_rate(rows: int, inner: int, columns: int, device: str, dtype: torch.dtype) -> float:
    """Operations a second of one matrix product, [rows, inner] by [columns, inner] transposed.

    By torch's own way or by the package's, whichever is faster here.
    """
    left = torch.rand(rows, inner, device=device).to(dtype)
    right = torch.rand(columns, inner, device=device).to(dtype)
    seconds = best(lambda: left @ right.T, device)
    if device == "cpu" and dtype == torch.float32 and pays():
        seconds = min(seconds, best(lambda: product(left, right), device))
    return 2 * rows * inner * columns / seconds


def stream_rate(size: int, device: str, dtype: torch.dtype) -> float:
    """Bytes a second over `size` bytes: the best of a copy, a sum and a matrix-vector product."""
    columns = 1024
    source = torch.rand(max(1, size // dtype.itemsize // columns), columns, device=device).to(dtype)
    target, vector, moved = torch.empty_like(source), source[0].clone(), source.nbytes
    copied = 2 * moved / best(lambda: target.copy_(source), device)
    return max(copied, moved / best(source.sum, device), moved / best(lambda: source @ vector, device))


def measured(config: PretrainedConfig, rows: int, device: str = "cpu", dtype: Any = None) -> dict[str, float]:
    """Named rates: products, square and of the shape at `rows` tokens; streams, large and of its weights."""
    dtype = dtype or torch.float32
    square = 1024 if device == "cpu" else 8192
    sizes = {"square": (square, square, square)}
    sizes |= {
        f"{a}x{b}": (rows, a, b)
        for a, b in (*layers(config).values(), (config.hidden_size, config.vocab_size))
    }
    rates = {f"product {name}": product_rate(*size, device, dtype) for name, size in sizes.items()}
    weights = Needs(config, recipe("paper"), dtype.itemsize).weights
    # Weights that fit into a cache are read faster than memory.
    streams = {"stream large": LARGE, "stream weights": weights}
    return rates | {name: stream_rate(size, device, dtype) for name, size in streams.items()}


def limits(rates: dict[str, float]) -> Rates:
    """The best product and the best stream."""
    kinds = [max(v for k, v in rates.items() if k.startswith(kind)) for kind in ("product", "stream")]
    return Rates(*kinds)


def of_shape(shape: str, rows: int) -> dict[str, float]:
    """`measured`, of a shape by name."""
    return measured(shapes.build(shape).config, rows)


def highest(runs: list[dict[str, float]]) -> dict[str, float]:
    """Of each rate the best: a limit is what no run has passed."""
    return {name: max(run[name] for run in runs) for name in runs[0]}


def share(limit: float, seconds: list[float]) -> Spread:
    """Of the limit, in per cent."""
    return Spread.of([100 * limit / taken for taken in seconds])


def main() -> None:
    """Measure and save."""
    arguments = parser(__doc__ or "")
    arguments.add_argument("--shapes", nargs="+", default=[*shapes.NAMES], choices=shapes.NAMES)
    wishes = parse(arguments)
    names, rows, window = (shapes.TOY, 16, 16) if wishes.toy else (wishes.shapes, 1024, 1024)
    results, lines = list[dict[str, Any]](), list[list[str]]()
    for name in names:
        rates = highest([of_shape(name, rows) for _ in range(wishes.rounds)])
        best_rates, config = limits(rates), shapes.build(name).config
        paper = Needs(config, recipe("paper", window=window, context=window, chunk=rows))
        step = paper.step(rows, window)
        token = [paper.forward(1, window, 1, adapter=False)]
        seconds = {"step": best_rates.seconds(step), "token": best_rates.seconds(token)}
        results.append({"shape": name, "rates": rates, "seconds": seconds})
        lines.append(
            [
                name,
                *(
                    f"{rates[kind] / 1e9:.1f}"
                    for kind in ("product square", "stream large", "stream weights")
                ),
                f"{best_rates.flops / 1e9:.1f}",
                f"{sum(work.flops for work in step) / 1e9:,.0f}",
                f"{seconds['step']:.2f} s",
                f"{1e3 * seconds['token']:.2f} ms",
            ]
        )
    heads = [
        "base",
        "square product, GFLOP/s",
        "large stream, GB/s",
        "stream of the weights",
        "best product, GFLOP/s",
    ]
    heads += [f"a learning step on {rows} tokens: GFLOP", "its limit", "limit of a written token"]
    save(wishes.out, "roofline", {"results": results}, table(heads, lines))


if __name__ == "__main__":
    main()
