"""Layers that compute with an adapter as cheaply as without it: their weight is W + s·B·A, a copy of its own.

The base's tensors are not written. For an fp32 base alone: a bf16 sum would lose half of a small update.
"""

import copy
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from templora.injection import Site

# A copy costs the memory of its layers once more; past this the side path is kept.
LARGEST = 1 << 30  # bytes


def can_merge(sites: Iterable[Site]) -> bool:
    """Whether that is exact for all of them, and not too large."""
    size = 0
    for site in sites:
        weight = getattr(site.original, "weight", None)
        if type(site.original) not in (nn.Linear, Conv1D) or weight is None or weight.dtype != torch.float32:
            return False
        size += weight.numel() * 4
    return size <= LARGEST


class MergedCopy:
    """A merged layer for each site, kept for the tokens to come."""

    def __init__(self, sites: Sequence[Site]) -> None:
        self._sites, self._version = sites, -1
        self._layers = [_twin(site.original) for site in sites]
        for layer in self._layers:
            layer._parameters["weight"] = _frozen(torch.empty_like(layer.weight))  # pyright: ignore[reportPrivateUsage, reportArgumentType, reportCallIssue]

    def of(self, version: int) -> list[nn.Module]:
        """The layers, brought up to that version of the adapter."""
        if self._version != version:
            for site, layer in zip(self._sites, self._layers, strict=True):
                _merge(site, layer.weight)  # pyright: ignore[reportArgumentType]
            self._version = version
        return self._layers

    def expire(self) -> None:
        """The weights were changed, perhaps without a new version: make it again when it is needed."""
        self._version = -1


class Fleeting(nn.Module):
    """Stands in for a layer for one pass over many tokens: merged when it runs, then forgotten."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.weight, self.bias = site.original.weight, site.original.bias  # some models look at their layers
        self._site = (site, _twin(site.original))  # in a tuple, which nn.Module does not look into

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """[…, in] to […, out]."""
        site, layer = self._site
        own = layer._parameters  # pyright: ignore[reportPrivateUsage]
        own["weight"] = _frozen(_merge(site, None))
        try:
            return layer(x)
        finally:
            own["weight"] = None


@torch.no_grad()
def _merge(site: Site, out: Tensor | None) -> Tensor:
    """The weight with the adapter's part, into `out` or a tensor of its own."""
    left, right = (site.a.T, site.b.T) if isinstance(site.original, Conv1D) else (site.b, site.a)
    return torch.addmm(site.original.weight, left, right, alpha=site.scale, out=out)  # pyright: ignore[reportCallIssue, reportArgumentType]


def _twin(layer: nn.Module) -> nn.Module:
    """The same layer with a place of its own for a weight; everything else is shared."""
    twin = copy.copy(layer)
    twin._parameters = dict(layer._parameters)  # pyright: ignore[reportPrivateUsage]
    return twin


def _frozen(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight, requires_grad=False)
