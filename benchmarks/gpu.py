"""The comparisons on one GPU: a random base of Llama-2-7B's shape in bf16, made on the device.

The parts run in order of worth until the budget is used; the results so far are on disk after each. A part
that fails says so and the next one runs. `--toy` runs all of it at toy size, without a GPU on the CPU.
"""

import gc
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch

import templora
from benchmarks import shapes, whole_window
from benchmarks.learn import OURS, ids_of, our_steps, plain_steps
from benchmarks.measure import GREEDY, parse, parser, peak_mb, save, save_json, wait
from benchmarks.needs import Needs, recipe
from benchmarks.plain import PlainLoop
from benchmarks.roofline import limits, measured
from benchmarks.willing import willing
from templora.bench.tables import table
from templora.events import ChunkScored, Token
from templora.parallel import ParallelSession

Part = Callable[[], dict[str, Any]]
NO_GPU = "no GPU here; --toy runs this on the CPU at toy size"


@dataclass(frozen=True, slots=True)
class Sizes:
    """In tokens. positions: of the base with an adapter, as its sessions see it."""

    shape: str
    windows: tuple[int, ...]
    whole: tuple[int, ...]
    chunk: int
    plain_chunk: int
    positions: int
    written: int
    decoded: int


FULL = Sizes("llama-2-7b", (1024, 2048, 4096), (4096, 24_576), 1024, 256, 8192, 4096, 64)
TOY = Sizes("toy", (16, 32, 64), (64, 128), 16, 16, 128, 96, 8)


class Bench:
    """The base, and what is measured on it. deadline: in `time.perf_counter()`'s seconds."""

    def __init__(self, sizes: Sizes, device: str, deadline: float) -> None:
        self.sizes, self.device, self.deadline = sizes, device, deadline
        self.dtype = torch.float32 if device == "cpu" else torch.bfloat16
        positions = max(*sizes.whole, sizes.positions)
        with torch.device(device):
            self.model = shapes.build(sizes.shape, positions, self.dtype)
        self.base = templora.load(model=self.model)
        self.base.positions = sizes.positions  # a session's cache has a place for each

    def parts(self) -> dict[str, Part]:
        """By name, in order of worth."""
        made: dict[str, Part] = {"limit of a step": self.rates, "learn, ours": self.learn}
        made["learn, plain loop"] = partial(self.plain, self.learn_plain)
        small, *larger = self.sizes.windows
        made[f"write, window {small}"] = partial(self.write, small)
        made[f"write, window {small}, nothing recorded"] = partial(self.write_unrecorded, small)
        for window in self.sizes.whole[::-1]:
            made[f"base alone, window {window}"] = partial(self.decode, window)
        made["write, plain loop"] = partial(self.plain, self.write_plain)
        made[f"write, window {small}, learning beside it"] = partial(self.write, small, parallel=True)
        return made | {f"write, window {window}": partial(self.write, window) for window in larger}

    def rates(self) -> dict[str, Any]:
        """What the device can do, and what it would need at best."""
        rates = measured(self.model.config, self.sizes.chunk, self.device, self.dtype)
        chunk, window, best = self.sizes.chunk, self.sizes.windows[0], limits(rates)
        sizes = {"window": chunk, "context": chunk, "chunk": chunk}
        needs = Needs(self.model.config, recipe("paper", **sizes, **OURS), self.dtype.itemsize)
        token = [needs.forward(1, window, 1, adapter=self.device != "cpu")]
        least = {"step": best.seconds(needs.step(chunk, chunk)), "token": best.seconds(token)}
        return {"rates": rates, "limit_seconds": least, "seconds": least["step"]}

    def learn(self) -> dict[str, Any]:
        """A step of ours."""
        chunk = self.sizes.chunk
        return _step(our_steps(self.base, ids_of(self.sizes.shape, chunk, chunk), chunk, chunk))

    def learn_plain(self, loop: PlainLoop) -> dict[str, Any]:
        """A step of the plain loop."""
        chunk = self.sizes.chunk
        return _step(plain_steps(loop, ids_of(self.sizes.shape, chunk, chunk), chunk, chunk))

    def write(self, window: int, *, parallel: bool = False) -> dict[str, Any]:
        """Writing and learning by the default recipe, window full, for at most a quarter of the time left."""
        sizes: dict[str, Any] = {"window": window, "context": window, "parallel": parallel}
        session = willing(self.base.session("default", seed=1, **sizes))
        session.extend(shapes.ids(self.sizes.shape, 1 + window), "")
        session.chunk = window // session.plan.chunk  # given, and not learned
        wishes: dict[str, Any] = {"sampling": GREEDY, "score_base": False}
        for _ in session.write(session.plan.chunk, **wishes):
            pass
        started, tokens = time.perf_counter(), 0
        stop = started + (self.deadline - started) / 4
        for event in session.write(self.sizes.written, **wishes):
            tokens += isinstance(event, Token)
            if isinstance(event, ChunkScored) and time.perf_counter() > stop:
                break
        if isinstance(session, ParallelSession):
            session.settle()
        wait(self.device)
        seconds = time.perf_counter() - started
        session.discard()
        return {"tokens": tokens, "seconds": seconds}

    def write_unrecorded(self, window: int) -> dict[str, Any]:
        """The same through the model's own modules, without the short cut for a token (CUDA graphs)."""
        base = self.base
        short, base._step = base._step, None  # pyright: ignore[reportPrivateUsage]
        try:
            return self.write(window)
        finally:
            base._step = short  # pyright: ignore[reportPrivateUsage]

    def write_plain(self, loop: PlainLoop) -> dict[str, Any]:
        """One chunk of the plain loop, written and learned, at the smallest window."""
        window, chunk = self.sizes.windows[0], self.sizes.plain_chunk
        ids = shapes.ids(self.sizes.shape, 1 + window)
        loop.chunk = 2
        started = time.perf_counter()
        loop.write(ids, chunk, window, chunk)
        wait(self.device)
        return {"tokens": chunk, "seconds": time.perf_counter() - started}

    def decode(self, window: int) -> dict[str, Any]:
        """A token of the base alone at the end of such a window, with each decoder."""
        tokens = self.sizes.decoded
        taken = {name: median(run(self.base, window, tokens)) for name, run in whole_window.DECODERS.items()}
        return {"seconds_a_token": taken, "tokens": 1, "seconds": min(taken.values())}

    def plain(self, run: Callable[[PlainLoop], dict[str, Any]]) -> dict[str, Any]:
        """Put PEFT's layers into the model for this part, and take them out again."""
        loop = PlainLoop(self.model)
        try:
            return run(loop)
        finally:
            loop.model.unload()


