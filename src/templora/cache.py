"""Keys and values of the visible tokens, in buffers that are allocated once.

In a `WindowCache` the place in the buffer is the position id, so positions never pass the capacity; what is
kept moves only when they run out. It speaks transformers' `Cache` protocol, so any model that uses
that protocol works unchanged. It does not know who made the keys.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

# Every block's keys, [1, heads, tokens, head_dim] each, as they would be so many positions later.
Moved = Callable[[Sequence[Tensor], int], list[Tensor]]


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

    def grow(self) -> tuple[Tensor, Tensor]:
        """Make room for one token; return all that is visible, its own place, which is empty, last."""
        assert self.keys is not None and self.values is not None
        assert self.stop < self.capacity, "the plan let a window outgrow its cache"
        self.stop += 1
        return self.keys[:, :, self.first : self.stop], self.values[:, :, self.first : self.stop]

    def state(self) -> dict[str, Any]:
        """Its visible keys and values, copied, [1, heads, stop - first, head_dim]."""
        kept: dict[str, Any] = {"first": self.first, "stop": self.stop}
        if self.keys is not None and self.values is not None:
            kept |= {
                "keys": self.keys[:, :, self.first : self.stop].clone(),
                "values": self.values[:, :, self.first : self.stop].clone(),
            }
        return kept


class PrefixLayer(_Layer):
    """A frozen view of earlier keys and values, to which one pass joins its own.

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

    origin: index in the text of the token at position 0.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__(layer_class_to_replicate=partial(WindowLayer, capacity))  # pyright: ignore[reportArgumentType]
        self.capacity = capacity
        self.origin = 0

    @property
    def _windows(self) -> list[WindowLayer]:
        return self.layers  # pyright: ignore[reportReturnType]

    @property
    def first(self) -> int:
        """Index in the text of the oldest visible token."""
        return self.origin + (self._windows[0].first if self.layers else 0)

    @property
    def stop(self) -> int:
        """Index in the text after the newest cached token."""
        return self.origin + (self._windows[0].stop if self.layers else 0)

    def restart(self, origin: int) -> None:
        """Forget everything; the next token comes from index `origin` and gets position 0."""
        self.origin = origin
        for layer in self._windows:
            layer.first = layer.stop = 0

    def forget_before(self, token: int) -> None:
        """Hide all tokens older than that index of the text."""
        for layer in self._windows:
            layer.first = min(max(layer.first, token - self.origin), layer.stop)

    def move_to_front(self, token: int, moved: Moved) -> None:
        """Hide all tokens older than that index of the text, and let it be the one at position 0.

        If this fails half-way, what is cached is of no use any more. moved: see `rotary`.
        """
        self.forget_before(token)
        kept = [layer.state() for layer in self._windows]
        keys = moved([state["keys"] for state in kept], self.origin - token)
        for layer, state, own in zip(self._windows, kept, keys, strict=True):
            layer.first = layer.stop = 0
            layer.update(own, state["values"])
        self.origin = token

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
        self.layers.clear()
        for stored in state["layers"]:
            layer = WindowLayer(self.capacity)
            if stored["stop"]:
                layer.first = layer.stop = stored["first"]
                layer.update(stored["keys"].to(device), stored["values"].to(device))
            self.layers.append(layer)

    def prefix(self, first: int, stop: int) -> Cache:
        """The tokens [first, stop) of the text as a frozen, differentiable prefix."""
        assert self.first <= first <= stop <= self.stop, (self.first, first, stop, self.stop)
        if first == stop:
            return Cache(layer_class_to_replicate=PrefixLayer)
        rows = slice(first - self.origin, stop - self.origin)
        return Cache(layers=[_prefix_layer(layer, rows) for layer in self._windows])

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


def _prefix_layer(layer: WindowLayer, rows: slice) -> PrefixLayer:
    assert layer.keys is not None and layer.values is not None
    return PrefixLayer(layer.keys[:, :, rows], layer.values[:, :, rows])
