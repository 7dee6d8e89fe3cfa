"""Timing that survives a noisy machine: sides in turn, A B A B, and ratios within each round."""

import argparse
import json
import multiprocessing
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch

import templora
from templora.bench.plot import canvas
from templora.bench.plot import save as save_plot
from templora.bench.result import peak_mb as peak_mb
from templora.bench.tables import table
from templora.sampling import Sampling

Column = Callable[[Mapping[str, Any]], str]
# What was measured, for a table.
CASE: dict[str, Column] = {
    "base": lambda r: r["shape"],
    "window": lambda r: str(r["window"]),
    "chunk": lambda r: str(r["chunk"]),
}
# Whatever a base's own settings say.
GREEDY = Sampling(temperature=0.0, repetition_penalty=1.0, dry_multiplier=0.0)
OUT = Path(__file__).parent.parent / "docs" / "benchmarks"


@dataclass(frozen=True, slots=True)
class Spread:
    """Smallest, middle and largest of several runs."""

    least: float
    median: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of these values."""
        return cls(min(values), median(values), max(values))

    def text(self, unit: str = "", digits: int = 2) -> str:
        """For a table: the middle, and the range in parentheses."""
        return f"{self.median:.{digits}f}{unit} ({self.least:.{digits}f}–{self.most:.{digits}f})"


def alternate(sides: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each side, run in turn: what disturbs one round disturbs all sides of it."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            started = perf_counter()
            run()
            seconds[name].append(perf_counter() - started)
    return seconds


def in_child(function: Callable[..., Any], *args: Any) -> Any:
    """Its result, from a process of its own, so that its peak memory is its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=_ready) as pool:
        return pool.submit(function, *args).result()


def _ready() -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    # A random model that has learned a long random text is so sure of some things that their gradients come
    # near zero, where a CPU is slow. A trained one never gets there.
    torch.set_flush_denormal(True)


def wait(device: str) -> None:
    """Until a GPU has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def ratio(above: Sequence[float], below: Sequence[float]) -> Spread:
    """Of the two sides of each round."""
    return Spread.of([a / b for a, b in zip(above, below, strict=True)])


def machine() -> dict[str, Any]:
    """What the numbers were made on, without its name or paths."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line
        ]
        cpu = names[0] if names else cpu
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "templora": templora.__version__,
    }


def parser(about: str, rounds: int = 5) -> argparse.ArgumentParser:
    """The options that all benchmarks share."""
    made = argparse.ArgumentParser(description=about)
    made.add_argument("--rounds", type=int, default=rounds, help="alternations")
    made.add_argument("--threads", type=int, default=1, help="of torch; more of them wait for each other")
    made.add_argument("--toy", action="store_true", help="at toy size: only to see that it works")
    made.add_argument("--out", type=Path, default=OUT, help="a folder for the JSON file and the table")
    return made


def sizes(
    arguments: argparse.ArgumentParser,
    names: Sequence[str],
    windows: Sequence[int],
    chunks: Sequence[int],
    choices: Sequence[str],
) -> None:
    """Options for bases, windows and chunks, any number of each; the values are what is run by default."""
    arguments.add_argument("--shapes", nargs="+", default=names, choices=choices)
    arguments.add_argument(
        "--windows", nargs="+", type=int, default=windows, help="in tokens; context = window"
    )
    arguments.add_argument("--chunks", nargs="+", type=int, default=chunks, help="in tokens")


def cases(wishes: argparse.Namespace) -> list[tuple[str, int, int]]:
    """Each base with each window and each chunk."""
    return list(product(wishes.shapes, wishes.windows, wishes.chunks))


def name_of(result: Mapping[str, Any]) -> str:
    """What was measured, for a picture."""
    return f"{result['shape']}\nwindow {result['window']}\nchunk {result['chunk']}"


def shares(result: Mapping[str, Any], *sides: str) -> str:
    """For a table: the median share of the limit that each side reaches."""
    return ", ".join(f"{result['share_of_limit'][side].median:.0f} %" for side in sides)


def parse(arguments: argparse.ArgumentParser) -> argparse.Namespace:
    """The options; from here on torch has the threads that were asked for, in child processes too."""
    wishes = arguments.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(wishes.threads)
    torch.set_num_threads(wishes.threads)
    return wishes


def save_json(out: Path, name: str, result: Mapping[str, Any]) -> None:
    """NAME.json."""
    out.mkdir(parents=True, exist_ok=True)
    whole = {"machine": machine(), **result}
    (out / f"{name}.json").write_text(json.dumps(whole, indent=1, default=asdict) + "\n", "utf-8")


def save(out: Path, name: str, result: Mapping[str, Any], page: str) -> None:
    """NAME.json and NAME.md, and the page on the screen."""
    save_json(out, name, result)
    about = machine()
    line = f"{about['gpu'] or about['cpu']}, {about['threads']} thread(s), torch {about['torch']}"
    (out / f"{name}.md").write_text(f"{page}\n\n*{line}*\n", "utf-8")
    print(page)


def save_table(
    out: Path, name: str, results: Sequence[Mapping[str, Any]], columns: Mapping[str, Column]
) -> None:
    """`save`, with a row a result. columns: its name, and its cell of a result."""
    rows = [[cell(result) for cell in columns.values()] for result in results]
    save(out, name, {"results": results}, table(list(columns), rows))


def save_bars(
    out: Path, name: str, groups: Mapping[str, Mapping[str, Spread]], ylabel: str, digits: int = 1
) -> None:
    """NAME.png: a group of bars for each case, a bar for each side, its range as a thin line."""
    figure, (axes,) = canvas()
    sides = list(dict.fromkeys(side for bars in groups.values() for side in bars))
    width = 0.8 / len(sides)
    for place, side in enumerate(sides):
        spreads = [bars[side] for bars in groups.values()]
        middles = [spread.median for spread in spreads]
        beyond = [[s.median - s.least for s in spreads], [s.most - s.median for s in spreads]]
        places = [group + (place - (len(sides) - 1) / 2) * width for group in range(len(groups))]
        bars = axes.bar(places, middles, width, yerr=beyond, error_kw={"linewidth": 0.8}, label=side)
        axes.bar_label(bars, fmt=f"%.{digits}f", fontsize=7)
    axes.set_xticks(range(len(groups)), list(groups))
    axes.set(ylabel=ylabel)
    save_plot(figure, [axes], out / f"{name}.png")
