"""Pictures of results, with matplotlib (extra `plot`)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from templora.bench.cost import Cost
from templora.bench.tables import by_position
from templora.errors import OutputError

BINS = 24  # points on a line: enough for a shape, few enough to be smooth


def plot_by_position(
    results: Sequence[dict[str, Any]] | Mapping[str, Sequence[dict[str, Any]]], path: Path
) -> None:
    """Perplexity by position in the document, base and adapted; one pair of lines for each named group.

    Raises:
        OutputError: matplotlib is not installed, or the picture cannot be written.
    """
    groups = results if isinstance(results, Mapping) else {"": results}
    figure, (axes,) = canvas()
    for name, group in groups.items():
        own = f", {name}" if len(groups) > 1 else ""
        longest = max((entry["tokens"] for entry in group), default=0)
        step = max(1, longest // BINS)
        bins = [(start, start + step) for start in range(0, longest, step)]
        points = [(span[0] + step / 2, b, a) for span, b, a in by_position(group, bins) if a.tokens]
        places = [place for place, _, _ in points]
        axes.plot(places, [a.perplexity for _, _, a in points], label=f"base and adapter{own}")
        if all(b.tokens for _, b, _ in points):
            axes.plot(places, [b.perplexity for _, b, _ in points], "--", label=f"base{own}")
    axes.set(xlabel="position in the text (tokens)", ylabel="perplexity", ylim=(0, None))
    save(figure, [axes], path)


def plot_costs(rows: Sequence[Cost], path: Path) -> None:
    """Perplexity against time per token, scored and written; a point a window, its area the peak memory.

    Raises:
        OutputError: as `plot_by_position`.
    """
    figure, panels = canvas(2)
    for axes, name in zip(panels, ("scoring", "writing"), strict=True):
        for adapter, label in ((False, "base"), (True, "base and adapter")):
            own = [row for row in rows if row.adapter == adapter]
            times, heights = [getattr(row, name) for row in own], [row.perplexity for row in own]
            axes.plot(times, heights, "-" if adapter else "--", label=label)
            axes.scatter(times, heights, [row.peak_mb / 10 for row in own], alpha=0.5)
            for row, time, height in zip(own, times, heights, strict=True):
                axes.annotate(str(row.window), (time, height), fontsize=8)
        axes.set(xlabel=f"{name}: seconds per 1,000 tokens", ylabel="perplexity", xlim=(0, None))
    save(figure, panels, path)


def canvas(panels: int = 1) -> tuple[Any, list[Any]]:
    """A figure and its panels, side by side.

    Raises:
        OutputError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise OutputError('plots need matplotlib; say: pip install "templora[plot]"') from error
    figure = Figure(figsize=(7 if panels == 1 else 4 * panels, 4), layout="constrained")
    return figure, list(figure.subplots(1, panels, squeeze=False)[0])


def see_drawable(path: Path, *, replace: bool) -> None:
    """See that a picture can be drawn there, before hours of scoring. replace: in place of one that is there.

    Raises:
        OutputError: matplotlib is not installed, or knows no such kind of file, or there is no such place, or
            it is taken.
    """
    figure, _ = canvas()
    if _kind(path) not in figure.canvas.get_supported_filetypes():
        raise OutputError(f"{path} is no kind of picture; choose a name that ends in .png or .svg")
    if not path.parent.is_dir():
        raise OutputError(f"no folder {path.parent} for {path.name}; make it, or choose another")
    if path.is_dir():
        raise OutputError(f"{path} is a folder, not a picture; move it away, or choose another name")
    if path.exists() and not replace:
        raise OutputError(f"{path} exists and is never overwritten; move it away, or choose another name")


def _kind(path: Path) -> str:
    """Of picture. Said to matplotlib, which else would add it to a name that does not."""
    return path.suffix[1:].lower() or "png"


def save(figure: Any, panels: Sequence[Any], path: Path) -> None:
    """Legend, light grid, file."""
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    try:
        figure.savefig(path, dpi=150, format=_kind(path))
    except (OSError, ValueError) as error:
        raise OutputError(f"cannot write {path}: {error}; choose a name that ends in .png or .svg") from error
