"""The passes over one chunk: scored or learned under the adapter, and under the bare base.

What is visible is the plan's business, what is cached the decoder's; this joins them.
"""

from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from templora.adapter import Adapter
from templora.base import Base
from templora.decoder import Decoder
from templora.half import wanted
from templora.recipe import Recipe
from templora.window import Plan, Span


class Passes:
    """Forward passes over the chunks of one text."""

    def __init__(self, base: Base, adapter: Adapter, plan: Plan, recipe: Recipe) -> None:
        self.base, self.adapter, self.window, self.sinks = base, adapter, plan.window, plan.sinks
        self._half = wanted(recipe.precision)
        self.decoder = Decoder(base, adapter, plan, recipe.cache, half=self._half)
        # The base is measured as the adapter is: the same window, kept in the same way.
        self._bare = Decoder(base, None, plan, recipe.cache, half=self._half)
        self._recompute = recipe.context_from == "recompute"

    def nll(self, ids: Sequence[int], span: Span, context: int) -> Tensor:
        """NLL of the chunk's tokens, [tokens] in nats, seeing the sinks and `context` tokens before it.

        The adapter must be attached; gradients flow unless switched off. The context's keys come from the
        cache, or, as in the paper, the context runs along and gets gradients too.
        """
        return self._nll(self.decoder, ids, span, context)

    def seen(self, ids: Sequence[int], span: Span) -> list[int]:
        """The sinks, the window and the chunk."""
        return [*ids[: min(span.visible, self.sinks)], *ids[span.visible : span.stop]]

    @torch.no_grad()
    def again(self, ids: Sequence[int], tokens: int) -> float:
        """Summed NLL of the last `tokens` of `ids`, run from the first of these; nothing is cached."""
        with self.adapter.attached():
            return float(self.base.nll(ids[:-1], ids[-tokens:], half=self._half).sum())

    def state(self) -> dict[str, Any]:
        """What is cached, of both."""
        return {"adapted": self.decoder.state(), "bare": self._bare.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from what `state` returned."""
        self.decoder.load_state(state["adapted"])
        self._bare.load_state(state["bare"])

    def forget(self) -> None:
        """Drop what is cached, as after the text or the adapter was changed from outside."""
        self.decoder.forget()
        self._bare.forget()

    def forget_adapted(self) -> None:
        """Drop the keys that were made with the adapter, as when it goes back to an earlier version."""
        if not self.decoder.base_encodes:
            self.decoder.forget()

    @torch.no_grad()
    def adapted_nll(self, ids: Sequence[int], span: Span) -> Tensor:
        """NLL of the chunk's tokens, [tokens] in nats, under the adapter, seeing the window."""
        with self.adapter.attached():
            return self.nll(ids, span, self.window)

    @torch.no_grad()
    def base_nll(self, ids: Sequence[int], span: Span) -> Tensor:
        """NLL of the chunk's tokens, [tokens] in nats, under the bare base, seeing the window."""
        return self._nll(self._bare, ids, span, self.window)

    @torch.no_grad()
    def judged(
        self, ids: Sequence[int], span: Span, tokens: int, *, bare: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The chunk's last `tokens`, seeing the window.

        Returns:
            As `Base.judged`.
        """
        decoder = self._bare if bare else self.decoder
        with nullcontext() if bare else self.adapter.attached():
            run, position, prefix = self._inputs(decoder, ids, span, self.window)
            labels = ids[span.stop - tokens : span.stop]
            found = self.base.judged(run, labels, position, prefix, half=self._half)
            if prefix is not None:
                decoder.keep(prefix, span)
        return found

    @contextmanager
    def looking(self, ids: Sequence[int], span: Span, stop: int, *, bare: bool) -> Generator[None]:
        """What runs inside leaves no trace: whatever the text does next, it does it as if nothing had run.

        span: the chunk that `ids` end in, full-sized. stop: up to which token others may be looked at. bare:
            whether the bare base is asked.
        """
        inside = stop <= span.stop
        # Other chunks' windows will take this one's place; and the base may next be asked of a later chunk.
        decoders = ([] if inside else [self.decoder]) + ([self._bare] if bare else [])
        before = [decoder.state() for decoder in decoders]
        try:
            with ExitStack() as stack:
                for decoder in (self.decoder, self._bare)[: 1 + bare] if inside else ():
                    stack.enter_context(decoder.looking(ids, span))
                yield
        finally:
            for decoder, state in zip(decoders, before, strict=True):
                decoder.load_state(state)

    def _nll(self, decoder: Decoder, ids: Sequence[int], span: Span, context: int) -> Tensor:
        run, position, prefix = self._inputs(decoder, ids, span, context)
        nll = self.base.nll(run, ids[span.start : span.stop], position, prefix, half=self._half)
        if prefix is not None:
            decoder.keep(prefix, span)
        return nll

    def _inputs(
        self, decoder: Decoder, ids: Sequence[int], span: Span, context: int
    ) -> tuple[list[int], int, Cache | None]:
        """The tokens to run for the chunk's, the position of their first, and what they run on top of."""
        if self._recompute:
            first = max(0, span.start - context)
            return [*ids[: min(first, self.sinks)], *ids[first : span.stop - 1]], 0, None
        prefix, position = decoder.prefix(ids, span, context)
        return list(ids[span.start - 1 : span.stop - 1]), position, prefix
