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
from transformers.cache_utils import Cache, CacheLayerMixin

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


class _Layer(CacheLayerMixin):
    """What both kinds of layer answer to transformers' mask code."""

    is_sliding = False  # all tokens are kept; a sliding window is applied by the mask alone
    length: int

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        return -1


class WindowLayer(_Layer):
    """One block's keys and values, shape [1, heads, capacity, head_dim]; [first, stop) is visible."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity, self.first, self.stop = capacity, 0, 0

    @property
    def length(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.stop - self.first

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = (
            state.new_empty((*state.shape[:2], self.capacity, state.shape[3]))
            for state in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append [1, heads, tokens, head_dim]; return all that is visible."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        stop = self.stop + key_states.shape[2]
        assert stop <= self.capacity, "the plan let a window outgrow its cache"
        self.keys[:, :, self.stop : stop] = key_states
        self.values[:, :, self.stop : stop] = value_states
        self.stop = stop
        return self.keys[:, :, self.first : stop], self.values[:, :, self.first : stop]

    def grow(self) -> None:
        """Make room for one token: its own place, the last that is visible, is empty."""
        assert self.stop < self.capacity, "the plan let a window outgrow its cache"
        self.stop += 1

    def clean(self, number: float = 0.0) -> None:
        """Put that number wherever nothing is visible: what is there may be none."""
        for state in (self.keys, self.values):
            if state is not None:
                state[:, :, : self.first] = number
                state[:, :, self.stop :] = number

    def carry(self, tokens: int, first: int) -> None:
        """Let what is visible begin at that place, with its first so many tokens, moved there from before."""
        if self.keys is not None and self.values is not None and first > self.first:
            for state in (self.keys, self.values):
                state[:, :, first : first + tokens] = state[:, :, self.first : self.first + tokens].clone()
            self.first = first

    def state(self) -> dict[str, Any]:
        """Its visible keys and values, copied, [1, heads, stop - first, head_dim]."""
        kept: dict[str, Any] = {"first": self.first, "stop": self.stop}
        if self.keys is not None and self.values is not None:
            kept |= {
                "keys": self.keys[:, :, self.first : self.stop].clone(),
                "values": self.values[:, :, self.first : self.stop].clone(),
            }
        return kept


class FixedLayer(_Layer):
    """A piece of a `WindowLayer`'s buffers, for a pass over one token whose shapes never change.

    The token's key and value go to `place`, a number on the device, [1], counted from the piece's beginning.
    A mask must say what is visible.
    """

    def __init__(self, layer: WindowLayer, piece: slice, place: Tensor) -> None:
        super().__init__()
        assert layer.keys is not None and layer.values is not None
        self.keys, self.values = layer.keys[:, :, piece], layer.values[:, :, piece]
        self.length, self.is_initialized, self._place = self.keys.shape[2], True, place

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise AssertionError("its buffers are another layer's")

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Put [1, heads, 1, head_dim] to its place; return the whole piece."""
        assert self.keys is not None and self.values is not None
        self.keys.index_copy_(2, self._place, key_states)
        self.values.index_copy_(2, self._place, value_states)
        return self.keys, self.values


class PrefixLayer(_Layer):
    """Frozen earlier keys and values, to which one pass joins its own.

    Unlike a `WindowLayer` it can be differentiated through: new keys are joined, never written.
    Without keys it stands for the beginning of a text.
    """

    def __init__(self, keys: Tensor | None = None, values: Tensor | None = None) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.length = 0 if keys is None else keys.shape[2]
        self.is_initialized = True
        self.new: tuple[Tensor, Tensor] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise AssertionError("a prefix is complete when it is made")

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Join [1, heads, tokens, head_dim] to the prefix; keep the new part, detached, in `new`."""
        self.new = key_states.detach(), value_states.detach()
        if self.keys is None or self.values is None:
            return key_states, value_states
        return torch.cat((self.keys, key_states), dim=2), torch.cat((self.values, value_states), dim=2)


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
        layers = [self._like(index, device) for index in range(len(state["layers"]))]
        for layer, stored in zip(layers, state["layers"], strict=True):
            layer.first = layer.stop = 0
            if stored["stop"]:
                layer.first = layer.stop = stored["first"]
                layer.update(stored["keys"].to(device), stored["values"].to(device))
        self.layers[:] = layers

    def _like(self, index: int, device: torch.device) -> WindowLayer:
        """The layer of that number, whose buffers something may hold on to; or a new one."""
        own = self._windows[index] if index < len(self.layers) else None
        keys = own.keys if own else None
        return own if own and keys is not None and keys.device == device else WindowLayer(self.capacity)

    def prefix(self, first: int, stop: int) -> Cache:
        """The sinks and the tokens [first, stop) of the text as a frozen, differentiable prefix."""
        assert self.first <= first <= stop <= self.stop, (self.first, first, stop, self.stop)
        if stop == self.origin:  # nothing is cached, perhaps not even made
            return Cache(layer_class_to_replicate=PrefixLayer)
        rows = slice(first - self.origin, stop - self.origin)
        return frozen(((layer.keys, layer.values, layer.first) for layer in self._windows), self.sinks, rows)

    def extend(self, prefix: Cache) -> None:
        """Append the new keys that a pass over `prefix` made."""
        with self.all_or_nothing():
            for index, source in enumerate(prefix.layers):
                assert isinstance(source, PrefixLayer) and source.new
                self.update(*source.new, index)

    @contextmanager
    def all_or_nothing(self) -> Generator[None]:
        """What runs inside is cached in all layers or, if it fails half-way, in none."""
        stop = self.stop
        try:
            yield
        except BaseException:
            self.crop(stop)
            raise


def frozen(layers: Iterable[tuple[Tensor | None, Tensor | None, int]], sinks: int, places: slice) -> Cache:
    """Those places and the sinks before them, as a frozen prefix.

    layers: each block's keys and values, [texts, heads, places, head_dim], and the place where what is
    visible begins, which is where the sinks are.
    """
    made = [_prefix_layer(keys, values, first, sinks, places) for keys, values, first in layers]
    return Cache(layers=[*made]) if made and made[0].length else Cache(layer_class_to_replicate=PrefixLayer)


def _prefix_layer(
    keys: Tensor | None, values: Tensor | None, first: int, sinks: int, places: slice
) -> PrefixLayer:
    assert keys is not None and values is not None
    both = slice(max(first, places.start - sinks), places.stop)
    if not sinks or both.start == first:  # they are neighbours
        return PrefixLayer(keys[:, :, both], values[:, :, both])
    begin = slice(first, first + sinks)
    joined = (torch.cat((state[:, :, begin], state[:, :, places]), dim=2) for state in (keys, values))
    return PrefixLayer(*joined)
