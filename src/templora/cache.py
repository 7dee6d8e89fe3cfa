"""Keys and values of the visible tokens, in buffers that are allocated once.

In a `WindowCache` the place in the buffer is the position id, so positions never pass the capacity; what is
kept moves only when they run out. The one exception are attention sinks (arXiv 2309.17453), the first tokens
of a text, which models lean on whatever they say: their keys keep the positions that they were made at, and
go along in the places just before the window, so that what is visible is one piece of memory. It speaks
transformers' `Cache` protocol, so any model that uses that protocol works unchanged. It does not know who
made the keys.
"""

import inspect
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from functools import cache as once
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from templora.cache_layers import PrefixLayer, WindowLayer

# Every block's keys, [1, heads, tokens, head_dim] each, as they would be so many positions later.
Moved = Callable[[Sequence[Tensor], int], list[Tensor]]


def on_top_of(model: nn.Module, cache: Cache | None) -> dict[str, Any]:
    """What to call a model with so that it runs on top of that cache; None: of nothing."""
    return {_named(type(model)): cache, "use_cache": cache is not None}


@once
def _named(kind: type[nn.Module]) -> str:
    """What its `forward` calls a cache: transformers gave that another name in 5.24."""
    for each in kind.__mro__:
        if "forward" in vars(each):
            names = inspect.signature(vars(each)["forward"]).parameters
            if found := next((name for name in ("past_key_values", "cache") if name in names), None):
                return found
    return "past_key_values"


class WindowCache(Cache):
    """The visible window of one text.

    sinks: tokens at the beginning of the text that are always visible. origin: index in the text of the token
    at position 0, or what it would be if the text had begun `sinks` tokens before the window.
    """

    def __init__(self, capacity: int, sinks: int = 0) -> None:
        super().__init__(layer_class_to_replicate=partial(WindowLayer, capacity))  # pyright: ignore[reportArgumentType]
        self.capacity, self.sinks = capacity, sinks
        self.origin = 0

    @property
    def _windows(self) -> list[WindowLayer]:
        return self.layers  # pyright: ignore[reportReturnType]

    @property
    def first(self) -> int:
        """Index in the text of the oldest visible token, sinks that are not its neighbours aside."""
        place = self._windows[0].first if self.layers else 0
        return self.origin + place + (self.sinks if self.origin + place else 0)

    @property
    def stop(self) -> int:
        """Index in the text after the newest cached token."""
        return self.origin + (self._windows[0].stop if self.layers else 0)

    def restart(self, token: int) -> None:
        """Forget everything; the sinks come next, and then the token of that index of the text."""
        self.origin = max(0, token - self.sinks)
        for layer in self._windows:
            layer.first = layer.stop = 0

    def missing(self, stop: int) -> list[slice]:
        """Where in the text the tokens are that must run for all before `stop` to be cached."""
        if self.stop > self.origin or self.origin == 0:
            return [slice(self.stop, stop)]
        return [slice(0, self.sinks), slice(self.origin + self.sinks, stop)]

    def forget_before(self, token: int) -> None:
        """Hide all tokens older than that index of the text, but for the sinks."""
        for layer in self._windows:
            place = min(token - self.origin, layer.stop)
            layer.carry(self.sinks, place - self.sinks)

    def move_to_front(self, token: int, moved: Moved) -> None:
        """Hide all tokens older than that index of the text, and let it be the first one after the sinks.

        If this fails half-way, what is cached is of no use any more. moved: see `rotary`.
        """
        self.forget_before(token)
        kept, origin = [layer.state() for layer in self._windows], token - self.sinks
        keys = moved([state["keys"][:, :, self.sinks :] for state in kept], self.origin - origin)
        for layer, state, own in zip(self._windows, kept, keys, strict=True):
            layer.first = layer.stop = 0
            layer.update(torch.cat((state["keys"][:, :, : self.sinks], own), dim=2), state["values"])
        self.origin = origin

    def crop(self, token: int) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Forget all tokens from that index of the text on."""
        for layer in self._windows:
            layer.stop = max(layer.first, min(layer.stop, token - self.origin))

    def state(self) -> dict[str, Any]:
        """Everything in it, copied: plain values and tensors."""
        return {"origin": self.origin, "layers": [layer.state() for layer in self._windows]}

    def load_state(self, state: dict[str, Any], device: torch.device) -> None:
        """Continue, on that device, from what `state` returned."""
        self.origin = state["origin"]
        before, self.layers[:] = self._windows[:], []
        for index, stored in enumerate(state["layers"]):
            layer = WindowLayer(self.capacity)
            if stored["stop"]:
                keys, values = stored["keys"].to(device), stored["values"].to(device)
                if index < len(before) and before[index].fits(keys):
                    layer = before[index]  # something may hold on to its buffers
                layer.first = layer.stop = stored["first"]
                layer.update(keys, values)
            self.layers.append(layer)

    def prefix(self, first: int, stop: int) -> Cache:
        """The sinks and the tokens [first, stop) of the text as a frozen, differentiable prefix."""
        assert self.first <= first <= stop <= self.stop, (self.first, first, stop, self.stop)
        if stop == self.origin:  # nothing is cached, perhaps not even made
            return Cache(layer_class_to_replicate=PrefixLayer)
        rows = slice(first - self.origin, stop - self.origin)
        layers = ((layer.keys, layer.values, layer.first) for layer in self._windows)
        return frozen(layers, self.sinks, rows, ends=stop == self.stop)

    def extend(self, prefix: Cache) -> None:
        """Append the new keys that a pass over `prefix` made."""
        with self.all_or_nothing():
            for index, source in enumerate(prefix.layers):
                assert isinstance(source, PrefixLayer) and source.new
                if source.room is None:
                    self.update(*source.new, index)
                else:  # they are there
                    self._windows[index].stop += source.new[0].shape[2]

    @contextmanager
    def all_or_nothing(self) -> Generator[None]:
        """What runs inside is cached in all layers or, if it fails half-way, in none."""
        stop = self.stop
        try:
            yield
        except BaseException:
            self.crop(stop)
            raise


def frozen(
    layers: Iterable[tuple[Tensor | None, Tensor | None, int]],
    sinks: int,
    places: slice,
    *,
    ends: bool = False,
) -> Cache:
    """Those places and the sinks before them, as a frozen prefix.

    Args:
        layers: each block's keys and values, [texts, heads, places, head_dim], and the place where what is
            visible begins, which is where the sinks are.
        ends: nothing comes after those places: one pass may put its own keys there.
    """
    made = [_prefix_layer(keys, values, first, sinks, places, ends=ends) for keys, values, first in layers]
    return Cache(layers=[*made]) if made and made[0].length else Cache(layer_class_to_replicate=PrefixLayer)


def _prefix_layer(
    keys: Tensor | None, values: Tensor | None, first: int, sinks: int, places: slice, *, ends: bool
) -> PrefixLayer:
    assert keys is not None and values is not None
    both = slice(max(first, places.start - sinks), places.stop)
    if not sinks or both.start == first:  # they are neighbours
        room = (keys[:, :, both.start :], values[:, :, both.start :]) if ends else None
        return PrefixLayer(keys[:, :, both], values[:, :, both], room)
    begin = slice(first, first + sinks)
    keys, values = (torch.cat((state[:, :, begin], state[:, :, places]), dim=2) for state in (keys, values))
    return PrefixLayer(keys, values)
