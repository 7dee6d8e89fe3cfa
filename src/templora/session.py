"""One text in time: read, write, score, learn. All loops are generators of typed events.

Between two events the base is bare, and the session is whole: a loop may be left at any event and
taken up again later with the same result.
"""

import io
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from transformers import LogitsProcessorList

from templora.adapter import Adapter
from templora.base import Base
from templora.detokenizer import continuing
from templora.errors import InvalidRecipe, InvalidText, NeedsFolder, SessionClosed
from templora.events import ChunkWritten, Event, Token, Warned
from templora.learner import Learner
from templora.memory import fits_in_memory
from templora.metrics import Reading, counted
from templora.passes import Passes
from templora.pen import Pen, Wishes
from templora.probe import refuse_modes
from templora.recipe import Recipe, fitted, refitted
from templora.recipe import load as load_recipe
from templora.sampling import Sampler, Sampling
from templora.study import Study
from templora.turns import OneThread, one_thread
from templora.window import Span

if TYPE_CHECKING:
    from templora.tasks.logprobs import Logprobs
    from templora.tasks.translate import Passage

# What a session holds beside its adapter, which is most of its memory.
BESIDE = ("learner", "passes", "decoder", "study")


@one_thread("extend", "state", "load_state", "discard")
class Session:
    """A text with its adapter, optimiser and random state on one base.

    Make one with `Base.session`; `with` discards it. ids: what the base puts before any text, then the text.
    """

    def __init__(
        self, base: Base, recipe: str | Path | Recipe = "default", *, seed: int = 0, **overrides: Any
    ) -> None:
        refuse_modes(base.device)
        if not -(2**63) <= seed < 2**63:
            raise InvalidRecipe(f"seed {seed} is too large; choose one of up to 18 digits")
        self.base, self.seed = base, int(seed)
        wished = load_recipe(recipe, overrides)
        self.plan, self.recipe = fitted(wished, base.positions)
        self._start_afresh()
        self.ids: list[int] = []
        self._text, self._given = io.StringIO(), 0  # characters up to the last that were given
        self._closed, self.alone = False, OneThread()
        self._moves = 0  # how often the text has become another one
        news = f"this base has {base.positions} positions: {(sizes := refitted(wished, self.recipe))}"
        self._to_announce: list[Event] = [Warned("fitted", news)] if sizes else []

    def _start_afresh(self) -> None:
        """Adapter, optimiser, guard, caches and random state as before the first token."""
        base = self._learns_on()
        self.adapter = Adapter(base.model, self.recipe, self.seed, base.start)
        self.learner = Learner(self.adapter, self.recipe, self.seed)
        self.passes = Passes(base, self.adapter, self.plan, self.recipe)
        self.decoder = self.passes.decoder
        self.study = Study(self.passes, self.learner, self.recipe)
        self.sampler = Sampler(self.seed)
        self.chunk = 0
        self._written = 0  # tokens of the current chunk that the model wrote itself

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.discard()

    @property
    def text(self) -> str:
        """All text so far, given and written."""
        return self._text.getvalue()

    def read(self, text: str, *, score_base: bool = False) -> Reading:
        """Learn a given text, chunk by chunk; what does not fill a chunk waits for what comes next.

        Args:
            score_base: also score each chunk under the bare base, for comparison.

        Raises:
            InvalidText: it is empty, or no text. OutOfMemory: the sizes are too large for this machine.
        """
        before = max(len(self.ids), len(self.base.prefix_ids))
        base, adapted = counted(self.reading(text, score_base=score_base))
        tokens = len(self.ids) - before
        return Reading(tokens, adapted.tokens, base.perplexity, adapted.perplexity)

    def reading(self, text: str, *, score_base: bool = False) -> Iterator[Event]:
        """`read`, as a generator of events: each chunk scored, then learned, skipped or rolled back."""
        self._check_open()
        if not text:
            raise InvalidText("the text is empty; give at least one character")
        self.extend(continuing(self.base, self.ids, self.text, text), text)
        yield from self.learning(score_base=score_base)

    def learning(self, *, score_base: bool = False) -> Iterator[Event]:
        """Score and learn every chunk that is full."""
        yield from self._announcements()
        yield from self._finish_full_chunks(score_base)

    def score_rest(self, *, score_base: bool = False) -> Iterator[Event]:
        """Score what does not fill a chunk, without learning it: the end of a text."""
        yield from self._finish_full_chunks(score_base)
        span = self.plan.span(self.chunk, len(self.ids))
        if span.tokens < 1:
            return
        looking = self.passes.looking(self.ids, self.plan.span(self.chunk), span.stop, bare=score_base)
        with self.alone, fits_in_memory(self.plan), looking:
            scored = self.study.score(self.ids, span, score_base=score_base)
        yield scored

    def extend(self, ids: Sequence[int], text: str) -> None:
        """Append given tokens and their text without learning yet; any loop learns them first."""
        self.base.check(ids)
        self._give([*([] if self.ids else self.base.prefix_ids), *map(int, ids)], text)  # a tensor's are none

    def write(
        self,
        tokens: int,
        *,
        sampling: Sampling | None = None,
        processors: LogitsProcessorList | None = None,
        stop: Sequence[str] = (),
        stop_at_eos: bool = False,
        score_base: bool = True,
        **sampling_wishes: Any,
    ) -> Iterator[Event]:
        """Write on, token by token, learning each chunk as soon as it is full.

        Args:
            tokens: how many to write at most.
            sampling: how to draw; else the base's own generation config with `sampling_wishes`
                (the fields of `Sampling`: temperature, top_k, …, dry_multiplier) over it.
            processors: transformers logits processors to use in place of all that; they get the whole text.
            stop: strings that end the text when they appear in what is written.
            stop_at_eos: end where the model ends a document; otherwise it is never drawn.
            score_base: also score each chunk under the bare base, for comparison.

        Yields:
            `Token`; `ChunkWritten`, `ChunkScored`, then `ChunkLearned`, `ChunkSkipped` or `RolledBack`;
            `Warned`; and one `End`.
        """
        self._check_open()
        if not self.ids and not self.base.prefix_ids:
            raise InvalidText("the prompt is empty and this base has no start token; give a prompt")
        draw = Sampling.chosen(sampling, self.base.model.generation_config, sampling_wishes)
        return self._write(Wishes(tokens, draw, processors, stop, stop_at_eos, score_base))

    def _write(self, wishes: Wishes) -> Iterator[Event]:
        if not self.ids:
            self._give(self.base.prefix_ids, "")
        pen = Pen(self.base, wishes, self.ids, self.text, self._own_from())
        clock, seen = time.perf_counter(), (self._moves, len(self.ids))
        yield from self._announcements()
        while True:
            for event in self._finish_full_chunks(wishes.score_base, clock):
                pen.count(event)
                yield event
                clock = time.perf_counter()
            if pen.done:
                break
            if seen != (self._moves, len(self.ids)):  # moved, or more was given, while the loop was open
                if not self.ids:
                    self._give(self.base.prefix_ids, "")
                pen.follow(self.ids, self.text, self._own_from())
            with self.alone:
                token = self._next_token(pen)
                if (piece := pen.take(token)) is None:
                    self._looked()
                    break
                self._append(token, piece)
            seen = self._moves, len(self.ids)
            yield Token(len(self.ids) - 1, token, piece)
        for event in self._outstanding():
            pen.count(event)
            yield event
        yield pen.end()

    def translate(
        self, passages: "Iterable[Passage]", source_language: str, target_language: str, **wishes: Any
    ) -> Iterator[Event]:
        """Translate passage by passage; see `templora.tasks.translate.translating`."""
        from templora.tasks.translate import translating

        self._check_open()
        return translating(self, passages, source_language, target_language, **wishes)

    def logprobs(self, *continuations: str | Sequence[int], base: bool = False) -> "list[Logprobs]":
        """How likely each is after the text; see `templora.tasks.logprobs`. base: under the bare base."""
        from templora.tasks.logprobs import logprobs

        return logprobs(self, continuations, base=base)

    def state(self) -> dict[str, Any]:
        """All that a session of the same base, recipe and seed needs to continue bit for bit.

        Plain values and tensors, copied: `torch.save` stores it, `torch.load(weights_only=True)` reads it.
        """
        self._check_open()
        return {
            "ids": list(self.ids),
            "text": self.text,
            "given": self._given,
            "chunk": self.chunk,
            "written": self._written,
            "sampler": (self.sampler.seed, self.sampler.draws),
            "study": self.study.state(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from what `state` returned.

        Raises:
            InvalidRecipe: it is of a session with another recipe; nothing has changed.
        """
        self._check_open()
        self.study.load_state(state["study"])
        self.ids, self.chunk, self._written = list(state["ids"]), state["chunk"], state["written"]
        self._moves += 1
        self._text = io.StringIO()
        self._text.write(state["text"])
        self._given = state.get("given", len(state["text"]))
        self.sampler = Sampler(*state["sampler"])

    def discard(self) -> None:
        """Throw the adapter away. The text stays readable; the base is bit for bit what was loaded."""
        self.adapter.discard()
        for held in BESIDE:
            self.__dict__.pop(held, None)
        self._closed = True

    # What sessions that learn while they write (`parallel`) or live on disk (`durable`) do otherwise.

    def _learns_on(self) -> Base:
        return self.base

    def _outstanding(self) -> Iterator[Event]:
        """What there is to say of chunks that are learned later than they are full."""
        return iter(())

    def _give(self, ids: Sequence[int], text: str) -> None:
        self.ids.extend(ids)
        self._text.write(text)
        self._given = self._text.tell()

    def _own_from(self) -> int:
        """Where in the text the end begins that the model wrote, in characters."""
        return self._given

    def _looked(self) -> None:
        """A token was drawn and not appended."""

    def _scores_base(self, span: Span, wish: bool) -> bool:
        return wish

    def _own_tokens(self, span: Span) -> int:
        """How many tokens of the chunk that is being finished the model wrote itself."""
        return self._written

    def _finished(self, span: Span, score_base: bool, events: list[Event]) -> list[Event]:
        """A chunk was scored and learned; returns what else there is to say."""
        return []

    def _append(self, token: int, piece: str) -> None:
        self.ids.append(token)
        self._text.write(piece)
        self._written += 1

    def _next_token(self, pen: Pen) -> int:
        self._check_open()
        span = self.plan.span(self.chunk)
        with fits_in_memory(self.plan):
            logits = self.decoder.logits(self.ids, span)
            with self.decoder.taking_back():  # after a processor's own error, or an interrupt
                return self.sampler.draw(logits, pen.shown(span.visible), pen.processors, greedy=pen.greedy)

    def _finish_full_chunks(self, score_base: bool, clock: float | None = None) -> Iterator[Event]:
        clock = time.perf_counter() if clock is None else clock
        self._check_open()  # also where a session is discarded while its loop is open
        while len(self.ids) >= (span := self.plan.span(self.chunk)).stop:
            with self.alone, fits_in_memory(self.plan):
                written, seconds = self._own_tokens(span), time.perf_counter() - clock
                base = self._scores_base(span, score_base)
                events = self.study.finish(self.ids, span, written, score_base=base)
                self.chunk, self._written = self.chunk + 1, 0
                events += self._finished(span, base, events)
            if written:
                yield ChunkWritten(span.chunk, span.start, span.tokens, written, seconds)
            yield from events
            self._check_open()

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            raise NeedsFolder.of(name)

    def _announcements(self) -> Iterator[Event]:
        announced, self._to_announce = self._to_announce, []
        yield from announced

    def _check_open(self) -> None:
        if self._closed:
            raise SessionClosed("this session was discarded; make a new one with base.session()")
        with self.alone:
            refuse_modes(self.base.device)
