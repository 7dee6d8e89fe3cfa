"""The visible windows of several texts, in one cache: a row each, right-aligned.

All rows end at the same column, because all texts do the same step of their chunk at the same time; how far
back a row is visible, and which position a column stands for, is its own. Which keys stay from chunk to chunk
is decided for each row as `decoder` decides it for a text alone. It knows nothing of what the tokens are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from templora.cache import Moved, frozen
from templora.cache_layers import PrefixLayer, WindowLayer
from templora.window import Plan, Span


@dataclass(slots=True)
class Place:
    """What is cached of one text, as token indices: [first, stop) is; `origin` is at position 0.

    Where they are not 0, the sinks stand in the places of the first tokens, as in a `WindowCache`.
    """

    origin: int = 0
    first: int = 0
    stop: int = 0
    chunk: int | None = None


class RowsLayer(WindowLayer):
    """One block's keys and values, [size, heads, capacity, head_dim]; columns [first, stop) are in use."""

    def __init__(self, size: int, capacity: int) -> None:
        super().__init__(capacity)
        self.size = size

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        # Zeros: what is masked still takes part in products, where a NaN would spread.
        self.keys, self.values = (
            state.new_zeros((self.size, state.shape[1], self.capacity, state.shape[3]))
            for state in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append [texts, heads, tokens, head_dim] to the first rows; return all that is in use of them."""
        texts, start = key_states.shape[0], self.stop
        self.put(slice(texts), start, key_states, value_states)
        self.stop = start + key_states.shape[2]
        return self.part(slice(texts), self.first, self.stop)

    def put(self, rows: slice, start: int, keys: Tensor, values: Tensor) -> None:
        """Write [rows, heads, tokens, head_dim] into the columns from `start` on."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        assert self.keys is not None and self.values is not None
        stop = start + keys.shape[2]
        assert stop <= self.capacity, "a window outgrew its cache"
        self.keys[rows, :, start:stop] = keys
        self.values[rows, :, start:stop] = values

    def part(self, rows: slice, first: int, stop: int) -> tuple[Tensor, Tensor]:
        """A view of some rows and columns."""
        assert self.keys is not None and self.values is not None
        return self.keys[rows, :, first:stop], self.values[rows, :, first:stop]


class Rows(Cache):
    """Room for `size` texts; they are in rows 0 to `len(places)`, without a hole.

    stop: the column after the newest token of every row. chunk: the column of the token before the chunk,
    whose output predicts the chunk's first.
    """

    def __init__(self, size: int, plan: Plan, *, stays: bool, moved: Moved | None = None) -> None:
        self.size, self.plan, self.stays, self._moved = size, plan, stays, moved
        self.capacity = 2 * plan.needed  # columns
        self._positions = plan.room if stays else plan.needed
        self._most = plan.sinks + plan.window  # columns that a row sees before its chunk
        super().__init__(layer_class_to_replicate=self._new_layer)  # pyright: ignore[reportArgumentType]
        self.places: list[Place] = []
        # There is always room for a window before it.
        self.stop = self.chunk = self._most

    def join(self) -> None:
        """A text that has nothing cached yet takes the next row."""
        for layer in self._row_layers():
            for state in layer.part(slice(len(self.places), len(self.places) + 1), 0, self.capacity):
                state.zero_()
        self.places.append(Place())

    def leave(self, row: int) -> None:
        """A text goes; the last row moves to where it was."""
        last = self.places.pop()
        if row == len(self.places):
            return
        self.places[row] = last
        for layer in self._row_layers():
            for kept in layer.part(slice(self.size), 0, self.capacity):
                kept[row] = kept[len(self.places)]

    def enter(self, spans: Sequence[Span]) -> list[int]:
        """Open each text's chunk. Returns the rows whose window must be filled anew."""
        if all(place.chunk == span.chunk for place, span in zip(self.places, spans, strict=True)):
            return []
        anew = [row for row, span in enumerate(spans) if self._begins_anew(row, span)]
        if self.stop + self.plan.chunk > self.capacity:  # not before: the sinks must go along
            self._move_to_front()
        self.chunk = self.stop
        return anew

    def fill(self, row: int, window: Cache) -> None:
        """The window of one row, as a pass over it from its first token to just before the chunk made it."""
        for index, made in enumerate(window.layers):
            assert isinstance(made, PrefixLayer) and made.new
            keys, values = made.new
            if index == len(self.layers):
                self.layers.append(self._new_layer())
            layer = self._row_layers()[index]
            layer.put(slice(row, row + 1), self.chunk - keys.shape[2], keys, values)

    def prefix(self) -> Cache:
        """The sinks and the window before the chunk, of every row, as a frozen, differentiable prefix."""
        first = self._first()
        return self._prefix(slice(len(self.places)), first, first)

    def prefix_of(self, row: int, context: int) -> Cache:
        """The same of one row, with so many tokens before the chunk in place of the window."""
        first = self._column(row)
        return self._prefix(slice(row, row + 1), first, max(first, self.chunk + 1 - context))

    def keep(self, prefix: Cache) -> None:
        """Take over the keys that a pass over `prefix` made for the chunk, if they will be reused."""
        if not self.stays or self.stop > self.chunk:
            return
        self._open(self.chunk)
        tokens = 0
        for index, made in enumerate(prefix.layers):
            assert isinstance(made, PrefixLayer) and made.new
            tokens = made.new[0].shape[2]
            self.update(*made.new, index)
        self.advance(tokens)

    def open(self) -> "Rows":
        """Itself, ready for a pass that appends the next tokens of every row."""
        self._open(self._first())
        return self

    def advance(self, tokens: int) -> None:
        """Note that a pass has appended so many tokens to every row."""
        self.stop += tokens
        for place in self.places:
            place.stop += tokens

    def positions(self, column: int, tokens: int, device: torch.device) -> Tensor:
        """Of the tokens from that column on, [texts, tokens]."""
        starts = [place.stop - place.origin - (self.stop - column) for place in self.places]
        return torch.tensor(starts, device=device).unsqueeze(1) + torch.arange(tokens, device=device)

    def mask(self, column: int, tokens: int, device: torch.device) -> Tensor | None:
        """What each row sees of what is in use before that column and of `tokens` from it on.

        Returns:
            bool, [texts, cached + tokens]; None if all of them see all.
        """
        columns, first = [self._column(row) for row in range(len(self.places))], self._first()
        if all(own <= first for own in columns):
            return None
        seen = torch.arange(first, column + tokens, device=device)
        return seen.unsqueeze(0) >= torch.tensor(columns, device=device).unsqueeze(1)

    def _begins_anew(self, row: int, span: Span) -> bool:
        """As `Decoder` decides it; whether the row's window must be run again."""
        place = self.places[row]
        if place.chunk == span.chunk:
            return False
        fits = span.stop - place.origin <= self._positions
        first = max(0, span.visible - self.plan.sinks)
        continues = place.first <= first and place.stop > span.visible
        known, place.chunk = place.chunk is not None, None  # should this fail half-way, it is made anew
        if self.stays and known and continues and (fits or self._moved):
            self._carry_sinks(row, first)
            if self._moved and not fits:
                self._to_front(row, self._moved)
            place.chunk = span.chunk
            return False
        place.origin = place.first = first
        place.stop, place.chunk = span.start - 1, span.chunk
        return place.stop > place.first

    def _carry_sinks(self, row: int, first: int) -> None:
        """Let what is visible of a row begin at that token, in whose place the first sink is from now on."""
        place, sinks = self.places[row], self.plan.sinks
        old = self._column(row)
        new = old + first - place.first
        if sinks and new > old:
            for layer in self._row_layers():
                for state in layer.part(slice(row, row + 1), 0, self.capacity):
                    state[:, :, new : new + sinks] = state[:, :, old : old + sinks].clone()
        place.first = first

    def _to_front(self, row: int, moved: Moved) -> None:
        """Let the oldest visible token of a row be the one at position 0; its column stays what it is."""
        place = self.places[row]
        rows, first = slice(row, row + 1), self._column(row) + self.plan.sinks  # those stay where they were
        keys = [layer.part(rows, first, self.stop)[0] for layer in self._row_layers()]
        for own, other in zip(keys, moved(keys, place.origin - place.first), strict=True):
            own.copy_(other)
        place.origin = place.first

    def _column(self, row: int) -> int:
        """Of the oldest visible token."""
        place = self.places[row]
        return self.stop - (place.stop - place.first)

    def _first(self) -> int:
        """The oldest column in use."""
        return min(self._column(row) for row in range(len(self.places)))

    def _new_layer(self) -> RowsLayer:
        layer = RowsLayer(self.size, self.capacity)
        layer.first = layer.stop = self.stop
        return layer

    def _prefix(self, rows: slice, first: int, start: int) -> Cache:
        parts = ((*layer.part(rows, 0, self.capacity), first) for layer in self._row_layers())
        return frozen(parts, self.plan.sinks, slice(start, self.chunk))

    def _open(self, first: int) -> None:
        for layer in self._row_layers():
            layer.first, layer.stop = first, self.stop

    def _move_to_front(self) -> None:
        most = self._most
        for layer in self._row_layers():
            for state in layer.part(slice(self.size), 0, self.capacity):
                state[:, :, :most] = state[:, :, self.stop - most : self.stop].clone()
        self.stop = most

    def _row_layers(self) -> list[RowsLayer]:
        return self.layers  # pyright: ignore[reportReturnType]
