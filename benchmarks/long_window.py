"""Long texts: whether base and adapter slow down, and from which length they beat a window that holds it all.

First, the speed of writing and of learning at the end of a text of 5,000 tokens and of one of 100,000
(`long_text`). Second, writing with base and adapter against the base alone with the whole text in its window,
with the faster of two decoders (`whole_window`): what a token costs is measured at a few lengths and added
up. Base and adapter are measured with a full window, learning included.
"""

import time
from statistics import median
from typing import Any

from benchmarks import long_text, shapes
from benchmarks.long_text import given, grown
from benchmarks.measure import GREEDY, Column, Spread, in_child, parse, parser, peak_mb, save, save_json
from benchmarks.whole_window import DECODERS, costs, crossover, total
from templora.bench.plot import canvas
from templora.bench.plot import save as save_plot
from templora.bench.tables import table

FIRST = 128  # tokens: the shortest length that is measured
LENGTHS = [1024, 2048, 4096, 8192, 16_384, 32_768]
POSITIONS = {"novelist": 2048}


def ours(shape: str, window: int, positions: int) -> tuple[float, float]:
    """(seconds a token, peak memory in MB) of base and adapter; for a process of its own."""
    base = shapes.base(shape, positions=positions)
    session = grown(base, given(shape, 1 + window), window, learned=True)
    wishes: dict[str, Any] = {"sampling": GREEDY, "score_base": False}
    for _ in session.write(session.plan.chunk, **wishes):
        pass
    tokens = base.positions - window  # positions run out once
    started = time.perf_counter()
    for _ in session.write(tokens, **wishes):
        pass
    return (time.perf_counter() - started) / tokens, peak_mb()


def against(
    shape: str, window: int, lengths: list[int], first: int, tokens: int, rounds: int
) -> dict[str, Any]:
    """Base and adapter against the base with everything in its window."""
    measured = [first, *lengths]
    adapted = list[tuple[float, float]]()
    whole: dict[str, list[list[tuple[float, float]]]] = {decoder: [] for decoder in DECODERS}
    for _ in range(rounds):
        adapted.append(in_child(ours, shape, window, 4 * window))
        for decoder, runs in whole.items():
            runs.append(in_child(costs, shape, decoder, measured, tokens))
    middles = {
        decoder: [median(run[i][0] for run in runs) for i in range(len(measured))]
        for decoder, runs in whole.items()
    }
    # The faster at each length is what our side is compared with.
    fastest = [min(DECODERS, key=lambda decoder: middles[decoder][i]) for i in range(len(measured))]
    by_round = [[whole[fastest[i]][r][i][0] for i in range(len(measured))] for r in range(rounds)]
    middle, mine = [middles[decoder][i] for i, decoder in enumerate(fastest)], [s for s, _ in adapted]
    points = list[dict[str, Any]]()
    for i, length in enumerate(measured):
        ratios = [total(measured, by_round[r], length) / (mine[r] * length) for r in range(rounds)]
        seconds = Spread.of([run[i] for run in by_round])
        memory = median(run[i][1] for run in whole[fastest[i]])
        means = {"whole": total(measured, middle, length) / length, "ours": median(mine)}
        point = {"length": length, "decoder": fastest[i], "seconds_at": seconds, "mean_seconds": means}
        points.append(point | {"slower": Spread.of(ratios), "memory_mb": memory})
    return {
        "shape": shape,
        "window": window,
        "ours_seconds": mine,
        "ours_memory_mb": median(mb for _, mb in adapted),
        "whole_seconds_and_mb": whole,
        "crossover": crossover(measured, middle, median(mine)),
        "points": points,
    }


TEXT_COLUMNS: dict[str, Column] = {
    "base": lambda r: r["shape"],
    "window": lambda r: str(r["window"]),
    "texts": lambda r: f"{r['short']:,} and {r['long']:,}",
    "writing: speed in the long one": lambda r: r["write"]["speed"].text(" ×", 3),
    "chunks learned": lambda r: " and ".join(str(n) for n in r["write"]["learned"].values()),
    "learning: speed": lambda r: r["learn"]["speed"].text(" ×", 3),
    "chunks": lambda r: " and ".join(str(n) for n in r["learn"]["learned"].values()),
}
POINT_COLUMNS: dict[str, Column] = {
    "base": lambda p: p["shape"],
    "length": lambda p: f"{p['length']:,}",
    "whole window: a token there": lambda p: f"{1e3 * p['seconds_at'].median:.1f} ms ({p['decoder']})",
    "mean": lambda p: f"{1e3 * p['mean_seconds']['whole']:.1f} ms",
    "base and adapter": lambda p: f"{1e3 * p['mean_seconds']['ours']:.1f} ms",
    "whole window takes": lambda p: f"**{p['slower'].text(' ×')}**",
    "memory: whole": lambda p: f"{p['memory_mb']:,.0f} MB",
    "base and adapter, memory": lambda p: f"{p['ours_memory_mb']:,.0f} MB",
}


