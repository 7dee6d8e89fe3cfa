"""One full chunk from score to update, under the guard's eyes.

Order matters: a chunk is scored before anything is learned from it, judged before it is learned, and the
update is tried on what was learned before it is kept. It knows chunks, not how a text came about.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from templora.adapter import Adapter
from templora.errors import InvalidRecipe
from templora.events import ChunkLearned, ChunkScored, ChunkSkipped, Event, RolledBack, Warned
from templora.guard import LOOK_BACK, Guard
from templora.learner import Learner, NotFinite
from templora.passes import Passes
from templora.recipe import Recipe
from templora.window import Span

# Nats per token by which an update may leave its own or the last chunk worse than before it was learned.
SLACK = 0.02
GLANCE = 128  # tokens before the last chunk that an update is tried with: cheaper than a window


@dataclass(frozen=True, slots=True)
class _Good:
    """The version to go back to."""

    weights: Tensor
    version: int


@dataclass(frozen=True, slots=True)
class _Seen:
    """A chunk, the last `tokens` of `ids`, after a few tokens; nll: their sum before it was learned."""

    ids: Sequence[int]
    tokens: int
    nll: float


class Study:
    """Scores and learns the chunks of one text, one after another.

    nll, base_nll: of each token of the chunk that was scored last, [tokens] in nats; None where it was not.
    """

    def __init__(self, passes: Passes, learner: Learner, recipe: Recipe) -> None:
        self.passes, self.learner, self.recipe = passes, learner, recipe
        self.adapter: Adapter = learner.adapter
        self.guard = Guard()
        self._good = _Good(self.adapter.snapshot(), self.adapter.version)
        self.nll: Tensor | None = None
        self.base_nll: Tensor | None = None
        self._last: _Seen | None = None  # the chunk learned last, if the next update is one to be checked

    def finish(
        self, ids: Sequence[int], span: Span, written: int, *, score_base: bool = False
    ) -> list[Event]:
        """Score the chunk, then learn it if the guard agrees.

        Args:
            ids: the text; the chunk of `span` is complete. written: tokens of it that are the model's own.
            score_base: whether the event must carry the base's score.
        """
        one_pass = self.one_pass
        started = time.perf_counter()
        with self.adapter.attached(), torch.set_grad_enabled(one_pass):
            first = self.passes.nll(ids, span, self.passes.window)
        self.nll, self.base_nll = first.detach(), None
        # Where that pass is also the first of learning, its time counts as learning.
        spent = time.perf_counter() - started if one_pass else 0.0
        if score_base or self.needs_base:
            self.base_nll = self.passes.base_nll(ids, span)
        adapted, base = _sum(self.nll), None if self.base_nll is None else _sum(self.base_nll)
        before = self.guard.state()
        try:
            events, learns = self.judge(ids, span, written, adapted, base, score_base=score_base)
            if learns:
                started = time.perf_counter() - spent
                events.append(self.learn(ids, span, adapted, started, first if one_pass else None))
        except BaseException:
            # Whoever tries again judges this chunk again, and must not find it in the guard's memory.
            self.guard.load_state(before)
            raise
        return events

    def score(self, ids: Sequence[int], span: Span, *, score_base: bool) -> ChunkScored:
        """Score a chunk that is not to be learned."""
        self.nll = self.passes.adapted_nll(ids, span)
        self.base_nll = self.passes.base_nll(ids, span) if score_base else None
        base = None if self.base_nll is None else _sum(self.base_nll)
        return ChunkScored(span.chunk, span.start, span.tokens, _sum(self.nll), base)

    @property
    def one_pass(self) -> bool:
        """Whether the pass that scores a chunk is the first that it is learned by."""
        learns = self.recipe.learning_rate > 0 and self.learner.one_pass
        return learns and self.recipe.context_equals_window

    @property
    def needs_base(self) -> bool:
        """Whether the guard judges chunks by what the bare base makes of them, asked for or not.

        At each chunk: so a text is learned alike whether its base's score is shown or not, and the base finds
        its keys in its own cache.
        """
        return self.recipe.guard and self.recipe.learning_rate > 0

    def judge(
        self,
        ids: Sequence[int],
        span: Span,
        written: int,
        adapted: float,
        base: float | None,
        *,
        score_base: bool,
    ) -> tuple[list[Event], bool]:
        """What there is to say of a chunk that was scored, and whether it should be learned.

        The adapter may be scaled or put back on the way, as the guard says.

        score_base: say the base's score as well.
        """
        place = (span.chunk, span.start, span.tokens)
        events: list[Event] = [ChunkScored(*place, adapted, base if score_base else None)]
        if self.recipe.learning_rate == 0:
            return events, False
        if self.recipe.guard:
            if (back := self._go_back(ids, span, adapted, base)) is not None:
                return [*events, back], False
            per_token = (adapted / span.tokens, None if base is None else base / span.tokens)
            recent = ids[max(0, span.stop - max(span.tokens, LOOK_BACK)) : span.stop]
            verdict = self.guard.judge(recent, span.tokens, *per_token, written)
            if verdict.keep < 1:
                self.adapter.shrink(verdict.keep)
            if verdict.reason is not None:
                return [*events, ChunkSkipped(*place, verdict.reason)], False
        return events, True

    def learn(
        self,
        ids: Sequence[int],
        span: Span,
        score: float,
        started: float,
        first: Tensor | None = None,
        *,
        ready: bool = False,
    ) -> Event:
        """Learn a chunk that was judged.

        Args:
            score: its NLL before that, in nats. started: when its passes began, in seconds of the clock.
            first, ready: as for `Learner.learn`.
        """
        rate = self.learner.rate_at(span.chunk) * self.guard.rate
        checked = self.recipe.guard and self.guard.checks(self.adapter.version)
        seen = self._glance(ids, span)
        try:
            update = self.learner.learn(
                rate,
                lambda: self.passes.nll(ids, span, self.recipe.context),
                first,
                (lambda: self._helps(ids, span, score)) if checked else None,
                ready=ready,
            )
        except NotFinite as error:
            message = f"chunk {span.chunk} was not learned: {error}; the update was dropped, the text goes on"
            return Warned("not_finite", message)
        if update.share < 1:
            self.guard.rate *= max(update.share, 0.25)
        self._last = seen
        seconds = time.perf_counter() - started
        numbers = (update.version, update.learning_rate, update.gradient_norm, update.share, seconds)
        return ChunkLearned(span.chunk, span.start, span.tokens, *numbers)

    def state(self) -> dict[str, Any]:
        """Adapter, optimiser, guard and caches: plain values and tensors, copied."""
        good, last = self._good, self._last
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "weights": self.adapter.snapshot(),
            "version": self.adapter.version,
            "learner": self.learner.state(),
            "guard": self.guard.state(),
            "passes": self.passes.state(),
            "good": (good.weights, good.version),
            "last": None if last is None else (list(last.ids), last.tokens, last.nll),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from what `state` returned.

        Raises:
            InvalidRecipe: it was learned by another recipe.
        """
        own = self.recipe.model_dump(mode="json")
        others = [key for key, value in state.get("recipe", own).items() if value != own.get(key, value)]
        if others:
            raise InvalidRecipe(f"that state was learned with another {', '.join(others)}; use its recipe")
        self.adapter.restore(state["weights"], state["version"])
        self.learner.load_state(state["learner"])
        self.guard.load_state(state["guard"])
        self.passes.load_state(state["passes"])
        self._good = _Good(*state["good"])
        self._last = None if state["last"] is None else _Seen(*state["last"])

    def _glance(self, ids: Sequence[int], span: Span) -> _Seen | None:
        """What the next update will be tried on, if it will be."""
        if not (self.recipe.guard and self.guard.checks(self.adapter.version + 1)):
            return None
        few = ids[max(span.visible, span.start - GLANCE) : span.stop]
        return _Seen(few, span.tokens, self.passes.again(few, span.tokens))

    def _helps(self, ids: Sequence[int], span: Span, score: float) -> bool:
        """Whether the updated adapter does no worse on this chunk, and on the one before, than unlearned."""
        if not _sum(self.passes.adapted_nll(ids, span)) <= score + SLACK * span.tokens:
            return False
        last = self._last
        return last is None or self.passes.again(last.ids, last.tokens) <= last.nll + SLACK * last.tokens

    def _restore_good(self, ids: Sequence[int], span: Span) -> float:
        """Go back to the last good version; the chunk's NLL under it."""
        weights, version = self.adapter.snapshot(), self.adapter.version
        self.adapter.restore(self._good.weights, self._good.version)
        try:
            return self.passes.again(self.passes.seen(ids, span), span.tokens)
        except BaseException:
            self.adapter.restore(weights, version)
            raise

    def _go_back(
        self, ids: Sequence[int], span: Span, adapted: float, base: float | None
    ) -> RolledBack | None:
        """Restore the last good version if the adapter does harm; remember this one if it does well.

        Where even that one is of no use, the text has become another one: back to the base.
        """
        # What a learned start costs at first is no harm yet, but where nothing is learned it would go on.
        if base is None or (self.adapter.version == 0 and span.chunk == 0):
            return None
        if self.guard.must_go_back(adapted, base):
            good = self._restore_good(ids, span)
            self.passes.forget_adapted()  # above all the sinks, which would stay
            self.learner.restart()
            if self.guard.must_give_up(good, base, span.tokens):
                self.adapter.shrink(0.0)
                self._good = _Good(self.adapter.snapshot(), self.adapter.version)
            self._last = None
            return RolledBack(span.chunk, self.adapter.version, self.guard.rate)
        if self.guard.is_good and self.adapter.version != self._good.version:
            self.guard.went_back = False
            self._good = _Good(self.adapter.snapshot(), self.adapter.version)
        return None


def _sum(nll: Tensor) -> float:
    return float(nll.sum())
