"""The visible window as the model sees it: what is cached, what must be run, under which adapter.

Token ids in, logits and keys out; it knows nothing of text. Before each chunk the keys of the window are made
what the recipe wants: recomputed (every visible token runs again under the newest adapter), reused (old keys
stay, but of what is older than the window only the sinks are visible), or the base's own (the finished chunk
runs again under the bare base, so that no key is ever stale). Where positions run out, keys that stay move to
the front; with a base that does not allow that, the window runs again.
"""

from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache

from templora.adapter import Adapter
from templora.base import Base
from templora.cache import WindowCache
from templora.kernels import FEWEST
from templora.recipe import Keys
from templora.window import Plan, Span


class Decoder:
    """The window of one text.

    adapter None: the bare base. keys: of earlier chunks, as `Recipe.cache`. half: as for `Base.nll`.
    """

    def __init__(
        self, base: Base, adapter: Adapter | None, plan: Plan, keys: Keys, *, half: bool = False
    ) -> None:
        self.base, self.adapter, self.plan, self.half = base, adapter, plan, half
        self.stays = keys != "recompute"
        self.base_encodes = keys == "base" and adapter is not None
        self.cache = WindowCache(plan.room if self.stays else plan.needed, plan.sinks)
        self.chunk: int | None = None  # whose window is cached
        self._before = 0  # what was cached before the last `logits`

    def state(self) -> dict[str, Any]:
        """What a resumed text needs to continue bit for bit."""
        return {"chunk": self.chunk, "cache": self.cache.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from what `state` returned."""
        self.chunk = state["chunk"]
        self.cache.load_state(state["cache"], self.base.device)

    def forget(self) -> None:
        """Drop what is cached, as after the text or the adapter was changed from outside."""
        self.chunk = None

    def logits(self, ids: Sequence[int], span: Span) -> Tensor:
        """Logits for the token after `ids`, inside the chunk of `span`, [vocab].

        Exactly the sinks and the tokens from `span.visible` on are seen. Only what is not yet cached runs.
        """
        self._enter(ids, span)
        self.cache.crop(len(ids) - 1)  # the last token must run for its logits
        self._before = self.cache.stop
        return self._run(ids, len(ids), self.adapter)

    @contextmanager
    def taking_back(self) -> Generator[None]:
        """If what runs inside fails, the last `logits` were not: asked again, the same pass runs again."""
        try:
            yield
        except BaseException:
            self.cache.crop(self._before)
            raise

    @contextmanager
    def looking(self, ids: Sequence[int], span: Span) -> Generator[None]:
        """What is cached inside, which is the chunk of `span`, full-sized, and none other, is forgotten."""
        self._enter(ids, span)  # as whatever comes next would
        before = self.cache.stop
        try:
            yield
        finally:
            self.cache.crop(before)

    def prefix(self, ids: Sequence[int], span: Span, context: int) -> tuple[Cache, int]:
        """The sinks and the `context` tokens before the chunk as a frozen cache, and the next position.

        The chunk's pass begins with the last token before it, whose output predicts its first; so the
        prefix ends one token earlier.
        """
        self._enter(ids, span)
        stop = span.start - 1
        if self.cache.stop < stop:
            self._run(ids, stop, self.adapter, once=self.cache.stop < stop - 1)
        first = max(self.cache.first, span.start - context)
        return self.cache.prefix(min(first, stop), stop), stop - self.cache.origin

    def keep(self, prefix: Cache, span: Span) -> None:
        """Cache the keys that a pass over `prefix` made for the chunk, if they will be reused."""
        if self.stays and not self.base_encodes and self.cache.stop == span.start - 1:
            self.cache.extend(prefix)

    def _enter(self, ids: Sequence[int], span: Span) -> None:
        if self.chunk == span.chunk:
            return
        fits = span.stop - self.cache.origin <= self.cache.capacity
        if self.base_encodes and self.chunk is not None:
            self._encode(ids, self.plan.span(self.chunk), span.start - 1)
        continues = self.cache.first <= span.visible < self.cache.stop
        moved = self.base.rotary
        if self.stays and self.chunk is not None and continues and (fits or moved):
            self.cache.forget_before(span.visible)
            if moved and not fits:
                self.chunk = None  # should this fail half-way, the window is made anew
                self.cache.move_to_front(span.visible, moved)
        else:
            self.cache.restart(span.visible)
        if self.base_encodes:
            self._run_base(ids, span.start - 1)
        self.chunk = span.chunk

    def _encode(self, ids: Sequence[int], over: Span, stop: int) -> None:
        """What the adapter's own chunk left behind goes; its keys are the base's, and see what it saw."""
        self.cache.crop(over.start - 1)
        if self.cache.stop == over.start - 1 and stop - self.cache.origin <= self.cache.capacity:
            self._run_base(ids, stop)

    def _run_base(self, ids: Sequence[int], stop: int) -> None:
        assert self.adapter is not None
        if self.cache.stop < stop:
            with self.adapter.detached():
                self._run(ids, stop, None)

    def _run(self, ids: Sequence[int], stop: int, adapter: Adapter | None, *, once: bool = False) -> Tensor:
        cache = self.cache
        missing = [token for part in cache.missing(stop) for token in ids[part]]
        under: AbstractContextManager[object] = nullcontext()
        half = self.half
        if adapter is not None:
            # A merged weight has no copy in bf16; and base and adapter are to be rounded alike.
            many = len(missing) >= FEWEST
            half = half and (many or not adapter.can_merge)
            beside = half and many and len(self.base.halves) > 0
            under = adapter.attached() if beside else adapter.decoding(once=once)
        with cache.all_or_nothing(), under:
            return self.base.last_logits(missing, cache.stop - cache.origin, cache, half=half)
