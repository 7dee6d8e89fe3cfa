"""The paper's translation task: how much the adapter knows of a work, passage by passage.

Teacher-forced: references fill the context and are learned, which is the post-editing case and what the paper
measures. Free: the model's own output fills the context and is learned.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
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
        InvalidText: there is none.
    """
    found: list[Work] = []
    for path in sorted(folder.glob("*.train.json*")) if folder.is_dir() else []:
        other = path.with_name(path.name.replace(".train.", ".eval."))
        found.append(Work(path.name.partition(".")[0], read(path), read(other) if other.exists() else []))
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
    """Mean over passages of each one's perplexity, base and adapted: not a perplexity, but what was published."""
    chosen = [event for event in outcome.scored if event.base_nll is not None]
    base = sum(perplexity(event.base_nll or 0.0, event.tokens) for event in chosen)
    adapted = sum(perplexity(event.adapted_nll, event.tokens) for event in chosen)
    return base / len(chosen), adapted / len(chosen)


def quality(drafts: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
    """BLEU and chrF by sacreBLEU, with their signatures."""
    metrics = needed("sacrebleu.metrics", "measuring translations")
    found: dict[str, Any] = {}
    for name, metric in (("bleu", metrics.BLEU()), ("chrf", metrics.CHRF())):
        found[name] = metric.corpus_score(list(drafts), [list(references)]).score
        found[f"{name}_signature"] = str(metric.get_signature())
    return found


def consistency(pairs: Iterable[tuple[str, str]], names: Iterable[str]) -> float | None:
    """Share of repeats of a source name that are translated as it mostly is; None without repeats.

    A name's translation in a passage is the capitalised word that most often goes with it, a heuristic that
    needs no dictionary: of all such words in the passages with the name, the one that is rarest elsewhere.
    """
    passages = [(source, set(re.findall(r"\b[A-Z][a-z]+\b", target))) for source, target in pairs]
    agree = repeats = 0
    for name in names:
        inside = [words for source, words in passages if name in source]
        outside = [words for source, words in passages if name not in source]
        if len(inside) < 2:
            continue
        counts: dict[str, float] = defaultdict(float)
        for words in inside:
            for word in words:
                counts[word] += 1
        for words in outside:
            for word in words & counts.keys():
                counts[word] -= len(inside) / len(outside)
        best = max(counts, key=lambda word: (counts[word], word), default=None)
        repeats += len(inside)
        agree += sum(best in words for words in inside)
    return agree / repeats if repeats else None


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
