"""Attention that keeps less for the backward pass: one mask for all layers, no repeated keys.

torch makes of a mask of booleans one of numbers, and each layer keeps its own until the backward pass is
done: for 1,024 tokens that see as many before them 8 MB a layer. And where several heads share keys and
values, transformers repeats those for each of them, though torch's attention does not need that. `lean()`
gives it one mask a pass and the keys as they were: the same values, and gradients up to the order of a sum.
No model and no other thread is touched.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

FEWEST = 256  # rows: below that there is little to save, and asking costs more


def lean(rows: int, model: PreTrainedModel) -> AbstractContextManager[object]:
    """For one differentiated pass over that many tokens on the CPU; does nothing elsewhere."""
    pays = rows >= FEWEST and model.device.type == "cpu" and torch.is_grad_enabled()
    return LeanAttention(shared_by(model)) if pays else nullcontext()


class LeanAttention(TorchFunctionMode):
    """While it is entered. shared_by: how many heads share keys and values, in the model's own words."""

    def __init__(self, shared_by: int = 1) -> None:
        super().__init__()
        self._shared_by = shared_by
        # By what they were made of, which stays alive with them; some models have two kinds of layers.
        self._made: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not scaled_dot_product_attention or len(args) != 3:
            return func(*args, **kwargs)
        query, key, value = args
        mask = kwargs.get("attn_mask")
        if mask is not None and mask.dtype == torch.bool:
            kwargs = kwargs | {"attn_mask": self._numbers(mask, query.dtype)}
        key, value, shared = unrepeated(key, value, self._shared_by)
        return func(query, key, value, **(kwargs | {"enable_gqa": True} if shared else kwargs))

    def _numbers(self, mask: Tensor, dtype: torch.dtype) -> Tensor:
        if id(mask) not in self._made:
            numbers = torch.zeros_like(mask, dtype=dtype).masked_fill_(mask.logical_not(), -torch.inf)
            self._made[id(mask)] = mask, numbers
        return self._made[id(mask)][1]


def unrepeated(key: Tensor, value: Tensor, by: int) -> tuple[Tensor, Tensor, bool]:
    """Keys and values, [texts, heads, tokens, width], each once where `by` heads in a row have the same.

    And whether they had.
    """
    if by == 1 or not (_are_repeated(key, by) and _are_repeated(value, by)):
        return key, value, False
    return key[:, ::by].contiguous(), value[:, ::by].contiguous(), True


def shared_by(model: PreTrainedModel) -> int:
    """How many heads share keys and values; 1 where the model's configuration does not say."""
    config = model.config.get_text_config()
    heads, own = getattr(config, "num_attention_heads", 1), getattr(config, "num_key_value_heads", None)
    return heads // own if isinstance(own, int) and own > 0 and heads % own == 0 else 1


def _are_repeated(state: Tensor, by: int) -> bool:
    """By what they hold: a model may have layers of other kinds."""
    if state.ndim != 4 or state.shape[1] % by:
        return False
    first = state.detach()[:, ::by]
    return all(torch.equal(first, state.detach()[:, other::by]) for other in range(1, by))