def _step(steps: dict[str, Any]) -> dict[str, Any]:
    return {"seconds": median(steps["seconds"]), "nll": steps["nll"]}


def run_part(part: Part, device: str) -> dict[str, Any]:
    """Its result with its peak memory; an error becomes a result, so that the other parts still run."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        result = part()
    except Exception as error:
        result = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    peak = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else peak_mb()
    return result | {"peak_mb": peak}


def page(results: dict[str, dict[str, Any]]) -> str:
    """A row a part."""
    rows = [[name, *_cells(result)] for name, result in results.items()]
    return table(["part", "seconds", "tokens/s", "peak memory"], rows)


def _cells(result: dict[str, Any]) -> list[str]:
    if (why := result.get("failed") or result.get("skipped")) is not None:
        return [why, "–", "–"]
    rate = f"{result['tokens'] / result['seconds']:.1f}" if "tokens" in result else "–"
    return [f"{result['seconds']:.3f}", rate, f"{result['peak_mb']:,.0f} MB"]


def main() -> None:
    """Measure and save."""
    arguments = parser(__doc__ or "", rounds=1)
    arguments.add_argument("--budget-minutes", type=float, default=9.0)
    wishes = parse(arguments)
    if not wishes.toy and not torch.cuda.is_available():
        print(f"benchmarks.gpu: {NO_GPU}", file=sys.stderr)
        raise SystemExit(2)
    started, device = time.perf_counter(), "cuda" if torch.cuda.is_available() else "cpu"
    bench = Bench(TOY if wishes.toy else FULL, device, started + 60 * wishes.budget_minutes)
    results: dict[str, dict[str, Any]] = {}
    for name, part in bench.parts().items():
        late = time.perf_counter() > bench.deadline
        results[name] = {"skipped": "no time left"} if late else run_part(part, device)
        results[name]["done_at_seconds"] = time.perf_counter() - started
        save_json(wishes.out, "gpu", {"toy": wishes.toy, "parts": results})
        print(f"{name}: {' '.join(_cells(results[name]))}", file=sys.stderr, flush=True)
    save(wishes.out, "gpu", {"toy": wishes.toy, "parts": results}, page(results))


if __name__ == "__main__":
    main()
