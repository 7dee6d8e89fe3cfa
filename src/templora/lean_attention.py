"""Attention that keeps less for the backward pass: one mask for all layers, no repeated keys.

torch makes of a mask of booleans one of numbers, and each layer keeps its own until the backward pass is
done: for 1,024 tokens that see as many before them 8 MB a layer. And where several heads share keys and
values, transformers repeats those for each of them, see `repeated`. `lean()` gives torch's attention one mask
a pass and the keys as they were: the same values, and gradients up to the order of a sum. No model and no
other thread is touched.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from templora.repeated import Repeats, repeats, shared

FEWEST = 256  # rows: below that there is little to save, and asking costs more


def lean(rows: int, model: PreTrainedModel) -> AbstractContextManager[object]:
    """For one differentiated pass over that many tokens on the CPU; does nothing elsewhere."""
    pays = rows >= FEWEST and model.device.type == "cpu" and torch.is_grad_enabled()
    return LeanAttention(repeats=repeats(model)) if pays else nullcontext()


class LeanAttention(TorchFunctionMode):
    """While it is entered. repeats: whether `Repeated` may stand for what the model repeats."""

    def __init__(self, *, repeats: bool = True) -> None:
        super().__init__()
        self._repeats = Repeats() if repeats else None
        # By what they were made of, which stays alive with them; some models have two kinds of layers.
        self._made: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._repeats and (found := self._repeats.watched(func, args, kwargs)) is not None:
            return found
        if func is not scaled_dot_product_attention or len(args) != 3:
            return func(*args, **kwargs)
        key, value, is_shared = shared(*args)
        mask = kwargs.get("attn_mask")
        if mask is not None and mask.dtype == torch.bool:
            kwargs = kwargs | {"attn_mask": self._numbers(mask, key.dtype)}
        return func(args[0], key, value, **(kwargs | {"enable_gqa": True} if is_shared else kwargs))

    def _numbers(self, mask: Tensor, dtype: torch.dtype) -> Tensor:
        if id(mask) not in self._made:
            numbers = torch.zeros_like(mask, dtype=dtype).masked_fill_(mask.logical_not(), -torch.inf)
            self._made[id(mask)] = mask, numbers
        return self._made[id(mask)][1]
