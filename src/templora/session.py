"""One text in time: read, write, score, learn. All loops are generators of typed events.

Between two events the base is bare, and the session is whole: a loop may be left at any event and
taken up again later with the same result.
"""

import io
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from templora.adapter import Adapter
from templora.base import Base
from templora.decoder import Decoder
from templora.detokenizer import Detokenizer
from templora.errors import InvalidText, OutOfMemory, SessionClosed
from templora.events import ChunkLearned, ChunkScored, ChunkWritten, End, Event, Token, Warned
from templora.learner import Learner, NotFinite, Update
from templora.metrics import Tally
from templora.recipe import SIZES, Recipe
from templora.recipe import load as load_recipe
from templora.sampling import Sampler, Sampling
from templora.window import Span, fit


@dataclass(frozen=True, slots=True)
class Reading:
    """What reading a text came to. Perplexities are None where no chunk was full."""

    tokens: int
    scored_tokens: int
    base_perplexity: float | None
    adapted_perplexity: float | None


class Session:
    """A text with its adapter, optimiser and random state on one base.

    Make one with `Base.session`. ids: the tokens of the text, after what the base puts before any text.
    """

    def __init__(
        self,
        base: Base,
        recipe: str | Path | Recipe = "default",
        *,
        seed: int = 0,
        **overrides: Any,
    ) -> None:
        self.base, self.seed = base, seed
        self.recipe = load_recipe(recipe, overrides)
        sizes = {name: getattr(self.recipe, name) for name in SIZES}
        self.plan = fit(**sizes, positions=base.positions, fixed=self.recipe.fixed)
        self.adapter = Adapter(base.model, self.recipe, seed)
        self.learner = Learner(self.adapter, self.recipe, seed)
        self.decoder = Decoder(base, self.adapter, self.plan, reuse=self.recipe.cache == "reuse")
        self.sampler = Sampler(seed)
        self.ids: list[int] = []
        self.chunk = 0
        self._written = 0  # tokens of the current chunk that the model wrote itself
        self._text = io.StringIO()
        self._closed = False
        self._to_announce = self._fitting()

    @property
    def text(self) -> str:
        """All text so far, given and written."""
        return self._text.getvalue()

    def read(self, text: str, *, score_base: bool = False) -> Reading:
        """Learn a given text, chunk by chunk; what does not fill a chunk waits for what comes next.

        Args:
            score_base: also score each chunk under the bare base, for comparison.

        Raises:
            InvalidText: it is empty. OutOfMemory: the sizes are too large for this machine.
        """
        before, base, adapted = len(self.ids), Tally(), Tally()
        for event in self.reading(text, score_base=score_base):
            _count(event, base, adapted)
        tokens = len(self.ids) - before
        return Reading(tokens, adapted.tokens, base.perplexity, adapted.perplexity)

    def reading(self, text: str, *, score_base: bool = False) -> Iterator[Event]:
        """`read`, as a generator of `ChunkScored` and `ChunkLearned` events."""
        self._check_open()
        if not text:
            raise InvalidText("the text is empty; give at least one character")
        self.extend(self.base.encode(text), text)
        yield from self._announcements()
        yield from self._finish_full_chunks(score_base)

    def extend(self, ids: Sequence[int], text: str) -> None:
        """Append given tokens and their text without learning yet; any loop learns them first."""
        if not self.ids and self.base.has_tokenizer:
            self.ids.extend(self.base.prefix_ids)
        self.ids.extend(ids)
        self._text.write(text)

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
                (temperature, top_k, top_p, min_p, repetition_penalty) over it.
            processors: transformers logits processors to use in place of all that.
            stop: strings that end the text when they appear in what is written.
            stop_at_eos: end where the model ends a document; otherwise it is never drawn.
            score_base: also score each chunk under the bare base, for comparison.

        Yields:
            `Token`, `ChunkWritten`, `ChunkScored`, `ChunkLearned`, `Warned`, and one `End`.
        """
        self._check_open()
        if not self.ids and not (self.base.has_tokenizer and self.base.prefix_ids):
            raise InvalidText("the prompt is empty and this base has no start token; give a prompt")
        draw = sampling or Sampling.of(self.base.model.generation_config, **sampling_wishes)
        return self._write(tokens, draw, processors, tuple(stop), stop_at_eos, score_base)

    def _write(
        self,
        tokens: int,
        sampling: Sampling,
        processors: LogitsProcessorList | None,
        stop: tuple[str, ...],
        stop_at_eos: bool,
        score_base: bool,
    ) -> Iterator[Event]:
        if not self.ids:
            self.ids.extend(self.base.prefix_ids)
        eos = self.base.eos_ids
        if processors is None:
            processors = sampling.processors([] if stop_at_eos else eos, str(self.base.device))
        detokenizer = (
            Detokenizer(self.base.tokenizer, self.ids) if self.base.has_tokenizer else None
        )
        started, clock = time.perf_counter(), time.perf_counter()
        base, adapted, reason, written = Tally(), Tally(), "tokens", 0
        tail = ""
        yield from self._announcements()
        while True:
            for event in self._finish_full_chunks(score_base, clock):
                _count(event, base, adapted)
                yield event
                clock = time.perf_counter()
            if written >= tokens or reason != "tokens":
                break
            token = self._next_token(processors, greedy=sampling.temperature == 0)
            if stop_at_eos and token in eos:
                reason = "eos"
                break
            piece = detokenizer.step(token) if detokenizer else ""
            self._append(token, piece)
            written += 1
            if stop:
                tail = (tail + piece)[-2 * max(map(len, stop)) - len(piece) :]
                reason = "stop" if any(s in tail for s in stop) else reason
            yield Token(len(self.ids) - 1, token, piece)
        seconds = time.perf_counter() - started
        yield End(reason, written, seconds, adapted.tokens, base.perplexity, adapted.perplexity)

    def discard(self) -> None:
        """Throw the adapter away. The text stays readable; the base is bit for bit what was loaded."""
        self.adapter.discard()
        self._closed = True

    def _append(self, token: int, piece: str) -> None:
        self.ids.append(token)
        self._text.write(piece)
        self._written += 1

    def _next_token(self, processors: LogitsProcessorList, *, greedy: bool) -> int:
        span = self.plan.span(self.chunk)
        with self._memory():
            logits = self.decoder.logits(self.ids, span)
            return self.sampler.draw(logits, self.ids[span.visible :], processors, greedy=greedy)

    def _finish_full_chunks(self, score_base: bool, clock: float | None = None) -> Iterator[Event]:
        clock = time.perf_counter() if clock is None else clock
        while len(self.ids) >= (span := self.plan.span(self.chunk)).stop:
            written, seconds = self._written, time.perf_counter() - clock
            events = self._finish(span, score_base)
            if written:
                yield ChunkWritten(span.chunk, span.start, span.tokens, written, seconds)
            yield from events

    def _finish(self, span: Span, score_base: bool) -> list[Event]:
        """Score and learn one full chunk; no event leaves before both are done."""
        with self._memory():
            base_nll = self._base_nll(span) if score_base else None
            started = time.perf_counter()
            score, outcome = self._score_and_learn(span)
        self.chunk, self._written = self.chunk + 1, 0
        place = (span.chunk, span.start, span.tokens)
        events: list[Event] = [ChunkScored(*place, score, base_nll)]
        if isinstance(outcome, Update):
            seconds = time.perf_counter() - started
            rate, norm = outcome.learning_rate, outcome.gradient_norm
            events.append(ChunkLearned(*place, outcome.version, rate, norm, seconds))
        elif outcome is not None:
            message = f"chunk {span.chunk} was not learned: {outcome}; the update was dropped, the text goes on"
            events.append(Warned("not_finite", message))
        return events

    def _score_and_learn(self, span: Span) -> tuple[float, Update | NotFinite | None]:
        """The chunk's summed NLL under the adapter as it stands, and what learning it came to."""
        learns, plan = self.recipe.learning_rate > 0, self.plan
        one_pass = learns and self.learner.one_pass and plan.context == plan.window
        with self.adapter.attached(), torch.set_grad_enabled(one_pass):
            first = self._nll(span, plan.window)
        score = float(first.detach().sum())
        if not learns:
            return score, None
        try:
            update = self.learner.learn(
                span.chunk, lambda: self._nll(span, plan.context), first if one_pass else None
            )
        except NotFinite as error:
            return score, error
        return score, update

    def _nll(self, span: Span, context: int) -> Tensor:
        """NLL of the chunk's tokens, [tokens], seeing `context` tokens before it. Gradients flow."""
        labels = self.ids[span.start : span.stop]
        if self.recipe.context_from == "recompute":
            first = max(0, span.start - context)
            return self.base.nll(self.ids[first : span.stop - 1], labels, 0)
        prefix, position = self.decoder.prefix(self.ids, span, context)
        nll = self.base.nll(self.ids[span.start - 1 : span.stop - 1], labels, position, prefix)
        self.decoder.keep(prefix, span)
        return nll

    def _base_nll(self, span: Span) -> float:
        with torch.no_grad():
            labels = self.ids[span.start : span.stop]
            return float(self.base.nll(self.ids[span.visible : span.stop - 1], labels).sum())

    def _announcements(self) -> Iterator[Event]:
        announced, self._to_announce = self._to_announce, []
        yield from announced

    def _fitting(self) -> list[Event]:
        changed = [n for n in sorted(SIZES) if getattr(self.plan, n) != getattr(self.recipe, n)]
        if not changed:
            return []
        sizes = ", ".join(
            f"{n} {getattr(self.recipe, n)} → {getattr(self.plan, n)}" for n in changed
        )
        return [Warned("fitted", f"this base has {self.base.positions} positions: {sizes}")]

    def _check_open(self) -> None:
        if self._closed:
            raise SessionClosed("this session was discarded; make a new one with base.session()")

    @contextmanager
    def _memory(self) -> Iterator[None]:
        try:
            yield
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not _is_out_of_memory(error):
                raise
            plan = self.plan
            raise OutOfMemory(
                f"out of memory at window {plan.window}, chunk {plan.chunk}, context {plan.context}; "
                "lower chunk or context if it happened while learning, else window"
            ) from error


def _is_out_of_memory(error: RuntimeError) -> bool:
    message = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in message


def _count(event: Event, base: Tally, adapted: Tally) -> None:
    if isinstance(event, ChunkScored):
        adapted.add(event.adapted_nll, event.tokens)
        if event.base_nll is not None:
            base.add(event.base_nll, event.tokens)