def page(texts: list[dict[str, Any]], windows: list[dict[str, Any]]) -> str:
    """Both tables, and the crossover."""
    rows = [[cell(r) for cell in TEXT_COLUMNS.values()] for r in texts]
    points = [{**result, **point} for result in windows for point in result["points"]]
    lines = [[cell(p) for cell in POINT_COLUMNS.values()] for p in points]
    ends = [
        f"{r['shape']}: " + (f"{r['crossover']:,} tokens" if r["crossover"] else "not up to the last length")
        for r in windows
    ]
    crossing = f"From this length on the whole window takes longer: {'; '.join(ends)}."
    parts = [table(list(TEXT_COLUMNS), rows)] if rows else []
    return "\n\n".join([*parts, table(list(POINT_COLUMNS), lines), crossing] if lines else parts)


def plot(windows: list[dict[str, Any]], path: Any) -> None:
    """Time a token and memory by length, a panel each."""
    figure, (times, memory) = canvas(2)
    for result in windows:
        lengths = [p["length"] for p in result["points"]]
        for side, style in (("whole", "o-"), ("ours", "--")):
            label = f"{result['shape']}: " + ("whole window" if side == "whole" else "base and adapter")
            means = [1e3 * p["mean_seconds"][side] for p in result["points"]]
            times.plot(lengths, means, style, label=label)
            own = [result["ours_memory_mb"]] * len(lengths)
            held = [p["memory_mb"] for p in result["points"]] if side == "whole" else own
            memory.plot(lengths, held, style, label=label)
    times.set(title="writing: ms a token, mean over the text")
    memory.set(title="peak memory, MB")
    for axes in (times, memory):
        axes.set_xscale("log", base=2)
        axes.set(xlabel="length of the text, tokens", ylim=(0, None))
    save_plot(figure, [times, memory], path)


def main() -> None:
    """Measure and save."""
    arguments = parser(__doc__ or "", rounds=3)
    arguments.add_argument("--shapes", nargs="+", default=["novelist", "30m"], choices=shapes.NAMES)
    arguments.add_argument("--parts", nargs="+", default=["text", "window"], choices=["text", "window"])
    arguments.add_argument("--window", type=int, default=1024)
    arguments.add_argument("--short", type=int, default=5000, help="tokens of the short text")
    arguments.add_argument("--long", type=int, default=100_000, help="tokens of the long text")
    arguments.add_argument("--lengths", nargs="+", type=int, default=LENGTHS)
    arguments.add_argument("--tokens", type=int, default=32, help="timed at each length")
    skip = "the tokens before the timed ones are put into the text, and not learned"
    arguments.add_argument("--skip-history", action="store_true", help=skip)
    wishes = parse(arguments)
    names, first = wishes.shapes, FIRST
    if wishes.toy:
        names, first = shapes.TOY, 32
        wishes.window, wishes.short, wishes.long = 64, 400, 1200
        wishes.lengths, wishes.tokens = [64, 128], 8
    texts, windows = list[dict[str, Any]](), list[dict[str, Any]]()
    for name in names:
        if "text" in wishes.parts:
            sizes = (wishes.window, wishes.short, wishes.long, wishes.rounds, not wishes.skip_history)
            texts.append(in_child(long_text.measure, name, *sizes))
            save_json(wishes.out, "long_window", {"text": texts, "window": windows})
        if "window" in wishes.parts:
            lengths = [n for n in wishes.lengths if n <= POSITIONS.get(name, n)]
            windows.append(against(name, wishes.window, lengths, first, wishes.tokens, wishes.rounds))
        save(wishes.out, "long_window", {"text": texts, "window": windows}, page(texts, windows))
    if windows:
        plot(windows, wishes.out / "long_window.png")


if __name__ == "__main__":
    main()
