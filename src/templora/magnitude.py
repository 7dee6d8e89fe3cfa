"""How much each layer's update counts: one number a layer, learned beside its directions.

An optimiser step says where B should go. How far all of B has come is a question of its own, and each chunk
answers it before it is learned, by the slope of its loss along B itself: "too far", and B shrinks, as weight
decay would have it; "not far enough", and it grows, as no decay could. So a rate that is wrong for a text
costs less. It sees tensors only, and knows nothing of chunks.
"""

from typing import Any

import torch
from torch import Tensor

BETA1, BETA2, EPS = 0.9, 0.99, 1e-12
WARM_UP = 5  # steps before the averages mean anything


class Magnitudes:
    """Adam over the logarithm of each layer's B.

    rate: of the logarithms; a step changes B by about that fraction.
    """

    def __init__(self, layers: int, rate: float, device: torch.device) -> None:
        self.rate, self.steps = rate, 0
        self.mean, self.square = (torch.zeros(layers, device=device) for _ in range(2))

    @torch.no_grad()
    def step(self, weights: list[Tensor], gradients: list[Tensor]) -> None:
        """Scale each B by what its gradient says.

        Args:
            weights: each layer's B, [out, rank], changed in place.
            gradients: of a chunk that was not learned yet.
        """
        products = torch._foreach_mul(weights, gradients)  # pyright: ignore[reportPrivateUsage]
        slopes = torch.stack([product.sum() for product in products])  # d loss / d log magnitude, [layers]
        self.steps += 1
        self.mean.lerp_(slopes, 1 - BETA1)
        self.square.lerp_(slopes * slopes, 1 - BETA2)
        if self.steps <= WARM_UP:
            return
        mean = self.mean / (1 - BETA1**self.steps)
        spread = (self.square / (1 - BETA2**self.steps)).sqrt() + EPS
        factors = torch.exp(-self.rate * mean / spread)
        torch._foreach_mul_(weights, list(factors.unbind()))  # pyright: ignore[reportPrivateUsage]

    def state(self) -> dict[str, Any]:
        """What a resumed text needs, copied."""
        return {"steps": self.steps, "mean": self.mean.clone(), "square": self.square.clone()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from what `state` returned."""
        self.steps = state["steps"]
        self.mean.copy_(state["mean"])
        self.square.copy_(state["square"])
