"""Translating a long work passage by passage; the adapter learns each pair before the next passage.

One passage: prompt (template, the last pairs, the source) → draft → check, once more if that fails → a
person's correction or a reference, if there is one → score → learn, labels on the translation alone.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from templora.detokenizer import Detokenizer
from templora.errors import InvalidText, WindowTooLarge
from templora.events import ChunkLearned, ChunkScored, ChunkSkipped, Event, PassageTranslated, Warned
from templora.memory import fits_in_memory
from templora.sampling import Sampling
from templora.session import Session
from templora.tasks.checks import MEANS, problem
from templora.template import Pair, Template, load
from templora.window import Span

# A draft that fails its check is drawn once more, less faithfully to the likeliest word.
RETRY = {"temperature": 0.6, "repetition_penalty": 1.15}
# Events that say where in the text something happened.
PLACED = (ChunkScored, ChunkLearned, ChunkSkipped)
Review = Callable[[str, str], str]


def drawing(config: GenerationConfig | None, temperature: float = 0.0) -> Sampling:
    """How a translation is drawn: as the model's config says, but names and terms must come again: no DRY."""
    return Sampling.of(config, temperature=temperature, dry_multiplier=0.0)


@dataclass(frozen=True, slots=True)
class Passage:
    """A passage to translate. reference: a translation that is given. context: pairs that stand before it
    instead of the last ones."""

    source: str
    reference: str | None = None
    context: tuple[Pair, ...] | None = None


@dataclass(frozen=True, slots=True)
class Translated:
    """A passage that is done: all that learning it depended on, as plain values.

    base: whether the base was scored. learned: False where the check failed.
    """

    source: str
    target: str
    origin: str
    base: bool
    learned: bool
    context: tuple[Pair, ...] | None = None


def translating(
    session: Session,
    passages: Iterable[Passage],
    source_language: str,
    target_language: str,
    *,
    template: str | Path = "auto",
    **wishes: Any,
) -> Iterator[Event]:
    """Translate with a session, learning each pair; a generator of events.

    Args:
        template: a name or a file, see `templora.template.load`. wishes: as `Translator`'s.

    Raises:
        InvalidTemplate, InvalidText: it cannot work.
    """
    filled = load(template, session.base, source_language, target_language)
    return Translator(session, filled, **wishes).run(passages)


