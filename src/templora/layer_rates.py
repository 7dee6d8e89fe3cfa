"""How fast each layer learns: one factor a layer, learned beside its weights.

Layers want different rates, and which ones depends on base and text. A chunk that was not learned yet
tells: where its gradient goes on in the direction of the last updates, they were too short, and where it
turns back they were too long (the hypergradient of arXiv 1703.04782, over a trace of updates as in Sutton's
IDBD, 1992). It sees tensors only, and knows nothing of chunks.
"""

from typing import Any

import torch
from torch import Tensor

from templora.magnitude import Slopes

DECAY = 0.9  # of the trace: the last ten updates
LEAST, MOST = -3.0, 1.5  # of a factor's logarithm


class LayerRates(Slopes):
    """Adam over the logarithm of each layer's rate.

    rate: of the logarithms. logs: [layers]. trace: of what was added to each layer's B, [out, rank] each.
    """

    def __init__(self, weights: list[Tensor], rate: float) -> None:
        super().__init__(len(weights), weights[0].device)
        self.rate, self.logs = rate, torch.zeros_like(self.mean)
        self.trace = [torch.zeros_like(weight) for weight in weights]

    @torch.no_grad()
    def judge(self, gradients: list[Tensor]) -> None:
        """Move the rates by the gradient, [out, rank] each, of a chunk that was not learned yet."""
        self.logs -= self.rate * self.take(self.trace, gradients)
        self.logs.clamp_(LEAST, MOST)

    @torch.no_grad()
    def apply(self, before: list[Tensor], weights: list[Tensor]) -> None:
        """Make each layer's step as long as its rate says.

        Args:
            before, weights: each layer's B, [out, rank], before an optimiser's step and after it. The former
                are used up, the latter are changed in place.
        """
        layers = zip(before, weights, self.trace, self.logs.exp().tolist(), strict=True)
        for old, weight, trace, factor in layers:
            torch.lerp(old, weight, factor, out=weight)
            made = torch.sub(weight, old, out=old)
            trace.mul_(DECAY).add_(made)

    @property
    def tensors(self) -> list[Tensor]:
        """All that a step changes in place."""
        return [*super().tensors, self.logs, *self.trace]

    def state(self) -> dict[str, Any]:
        """What a resumed text needs, copied."""
        return super().state() | {"logs": self.logs.clone(), "trace": [own.clone() for own in self.trace]}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from what `state` returned."""
        super().load_state(state)
        self.logs.copy_(state["logs"])
        for own, stored in zip(self.trace, state["trace"], strict=True):
            own.copy_(stored)
