"""Several texts in lockstep on one base: each is scored, learned and written as it would be alone.

A text in a batch is a session like any other, with its own adapter, optimiser, guard and random state. All
texts do the same step of their chunk at the same time, and what would be a pass for each is one for all.
A text joins at its beginning and leaves between two chunks. Batches live in memory, never on disk.
"""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from templora.base import Base
from templora.errors import InvalidRecipe, UnsupportedModel
from templora.events import ChunkScored, ChunkWritten, Event, Token
from templora.memory import fits_in_memory
from templora.passes import Passes
from templora.pen import Pen, Wishes
from templora.recipe import Recipe
from templora.recipe import load as load_recipe
from templora.row_passes import Row, RowPasses
from templora.session import Session
from templora.stacked import Stack
from templora.window import Span


class Text(Session):
    """A session in a batch. number: whose text it is, for whoever made the batch."""

    def __init__(self, base: Base, recipe: Recipe, seed: int, number: int) -> None:
        super().__init__(base, recipe, seed=seed)
        self.number = number
        self._pen: Pen | None = None
        self.passes: _Passes = _Passes(base, self.adapter, self.plan, self.recipe)
        self.study.passes, self.decoder = self.passes, self.passes.decoder

    @property
    def span(self) -> Span:
        """The chunk that comes next, as far as there is text."""
        return self.plan.span(self.chunk, len(self.ids))

    @property
    def is_full(self) -> bool:
        """Whether that chunk is complete."""
        return len(self.ids) >= self.plan.span(self.chunk).stop

    @property
    def full_chunks(self) -> int:
        """How many are complete and not learned yet."""
        return max(0, len(self.ids) - self.plan.span(self.chunk).start) // self.plan.chunk

    @property
    def row(self) -> Row:
        """What a pass needs to know of it."""
        return Row(self.ids, self.span, self.adapter)

    def announcements(self) -> list[Event]:
        """What there is to say before its first chunk."""
        return list(self._announcements())

    def begin(self, wishes: Wishes) -> None:
        """Get ready to write."""
        self._check_open()
        self._pen = Pen(self.base, wishes, self.ids, self.text, self._own_from())

    def draw(self, logits: torch.Tensor) -> Token | None:
        """Write one token, from [vocab]; None if it ends the text."""
        pen, span = self.pen, self.plan.span(self.chunk)
        token = self.sampler.draw(logits, pen.shown(span.visible), pen.processors, greedy=pen.greedy)
        if (piece := pen.take(token)) is None:
            return None
        self._append(token, piece)
        return Token(len(self.ids) - 1, token, piece)

    @property
    def pen(self) -> Pen:
        """How it is written."""
        assert self._pen is not None, "begin() comes first"
        return self._pen

    @property
    def written(self) -> int:
        """How many tokens of the chunk the model wrote itself."""
        return self._written

    def to_next_chunk(self) -> None:
        """The chunk is done."""
        self.chunk, self._written = self.chunk + 1, 0


class _Passes(Passes):
    """Passes of a text alone, for what a batch does one by one. together: the batch that it is in."""

    together: RowPasses | None = None

    def nll(self, ids: Sequence[int], span: Span, context: int) -> torch.Tensor:
        """As alone; in a batch the context is cached with the others'."""
        if self.together is None:
            return super().nll(ids, span, context)
        return self.together.nll_of(Row(ids, span, self.adapter), context)

    def forget_adapted(self) -> None:
        """As alone."""
        super().forget_adapted()
        if self.together is not None:
            self.together.forget_adapted(self.adapter)


