"""Passes over the chunks of several texts at once: scored, learned, written.

A chunk of every text is one pass, and so is the next token of every text. Windows are filled one by one,
since so many tokens leave no machine idle. The counterpart of `passes` and `decoder`.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from templora.adapter import Adapter
from templora.base import Base
from templora.cache_layers import PrefixLayer
from templora.cross_entropy import texts_nll
from templora.half import wanted
from templora.recipe import Recipe
from templora.rows import Rows
from templora.stacked import Stack
from templora.window import Plan, Span


@dataclass(frozen=True, slots=True)
class Row:
    """One text in a pass. span: its chunk, which ends where the text ends."""

    ids: Sequence[int]
    span: Span
    adapter: Adapter

    def tokens(self, first: int, tokens: int) -> list[int]:
        """So many of its token ids from that index on; where it is over, any."""
        found = list(self.ids[first : first + tokens])
        return found + [0] * (tokens - len(found))


class RowPasses:
    """Forward passes over rows of texts, in the order in which their adapters lie in `stack`."""

    def __init__(self, base: Base, stack: Stack, plan: Plan, recipe: Recipe, size: int) -> None:
        self.base, self.stack, self.plan = base, stack, plan
        stays = recipe.cache != "recompute"
        self._half = wanted(recipe.precision)
        self.adapted, self.bare = (Rows(size, plan, stays=stays, moved=base.rotary) for _ in range(2))

    def join(self, adapter: Adapter) -> None:
        """A text that has nothing cached yet takes the next row."""
        self.stack.join(adapter)
        self.adapted.join()
        self.bare.join()

    def leave(self, row: int) -> None:
        """A text goes; the last row moves to where it was."""
        self.stack.leave(row)
        self.adapted.leave(row)
        self.bare.leave(row)

    def forget_adapted(self, adapter: Adapter) -> None:
        """Drop the keys that were made with it, from the next chunk on."""
        self.adapted.places[self.stack.adapters.index(adapter)].chunk = None

    def nll(self, rows: Sequence[Row]) -> Tensor:
        """NLL of each chunk's tokens under its text's adapter, seeing the window, [texts, tokens] in nats.

        A chunk that is shorter than the longest has junk at its end. Gradients flow unless switched off.
        """
        self._enter(self.adapted, rows)
        tokens = max(row.span.tokens for row in rows)
        with self.stack.attached(tokens):
            return self._nll(self.adapted, rows, tokens)

    @torch.no_grad()
    def base_nll(self, rows: Sequence[Row]) -> Tensor:
        """The same under the bare base."""
        with self.base.turn:  # to the end: the head must be the base's, too
            self._enter(self.bare, rows)
            return self._nll(self.bare, rows, max(row.span.tokens for row in rows))

    def nll_of(self, row: Row, context: int) -> Tensor:
        """One text's chunk: NLL in nats, [tokens], seeing `context` tokens, under its attached adapter."""
        index = self.stack.adapters.index(row.adapter)
        prefix, place = self.adapted.prefix_of(index, context), self.adapted.places[index]
        start, stop = row.span.start, row.span.stop
        ids, labels = row.ids[start - 1 : stop - 1], row.ids[start:stop]
        return self.base.nll(ids, labels, start - 1 - place.origin, prefix, half=self._half)

    @torch.no_grad()
    def logits(self, rows: Sequence[Row], offset: int) -> Tensor:
        """Logits for the token at that offset of each text's chunk, [texts, vocab].

        Only what is not yet cached runs. The tokens before must be there.
        """
        self._enter(self.adapted, rows)
        cache = self.adapted
        tokens = cache.chunk + offset + 1 - cache.stop
        first = [row.span.start + offset - tokens for row in rows]
        ids = self._ids([row.tokens(at, tokens) for row, at in zip(rows, first, strict=True)])
        positions = cache.positions(cache.stop, tokens, self.base.device)
        mask = cache.mask(cache.stop, tokens, self.base.device)
        # As a text alone: the next token is fp32's, but of a large base whose layers are not merged.
        half = tokens > 1 or (self.base.halves.large and not rows[0].adapter.can_merge)
        with self.stack.attached(tokens), self._fast(ids.numel(), half=half):
            hidden = self.base.hidden(ids, positions, mask, cache.open())
            logits = self.base.head(hidden[:, -1:])[:, 0]
        cache.advance(tokens)
        return logits

    def _nll(self, cache: Rows, rows: Sequence[Row], tokens: int) -> Tensor:
        device, prefix = self.base.device, cache.prefix()
        ids = self._ids([row.tokens(row.span.start - 1, tokens + 1) for row in rows])  # [texts, tokens + 1]
        positions = cache.positions(cache.chunk, tokens, device)
        mask = cache.mask(cache.chunk, tokens, device)
        with self._fast(positions.numel()):
            hidden = self.base.hidden(ids[:, :-1], positions, mask, prefix)
            nll = texts_nll(hidden, self.base.head, ids[:, 1:])
        cache.keep(prefix)
        return nll

    def _fast(self, tokens: int, *, half: bool = True) -> AbstractContextManager[object]:
        return self.base.fast(tokens, half=half and self._half)

    def _enter(self, cache: Rows, rows: Sequence[Row]) -> None:
        """Make each text's window what it must be before its chunk."""
        for index in cache.enter([self.plan.span(row.span.chunk) for row in rows]):  # full-sized
            row, made = rows[index], Cache(layer_class_to_replicate=PrefixLayer)
            sinks = row.ids[: min(row.span.visible, self.plan.sinks)]
            ids = self._ids([[*sinks, *row.ids[row.span.visible : row.span.start - 1]]])
            positions = torch.arange(ids.shape[1], device=self.base.device).unsqueeze(0)
            under = nullcontext() if cache is self.bare else row.adapter.attached()
            with torch.no_grad(), under, self._fast(ids.numel()):
                self.base.hidden(ids, positions, None, made)
            cache.fill(index, made)

    def _ids(self, ids: Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(ids, device=self.base.device)
