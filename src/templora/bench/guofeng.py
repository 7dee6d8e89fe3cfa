"""The paper's translation task: how much the adapter knows of a work, passage by passage.

Teacher-forced: references fill the context and are learned, which is the post-editing case and what the paper
measures. Free: the model's own output fills the context and is learned.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from templora.base import Base
from templora.bench.plot import canvas, save
from templora.bench.tables import table
from templora.errors import InvalidText
from templora.events import ChunkScored, PassageTranslated
from templora.formats.guofeng import Excerpt, read
from templora.metrics import Tally, count, perplexity
from templora.recipe import Recipe
from templora.tasks.translate import Passage, Translator
from templora.template import load

ENDINGS = (".json", ".json.xz")


@dataclass(frozen=True, slots=True)
class Work:
    """One work: the long part in reading order, and its last passages, which quality is measured on."""

    name: str
    train: list[Excerpt]
    last: list[Excerpt]

    @property
    def passages(self) -> list[Excerpt]:
        """All of it."""
        return [*self.train, *self.last]


@dataclass(slots=True)
class Outcome:
    """One work under one setting. scored: each passage's target tokens and NLLs in nats, adapted and base.

    drafts: the model's own translations of the last passages, under the adapter.
    """

    work: str
    pairs: int
    free: bool
    scored: list[ChunkScored] = field(default_factory=list[ChunkScored])
    drafts: list[str] = field(default_factory=list[str])
    sources: list[str] = field(default_factory=list[str])
    references: list[str] = field(default_factory=list[str])


def works(folder: Path, passages: int | None = None) -> list[Work]:
    """The works of a folder: NAME.train.json(.xz) with NAME.eval.json(.xz), in order of name.

    Args:
        passages: only so many from each work's beginning, and all of its last ones.

    Raises:
        InvalidText: there is none, or one that nothing can be measured on.
    """
    names = {
        path.name.removesuffix(ending).removesuffix(".train")
        for ending in ENDINGS
        for path in (folder.iterdir() if folder.is_dir() else [])
        if path.name.endswith(f".train{ending}")
    }
    if not names:
        raise InvalidText(f"{folder} holds no NAME.train.json files; give the folder of the GuoFeng set")
    return [_work(folder, name, passages) for name in sorted(names)]


def _work(folder: Path, name: str, passages: int | None) -> Work:
    train, last = (_excerpts(folder / f"{name}.{part}") for part in ("train", "eval"))
    work = Work(name, train[:passages], last)
    if not work.passages:
        lack = "no passages"
    elif not any(excerpt.target.strip() for excerpt in work.passages):
        lack = "no English"
    elif not all(excerpt.source.strip() for excerpt in work.passages):
        lack = "a passage without Chinese"
    else:
        return work
    raise InvalidText(
        f"{folder / name}.train.json holds {lack}; take it out of the folder, or download it anew"
    )


def _excerpts(start: Path) -> list[Excerpt]:
    """start: the file's name but for its ending."""
    files = (start.with_name(start.name + ending) for ending in ENDINGS)
    return next((read(file) for file in files if file.exists()), [])


def measure(
    base: Base, work: Work, recipe: Recipe, pairs: int, *, free: bool, drafts: bool, seed: int
) -> Outcome:
    """Go through a work.

    Args:
        pairs: K, earlier pairs in the prompt. free: learn the model's own output instead of the references.
        drafts: translate the last passages.
    """
    session = base.session(recipe, seed=seed)
    translator = Translator(session, load("auto", base, "zh", "en"), pairs)
    outcome = Outcome(work.name, pairs, free)
    first_last = len(work.train)
    for number, excerpt in enumerate(work.passages):
        is_last = number >= first_last
        translator.drafts = drafts and is_last
        passage = Passage(excerpt.source, None if free else excerpt.target)
        for event in translator.translate(passage):
            if isinstance(event, ChunkScored):
                outcome.scored.append(event)
            if isinstance(event, PassageTranslated) and is_last and event.draft is not None:
                outcome.drafts.append(event.draft)
                outcome.sources.append(excerpt.source)
                outcome.references.append(excerpt.target)
    session.discard()
    return outcome


