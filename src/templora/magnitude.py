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


class Slopes:
    """Slopes of a loss along one number of each layer, as Adam steps along them.

    mean, square: their running averages, [layers].
    """

    def __init__(self, layers: int, device: torch.device) -> None:
        self.steps = 0
        self.mean, self.square = (torch.zeros(layers, device=device, dtype=torch.float32) for _ in range(2))

    def take(self, weights: list[Tensor], others: list[Tensor]) -> Tensor:
        """How far to go against the slope of each layer, [layers]: near 1 where they agree, 0 at first.

        Args:
            weights, others: for each layer two tensors of one shape, whose product's sum is the slope.
        """
        # Not the sum of a product, which writes and reads all of it once more.
        pairs = zip(weights, others, strict=True)
        slopes = torch.stack([torch.dot(one.reshape(-1), other.reshape(-1)) for one, other in pairs])
        self.steps += 1
        self.mean.lerp_(slopes, 1 - BETA1)
        self.square.lerp_(slopes * slopes, 1 - BETA2)
        if self.steps <= WARM_UP:
            return torch.zeros_like(slopes)
        mean = self.mean / (1 - BETA1**self.steps)
        return mean / ((self.square / (1 - BETA2**self.steps)).sqrt() + EPS)

    @property
    def tensors(self) -> list[Tensor]:
        """All that a step changes in place."""
        return [self.mean, self.square]

    def state(self) -> dict[str, Any]:
        """What a resumed text needs, copied."""
        return {"steps": self.steps, "mean": self.mean.clone(), "square": self.square.clone()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from what `state` returned."""
        self.steps = state["steps"]
        self.mean.copy_(state["mean"])
        self.square.copy_(state["square"])


class Magnitudes(Slopes):
    """Adam over the logarithm of each layer's B.

    rate: of the logarithms; a step changes B by about that fraction.
    """

    def __init__(self, layers: int, rate: float, device: torch.device) -> None:
        super().__init__(layers, device)
        self.rate = rate

    @torch.no_grad()
    def step(self, weights: list[Tensor], gradients: list[Tensor]) -> None:
        """Scale each B by what its gradient says: d loss / d log magnitude is their product's sum.

        Args:
            weights: each layer's B, [out, rank], changed in place.
            gradients: of a chunk that was not learned yet.
        """
        factors = torch.exp(-self.rate * self.take(weights, gradients))
        torch._foreach_mul_(weights, list(factors.unbind()))  # pyright: ignore[reportPrivateUsage]
