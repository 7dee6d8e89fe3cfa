"""One block's keys and values: a window in a buffer, a piece of it for a recorded pass, and a frozen prefix.

They speak the protocol of transformers' cache layers. None knows of texts, nor who made the keys.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin


class CacheLayer(CacheLayerMixin):
    """What both kinds of layer answer to transformers' mask code."""

    is_sliding = False  # all tokens are kept; a sliding window is applied by the mask alone
    length: int

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        return -1


class WindowLayer(CacheLayer):
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

    def fits(self, keys: Tensor) -> bool:
        """Whether its buffers are of that kind, [1, heads, tokens, head_dim]."""
        own = self.keys
        if own is None or (own.dtype, own.device) != (keys.dtype, keys.device):
            return False
        return own.shape[1] == keys.shape[1] and own.shape[3] == keys.shape[3]

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


class FixedLayer(CacheLayer):
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


class PrefixLayer(CacheLayer):
    """Frozen earlier keys and values, to which one pass joins its own.

    Unlike a `WindowLayer` it can be differentiated through. Without keys it stands for the beginning of a
    text.

    room: of keys and values, the buffers that they begin, where what follows in these is of no use: new ones
    are put there, until the next pass puts its own; otherwise all are copied.
    """

    def __init__(
        self,
        keys: Tensor | None = None,
        values: Tensor | None = None,
        room: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.keys, self.values, self.room = keys, values, room
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
        if self.room is not None:
            keys, values = self.room
            return _Put.apply(key_states, keys, self.length), _Put.apply(value_states, values, self.length)  # pyright: ignore[reportReturnType]
        return torch.cat((self.keys, key_states), dim=2), torch.cat((self.values, value_states), dim=2)


class _Put(torch.autograd.Function):
    """new, [1, heads, tokens, head_dim], joined to the first `length` places of a buffer, in the buffer."""

    @staticmethod
    def forward(ctx: Any, new: Tensor, buffer: Tensor, length: int) -> Tensor:
        ctx.length, stop = length, length + new.shape[2]
        buffer[:, :, length:stop] = new
        return buffer[:, :, :stop].detach()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        return upstream[0][:, :, ctx.length :], None, None