@dataclass
class Translator:
    """Translates with one session's adapter.

    pairs: how many earlier pairs stand in a prompt. terms: source term → target term. drafts: write a draft
    also where a reference is given. review: shown source and draft, returns what it should be. scores_base:
    score each translation under the bare base as well.
    """

    session: Session
    template: Template
    pairs: int = 1
    sampling: Sampling | None = None
    terms: Mapping[str, str] = field(default_factory=dict[str, str])
    drafts: bool = False
    review: Review | None = None
    scores_base: bool = True
    done: list[Translated] = field(default_factory=list[Translated])

    def __post_init__(self) -> None:
        """Prepare; nothing runs yet."""
        config = self.session.base.model.generation_config
        self.sampling = self.sampling or drawing(config)
        self.end = self.template.end_ids(self.session.base)
        self._tokens = 0  # of translations so far
        self._cut_before = False
        self._has_example = False  # the prompt of the passage that is being drafted

    def run(self, passages: Iterable[Passage]) -> Iterator[Event]:
        """Translate each, learning on the way.

        Raises:
            InvalidText: a passage without text. OutOfMemory, SessionClosed: as `Session.write`.
        """
        for passage in passages:
            yield from self.translate(passage)

    def translate(self, passage: Passage) -> list[Event]:
        """One passage from draft to update; all of it is done when this returns."""
        if not passage.source.strip():
            raise InvalidText(f"passage {len(self.done)} holds no text; leave it out")
        number, started = len(self.done), time.perf_counter()
        prompt, events = self._prompt(passage)
        draft: str | None = None
        wrong: str | None = None
        if passage.reference is None or self.drafts:
            with self.session.alone, fits_in_memory(self.session.plan):
                draft, wrong = self._draft(number, prompt, passage.source)
        target, origin = self._settled(passage, draft)
        if origin == "own" and wrong:
            message = (
                f"passage {number}: the translation {MEANS[wrong]}; it is kept for you to mend, not learned"
            )
            events.append(Warned("check", message))
        learned = bool(target.strip()) and not (origin == "own" and wrong)
        record = Translated(passage.source, target, origin, self.scores_base, learned, passage.context)
        seconds = time.perf_counter() - started
        events.append(PassageTranslated(number, passage.source, draft, target, origin, wrong, seconds))
        return events + self._take(record, prompt)

    def take_up(self, records: Sequence[Translated]) -> None:
        """Go on after these, which the adapter has learned already."""
        self.done = list(records)
        self._tokens = sum(len(self._labels(r.target)) for r in self.done if r.target.strip())

    def learn_again(self, record: Translated) -> list[Event]:
        """Score and learn a passage that was translated before, as it was then."""
        prompt, _ = self._prompt(Passage(record.source, record.target, record.context))
        return self._take(record, prompt)

    def _take(self, record: Translated, prompt: list[int]) -> list[Event]:
        number, labels = len(self.done), self._labels(record.target)
        span = Span(number, 0, len(prompt), len(prompt) + len(labels))
        ids, events = prompt + labels, list[Event]()
        study = self.session.study
        # Keys from drafting were made in other pieces, so they differ in the last bit: with them, a passage
        # that is learned again without its draft would not give the same adapter.
        study.passes.forget()
        if record.target.strip():
            with self.session.alone, fits_in_memory(self.session.plan):
                if record.learned:
                    own = len(labels) if record.origin == "own" else 0
                    events = study.finish(ids, span, own, score_base=record.base)
                else:
                    skipped = ChunkSkipped(number, span.start, span.tokens, "check")
                    events = [study.score(ids, span, score_base=record.base), skipped]
        study.passes.forget()  # the next passage has a prompt of its own
        self.done.append(record)
        start = self._tokens
        self._tokens += span.tokens if record.target.strip() else 0
        # To whoever counts, a translation's tokens follow those of the one before.
        return [replace(e, start=start) if isinstance(e, PLACED) else e for e in events]

    def _settled(self, passage: Passage, draft: str | None) -> tuple[str, str]:
        if passage.reference is not None:
            return passage.reference, "reference"
        assert draft is not None
        if self.review is None:
            return draft, "own"
        target = self.review(passage.source, draft)
        return target, "accepted" if target == draft else "correction"

    def _labels(self, target: str) -> list[int]:
        """The translation and its end; a longer one than a chunk is learned up to there."""
        room = max(0, self.session.plan.chunk - len(self.end))
        return self.session.base.encode(target)[:room] + self.end

    def _prompt(self, passage: Passage) -> tuple[list[int], list[Event]]:
        """The prompt, cut from its old end to fit the window: first whole pairs, then tokens."""
        context = passage.context
        if context is None:
            # A translation that failed would be an example of how to fail.
            good = islice((record for record in reversed(self.done) if record.learned), self.pairs)
            context = tuple((record.source, record.target) for record in [*good][::-1])
        self._has_example = bool(context)
        base, window = self.session.base, self.session.plan.window
        chat = self.template.end is None
        while True:
            ids = self.template.ids(base, context, passage.source, self.terms)
            if len(ids) <= window or not (chat and context):
                break
            context = context[1:]
        if len(ids) <= window:
            return ids, []
        prefix = [] if chat else base.prefix_ids
        if window <= len(prefix):
            raise WindowTooLarge(f"a window of {window} tokens holds no source; make it larger")
        cut, self._cut_before = not self._cut_before, True
        message = (
            f"the prompt of passage {len(self.done)} has {len(ids)} tokens, the window {window}: it is cut "
            "from its old end (said once); use shorter passages, fewer pairs or a larger window"
        )
        kept = [*prefix, *ids[len(ids) - window + len(prefix) :]]
        return kept, [Warned("cut", message)] if cut else []

    def _draft(self, number: int, prompt: list[int], source: str) -> tuple[str, str | None]:
        """The model's translation and what is wrong with it; of two that fail, the first not empty."""
        assert self.sampling is not None
        tries = (self.sampling, replace(self.sampling, **RETRY))
        drafts: list[tuple[str, str | None]] = []
        # Nothing but an example says how a translation ends; without one it has as many lines as its source.
        lines = None if self._has_example else source.strip().count("\n") + 1
        for sampling in tries:
            text, ended = self._generate(number, prompt, sampling, lines)
            drafts.append((text, problem(source, text, ended=ended)))
            if drafts[-1][1] is None:
                return drafts[-1]
        return max(drafts, key=lambda draft: draft[1] != "empty")

    def _generate(
        self, number: int, prompt: list[int], sampling: Sampling, lines: int | None
    ) -> tuple[str, bool]:
        session = self.session
        eos, end = set(session.base.eos_ids), self.template.end
        processors = sampling.processors([], str(session.base.device))
        span = Span(number, 0, len(prompt), len(prompt) + session.plan.chunk)
        text, ids, detokenizer = "", list(prompt), Detokenizer(session.base.tokenizer, prompt)
        while len(ids) < span.stop:
            logits = session.decoder.logits(ids, span)
            token = session.sampler.draw(logits, ids, processors, greedy=sampling.temperature == 0)
            if token in eos:
                return text.strip(), True
            ids.append(token)
            text += detokenizer.step(token)
            # Not at the very beginning: some models begin with a line feed of their own.
            begin = len(text) - len(text.lstrip())
            if end is not None and (stop := text.find(end, begin)) >= 0:
                return text[:stop].strip(), True
            if end is not None and lines and text.count("\n", begin) >= lines:
                return "\n".join(text[begin:].split("\n")[:lines]).strip(), True
        return text.strip(), False
