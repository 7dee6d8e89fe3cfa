"""The paper's translation task: how much the adapter knows of a work, passage by passage.

Teacher-forced: references fill the context and are learned, which is the post-editing case and what the paper
measures. Free: the model's own output fills the context and is learned.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from templora.base import Base
from templora.bench.tables import table
from templora.errors import InvalidText
from templora.events import ChunkScored, PassageTranslated
from templora.formats.extra import needed
from templora.formats.guofeng import Excerpt, read
from templora.metrics import Tally, perplexity
from templora.tasks.translate import Passage, Translator
from templora.template import load


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


def works(folder: Path) -> list[Work]:
    """The works of a folder: NAME.train.json(.xz) with NAME.eval.json(.xz), in order of name.

    Raises:
        InvalidText: there is none, or one holds no passages.
    """
    found: list[Work] = []
    for path in sorted(folder.glob("*.train.json*")) if folder.is_dir() else []:
        name = path.name.partition(".")[0]
        other = next(iter(folder.glob(f"{name}.eval.json*")), None)
        found.append(Work(name, read(path), read(other) if other else []))
        if not found[-1].passages:
            raise InvalidText(f"{path} holds no passages; take it out of the folder, or download it anew")
    if not found:
        raise InvalidText(f"{folder} holds no NAME.train.json files; give the folder of the GuoFeng set")
    return found


def run(
    base: Base, work: Work, recipe: Any, pairs: int, *, free: bool, drafts: bool, **sizes: Any
) -> Iterator[Outcome]:
    """Go through a work; yields the same outcome, which grows, after each passage.

    Args:
        pairs: K, earlier pairs in the prompt. free: learn the model's own output instead of the references.
        drafts: translate the last passages. sizes: seed and recipe keys.
    """
    session = base.session(recipe, **sizes)
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
        yield outcome
    session.discard()


def measure(
    base: Base,
    work: Work,
    recipe: Any,
    pairs: int,
    passages: int | None,
    *,
    free: bool,
    drafts: bool,
    seed: int,
) -> Outcome:
    """`run`, to the end. passages: only so many from the work's beginning, and all of its last ones."""
    chosen = replace(work, train=work.train[:passages])
    *_, outcome = run(base, chosen, recipe, pairs, free=free, drafts=drafts, seed=seed)
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


def authors_statistic(outcome: Outcome) -> tuple[float, float]:
    """Mean over passages of each one's perplexity, base and adapted: what was published."""
    chosen = [event for event in outcome.scored if event.base_nll is not None]
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
        base, adapted = authors_statistic(outcome)
        pages += [
            f"### {outcome.work}, K = {outcome.pairs}, {learned}",
            table(["part", "target tokens", "base", "adapted", "change"], rows),
            f"Mean of per-passage perplexities (the authors' statistic): {base:.2f} → {adapted:.2f}.",
        ]
    return "\n\n".join(pages)


def tally(outcome: Outcome) -> tuple[Tally, Tally]:
    """Base and adapted, over all passages."""
    base, adapted = Tally(), Tally()
    for event in outcome.scored:
        adapted.add(event.adapted_nll, event.tokens)
        if event.base_nll is not None:
            base.add(event.base_nll, event.tokens)
    return base, adapted


def as_json(outcome: Outcome) -> dict[str, Any]:
    """Plain values: each passage's sums, and the last passages' translations."""
    return asdict(outcome) | {"by_position": by_position(outcome), "authors": authors_statistic(outcome)}


def plot(outcomes: Sequence[Outcome], path: Path) -> None:
    """Perplexity of translations by quarter, base (dashed) and adapted (solid), a colour a setting."""
    pyplot = needed("matplotlib.pyplot", "plotting", "plot")
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for number, outcome in enumerate(outcomes):
        rows = by_position(outcome)[:-1]
        label = f"{outcome.work}, K = {outcome.pairs}" + (", own output" if outcome.free else "")
        places = [row[0] for row in rows]
        axes.plot(places, [row[2] for row in rows], f"C{number}--")
        axes.plot(places, [row[3] for row in rows], f"C{number}-", label=label)
    axes.set(yscale="log", ylabel="perplexity of the translation")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
