"""A base's fp32 weights once more in bf16, whose products some CPUs compute several times as fast.

As under torch's autocast, what goes into such a product and what comes out of it is rounded, and all else
is computed in fp32: sums, norms, attention, the adapter, its gradients, the logits; a long pass keeps what
went in as rounded as that for its way back. But autocast rounds every weight
anew in every pass, which at 64 tokens takes the time that the products save; here each has a copy.
"""

import sys
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from templora.recipe import Precision

SMALLEST = 1 << 16  # numbers of a weight: rounding what goes into a smaller one takes longer than it saves
LARGE = 1 << 28  # numbers of all: a smaller base writes as fast from a merged fp32 copy, see `merging`


class Halves:
    """bf16 copies of a model's frozen linear layers, each made when it is first asked for.

    The output layer has none: a logit's rounding error is an error in nats. large: whether a pass over few
    tokens, which takes as long as reading the weights does, pays as well.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        head = getattr(model.get_output_embeddings(), "weight", None)
        layers = (module for module in model.modules() if type(module) is nn.Linear)
        weights = (layer.weight for layer in layers if layer.weight is not head)
        # The weights are kept, so that no other tensor comes to have the id of one that is gone.
        self._weights = {id(weight): weight for weight in weights if _suits(weight)}
        self.large = sum(weight.numel() for weight in self._weights.values()) >= LARGE
        self._copies: dict[int, tuple[tuple[int, int], Tensor]] = {}  # and what of the weight it is of

    def __len__(self) -> int:
        return len(self._weights)

    def of(self, weight: Tensor) -> Tensor:
        """The copy of one of its weights; any other tensor as it is."""
        own = self._weights.get(id(weight))
        if own is None or own.requires_grad:
            return weight
        state = own._version, own.data_ptr()
        made, copy = self._copies.get(id(weight), (None, weight))
        if made != state:
            copy = own.detach().bfloat16()
            self._copies[id(weight)] = state, copy
        return copy


def wanted(precision: Precision) -> bool:
    """What a recipe's precision comes to on this machine."""
    return precision == "bf16" or (precision == "auto" and native())


@cache
def native() -> bool:
    """Whether the CPU has instructions for such products: without them they are slower than fp32's."""
    return "avx512_bf16" in _cpu().split()


@cache
def intel() -> bool:
    """Whether the CPU is Intel's, for which MKL is at its best; taken for granted where nothing says so."""
    return not _cpu() or "GenuineIntel" in _cpu()


def as_vector() -> bool:
    """Whether one row times a bf16 weight is fastest as a product of a matrix and a vector.

    On Intel that reads the weight at all of the memory's speed, a product of matrices at down to a third of
    it; on AMD it takes 1.4 to 2.1 times as long.
    """
    return native() and intel()


def _suits(weight: Tensor) -> bool:
    return weight.dtype == torch.float32 and weight.device.type == "cpu" and weight.numel() >= SMALLEST


@cache
def _cpu() -> str:
    """What Linux says of it."""
    info = Path("/proc/cpuinfo")
    return info.read_text("utf-8") if sys.platform == "linux" and info.exists() else ""
