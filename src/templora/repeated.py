"""Keys and values that several heads share, in the repeats that transformers makes for torch's attention.

It makes them in every layer and pass, keeps them for the backward pass and adds their gradients up again,
though attention needs none of it: up to a sixth of what such a model takes to learn a short chunk. A
function mode that watches for `repeat_kv`'s two steps gives a `Repeated` in their place, from which attention
takes what it is of, and whoever else wants it gets the repeats.
"""

from typing import Any, Self

from torch import Tensor
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

# What can be said of the repeats without making them.
_KNOWN = {*(getattr(Tensor, name).__get__ for name in ("shape", "ndim", "dtype", "device")), Tensor.size}


class Repeated(Tensor):
    """[texts, heads · by, tokens, width]: each head of `state`, [texts, heads, tokens, width], by times."""

    state: Tensor
    by: int

    def __new__(cls, state: Tensor, by: int) -> Self:
        texts, heads, tokens, width = state.shape
        shape = texts, heads * by, tokens, width
        # No storage: what is not known of it without its numbers is asked of the repeats.
        return Tensor._make_wrapper_subclass(cls, shape, dtype=state.dtype, device=state.device)  # pyright: ignore[reportPrivateUsage, reportReturnType]

    def __init__(self, state: Tensor, by: int) -> None:
        self.state, self.by = state, by

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _KNOWN:
            return super().__torch_function__(func, types, args, kwargs)
        args, kwargs = tree_map(_made, (args, kwargs or {}))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Past the function above, and past autograd: better an end than numbers without gradients.
        raise TypeError(f"{func} was given repeated keys or values that were not made")


class Repeats:
    """Finds them among the calls that a mode is shown."""

    def __init__(self) -> None:
        self._last: tuple[Tensor, Tensor] | None = None  # what was expanded last, and of what

    def watched(self, func: Any, args: Any, kwargs: Any) -> Tensor | None:
        """What that call gives, if it is one of the two steps; else None."""
        if kwargs or (func is not Tensor.expand and func is not Tensor.reshape):
            return None
        x, shape = args[0], args[1:]
        if func is Tensor.expand:
            if x.ndim != 5 or x.shape[2] != 1:
                return None
            self._last = (expanded := x.expand(*shape)), x
            return expanded
        last, self._last = self._last, None
        if last is None or x is not last[0]:
            return None
        texts, heads, by, *rest = x.shape
        if shape != (texts, heads * by, *rest) or last[1].shape != (texts, heads, 1, *rest):
            return None
        return Repeated(last[1].squeeze(2), by)


def repeats(model: PreTrainedModel) -> bool:
    """Whether only torch's attention sees what the model repeats, which may then not be made.

    A function of someone's own may want gradients past `__torch_function__`.
    """
    return getattr(model.config.get_text_config(), "_attn_implementation", None) == "sdpa"


def shared(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Keys and values without repeats, and whether there were any, one for each head of the query."""
    if (
        isinstance(key, Repeated)
        and isinstance(value, Repeated)
        and key.by == value.by
        and key.shape[1] == query.shape[1]
    ):
        return key.state, value.state, True
    return _made(key), _made(value), False


def _made(x: Any) -> Any:
    return x.state.repeat_interleave(x.by, 1) if isinstance(x, Repeated) else x