def by_position(outcome: Outcome, parts: int = 4) -> list[tuple[str, int, float, float]]:
    """Quarters of the work: name, target tokens, perplexity of the base, of the adapter."""
    rows: list[tuple[str, int, float, float]] = []
    total = len(outcome.scored)
    bounds = [(i * total // parts, (i + 1) * total // parts, f"quarter {i + 1}") for i in range(parts)]
    for start, stop, name in [*bounds, (0, total, "all")]:
        chosen = [event for event in outcome.scored[start:stop] if event.base_nll is not None]
        tokens = sum(event.tokens for event in chosen)
        if tokens:
            base = sum(event.base_nll or 0.0 for event in chosen)
            adapted = sum(event.adapted_nll for event in chosen)
            rows.append((name, tokens, perplexity(base, tokens), perplexity(adapted, tokens)))
    return rows


def authors_statistic(outcome: Outcome) -> tuple[float, float] | None:
    """Mean over passages of each one's perplexity, base and adapted: what was published.

    None where nothing was scored: of its own output a model may write none.
    """
    chosen = [event for event in outcome.scored if event.base_nll is not None]
    if not chosen:
        return None
    base = sum(perplexity(event.base_nll or 0.0, event.tokens) for event in chosen)
    adapted = sum(perplexity(event.adapted_nll, event.tokens) for event in chosen)
    return base / len(chosen), adapted / len(chosen)


def markdown(outcomes: Sequence[Outcome]) -> str:
    """One table a work: perplexity of the translations by quarter, base and adapted."""
    pages: list[str] = []
    for outcome in outcomes:
        rows = [
            [name, f"{tokens:,}", f"{base:.2f}", f"{adapted:.2f}", f"{100 * (adapted / base - 1):+.1f} %"]
            for name, tokens, base, adapted in by_position(outcome)
        ]
        learned = "own output learned" if outcome.free else "references learned"
        pages.append(f"### {outcome.work}, K = {outcome.pairs}, {learned}")
        if (means := authors_statistic(outcome)) is None:
            pages.append("Nothing was written, so nothing was scored.")
            continue
        pages += [
            table(["part", "target tokens", "base", "adapted", "change"], rows),
            "Mean of per-passage perplexities (the authors' statistic): {:.2f} → {:.2f}.".format(*means),
        ]
    return "\n\n".join(pages)


def line(outcome: Outcome) -> str:
    """One line for the screen."""
    sums = Tally(), Tally()
    for event in outcome.scored:
        count(event, *sums)
    base, adapted = (each.perplexity for each in sums)
    figures = "nothing was written" if base is None else f"perplexity base {base:.2f}, adapter {adapted:.2f}"
    learned = "own output" if outcome.free else "references"
    return f"{outcome.work}, K = {outcome.pairs}, {learned}: {figures}"


def as_json(outcome: Outcome) -> dict[str, Any]:
    """Plain values: each passage's sums, and the last passages' translations."""
    return asdict(outcome) | {"by_position": by_position(outcome), "authors": authors_statistic(outcome)}


def plot(outcomes: Sequence[Outcome], path: Path) -> None:
    """Perplexity of translations by quarter, base (dashed) and adapted (solid), a colour a setting."""
    figure, (axes,) = canvas()
    for number, outcome in enumerate(outcomes):
        rows = by_position(outcome)[:-1]
        label = f"{outcome.work}, K = {outcome.pairs}" + (", own output" if outcome.free else "")
        places = [row[0] for row in rows]
        axes.plot(places, [row[2] for row in rows], f"C{number}--")
        axes.plot(places, [row[3] for row in rows], f"C{number}-", label=label)
    axes.set(yscale="log", ylabel="perplexity of the translation")
    save(figure, [axes], path)
