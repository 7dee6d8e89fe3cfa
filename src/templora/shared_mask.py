"""One mask for all layers: torch makes of a mask of booleans one of numbers, and each layer keeps its own.

For 1,024 tokens that see as many before them that is 8 MB a layer until the backward pass is done. `shared()`
makes it once a pass; same values, same gradients. No model and no other thread is touched.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

FEWEST = 256  # rows: below that the mask is small, and asking costs more than it saves


def shared(rows: int, *, device: torch.device) -> AbstractContextManager[object]:
    """For one differentiated pass over that many tokens on the CPU; does nothing elsewhere."""
    pays = rows >= FEWEST and device.type == "cpu" and torch.is_grad_enabled()
    return SharedMask() if pays else nullcontext()


class SharedMask(TorchFunctionMode):
    """While it is entered, attention is given masks of numbers."""

    def __init__(self) -> None:
        super().__init__()
        # By what they were made of, which stays alive with them; some models have two kinds of layers.
        self._made: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        mask = kwargs.get("attn_mask")
        if func is scaled_dot_product_attention and mask is not None and mask.dtype == torch.bool:
            kwargs = kwargs | {"attn_mask": self._of(mask, args[0].dtype)}
        return func(*args, **kwargs)

    def _of(self, mask: Tensor, dtype: torch.dtype) -> Tensor:
        if id(mask) not in self._made:
            numbers = torch.zeros_like(mask, dtype=dtype).masked_fill_(mask.logical_not(), -torch.inf)
            self._made[id(mask)] = mask, numbers
        return self._made[id(mask)][1]