class Batch:
    """Up to `size` texts at once on one base, by one recipe. texts: those that are in it now.

    Raises:
        InvalidRecipe, UnsupportedModel: this recipe or base must run its texts one at a time.
    """

    def __init__(
        self, base: Base, recipe: str | Path | Recipe = "default", *, size: int, **overrides: Any
    ) -> None:
        self.base, self.size = base, size
        self.recipe = load_recipe(recipe, overrides)
        _refuse(base, self.recipe, size)
        self.texts: list[Text] = []
        self._passes: RowPasses | None = None

    def text(self, ids: Sequence[int], text: str = "", *, seed: int = 0, number: int = 0) -> Text:
        """A text of these tokens with a fresh adapter, which may `join`."""
        made = Text(self.base, self.recipe, seed, number)
        made.extend(ids, text)
        return made

    def join(self, text: Text) -> None:
        """Take in a text that has not been learned from yet; there must be room."""
        assert len(self.texts) < self.size, "the batch is full"
        assert text.chunk == 0, "a text joins at its beginning"
        if self._passes is None:
            stack = Stack(text.adapter, self.size)
            self._passes = RowPasses(self.base, stack, text.plan, self.recipe, self.size)
        self._passes.join(text.adapter)
        text.passes.together = self._passes
        self.texts.append(text)

    def leave(self, text: Text) -> None:
        """Let a text go: from now on it is a session that runs alone."""
        assert self._passes is not None
        row = self.texts.index(text)
        self._passes.leave(row)
        text.passes.together = None
        # As in the rows: the last takes its place.
        self.texts[row] = self.texts[-1]
        self.texts.pop()

    def finish_chunks(self, *, score_base: bool) -> list[tuple[Text, Event]]:
        """Score every text's chunk, and learn those that are full; a shorter one is the end of its text."""
        started = time.perf_counter()
        with fits_in_memory(self.texts[0].plan):
            happened = self._finish(score_base, started)
        for text in self.texts:
            text.to_next_chunk()
        return [(text, event) for text, events in happened for event in events]

    def write_chunk(self) -> Iterator[tuple[Text, Event]]:
        """Write every text to the end of its chunk, or to its own end."""
        size = self.texts[0].plan.chunk
        starts = [text.plan.span(text.chunk).start for text in self.texts]
        # A text that is further than others has its own tokens run again, so that all end at the same step.
        offset = min(len(text.ids) - start for text, start in zip(self.texts, starts, strict=True))
        clock = time.perf_counter()
        for step in range(offset, size):
            writing = [(row, text) for row, text in enumerate(self.texts) if not text.pen.done]
            if not writing:
                return
            logits = self._logits(step)
            for row, text in writing:
                if len(text.ids) == starts[row] + step and (event := text.draw(logits[row])) is not None:
                    yield text, event
        seconds = time.perf_counter() - clock
        for text in self.texts:
            if text.is_full:
                span = text.span
                yield text, ChunkWritten(span.chunk, span.start, span.tokens, text.written, seconds)

    def _logits(self, step: int) -> torch.Tensor:
        """After the tokens before that step, [texts, vocab]."""
        assert self._passes is not None
        rows = [Row(text.ids, text.plan.span(text.chunk), text.adapter) for text in self.texts]
        with fits_in_memory(self.texts[0].plan):
            return self._passes.logits(rows, step)

    def _finish(self, score_base: bool, started: float) -> list[tuple[Text, list[Event]]]:
        passes, texts = self._passes, self.texts
        assert passes is not None
        rows = [text.row for text in texts]
        one_pass = texts[0].study.one_pass and any(text.is_full for text in texts)
        with torch.set_grad_enabled(one_pass):
            nll = passes.nll(rows)
        adapted = _sums(nll, rows)
        spent = (time.perf_counter() - started) / len(texts) if one_pass else 0.0
        base = self._base_sums(rows, score_base)
        happened: list[tuple[Text, list[Event]]] = []
        to_learn: list[int] = []
        for text, row, own, bare in zip(texts, rows, adapted, base, strict=True):
            span = row.span
            shown = bare if score_base else None
            events: list[Event] = [ChunkScored(span.chunk, span.start, span.tokens, own, shown)]
            if text.is_full:
                events, learns = text.study.judge(
                    text.ids, span, text.written, own, bare, score_base=score_base
                )
                to_learn += [len(happened)] * learns
            happened.append((text, events))
        if one_pass and to_learn:
            began = time.perf_counter()
            passes.stack.gradient.zero_()
            nll[to_learn].mean(dim=1).sum().backward()
            spent += (time.perf_counter() - began) / len(to_learn)
        for index in to_learn:
            text, events = happened[index]
            began = time.perf_counter() - spent
            span, score = rows[index].span, adapted[index]
            events.append(text.study.learn(text.ids, span, score, began, ready=one_pass))
        return happened

    def _base_sums(self, rows: Sequence[Row], score_base: bool) -> list[float | None]:
        """NLL of each chunk under the bare base in nats, where it is wanted."""
        assert self._passes is not None
        if score_base or self.texts[0].study.needs_base:
            return [*_sums(self._passes.base_nll(rows), rows)]
        return [None] * len(rows)


def _sums(nll: torch.Tensor, rows: Sequence[Row]) -> list[float]:
    """NLL of each chunk in nats, from [texts, tokens]."""
    return [float(own[: row.span.tokens].sum()) for own, row in zip(nll.detach(), rows, strict=True)]


def _refuse(base: Base, recipe: Recipe, size: int) -> None:
    """What cannot be done for several texts at once.

    Raises:
        InvalidRecipe, UnsupportedModel: with what to change.
    """
    if size < 1:
        raise InvalidRecipe(f"a batch of {size} holds no text; say 1 or more")
    settings = {
        "dropout": (recipe.dropout == 0, "0"),
        "context_from": (recipe.context_from == "cache", "cache"),
        "cache": (recipe.cache != "base", "reuse or recompute"),
    }
    for key, (works, cure) in settings.items():
        if not works:
            raise InvalidRecipe(
                f"{key} {getattr(recipe, key)} cannot run several texts at once; set {key}={cure}, or batch 1"
            )
    if not base.runs_rows:
        kind = type(base.model).__name__
        raise UnsupportedModel(f"{kind} cannot run several texts at once; use batch 1")
