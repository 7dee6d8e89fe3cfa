"""The MLP of most families, down(silu(gate(x)) · up(x)), with half of what it keeps for the backward pass.

Of its four matrices as wide as the MLP, silu's result and the product are made again on the way back: they
cost nothing beside the layers' products. Same values and gradients, to the bit but where `lora_linear` keeps
gate and up rounded.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from templora.injection import Site
from templora.lora_linear import LoraLinear
from templora.probe import is_watched

DOWN = "down_proj"
LAYERS = ("gate_proj", "up_proj", DOWN)


class GatedMlp(nn.Module):
    """Stands in for such an MLP; runs what stands in its layers' places now."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self._modules = mlp._modules  # its layers are found here too
        self._original: tuple[Any] = (mlp,)  # in a tuple, which nn.Module does not look into

    def forward(self, x: Tensor) -> Tensor:
        """[…, width], both ways."""
        (original,) = self._original
        down: Any = original.down_proj
        watched = any(map(is_watched, (original, original.act_fn, down)))
        if not isinstance(down, LoraLinear) or watched:
            return original(x)
        return down.gated(original.gate_proj(x), original.up_proj(x))


def gated_mlps(model: nn.Module, sites: Sequence[Site]) -> Iterator[Site]:
    """The places of the model's MLPs of this kind whose last layer is one of the sites."""
    adapted = {id(site.parent) for site in sites if site.name == DOWN}
    for parent in model.modules():
        for name, module in parent.named_children():
            if id(module) in adapted and _is_gated(module):
                yield Site(parent, name, module, None)


@torch.no_grad()
def _is_gated(mlp: nn.Module) -> bool:
    """By what it computes: a class of that shape may do more, or less."""
    layers = dict(mlp.named_children())
    if layers.keys() != {*LAYERS, "act_fn"} or mlp.training:
        return False
    gate, up, down = (layers[name] for name in LAYERS)
    if any(type(layer) is not nn.Linear for layer in (gate, up, down)):
        return False
    weight: Tensor = gate.weight  # pyright: ignore[reportAssignmentType]
    # The last row is so large that a limit on what comes out of gate or up would show.
    x = torch.linspace(-4, 4, 3 * weight.shape[1], dtype=weight.dtype, device=weight.device).view(3, -1)
    x[2] *= 1000
    try:
        return torch.equal(mlp(x), down(silu(gate(x)) * up(x)))
    except (TypeError, RuntimeError):  # it gives or wants something else
        return False
