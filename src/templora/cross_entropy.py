"""Next-token NLL from hidden states without ever holding all logits.

Same values and gradients as a linear head followed by cross-entropy in fp32; a frozen head is assumed.
`torch.nn.functional.linear_cross_entropy` offers this for a mean, and only in the newest torch; here
the NLL of each token is needed.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

PIECE = 256  # tokens: at a vocabulary of 128K, 134 MB of fp32 logits


def linear_nll(hidden: Tensor, head: nn.Module, labels: Tensor) -> Tensor:
    """NLL of each label in nats, fp32.

    Args:
        hidden: [tokens, width], what the head is given.
        head: maps [tokens, width] to [tokens, vocab]; its weights get no gradient.
        labels: [tokens].

    Returns:
        [tokens]
    """
    if torch.is_grad_enabled() and hidden.requires_grad:
        return _LinearNLL.apply(hidden, head, labels)  # pyright: ignore[reportReturnType]
    pieces = zip(hidden.split(PIECE), labels.split(PIECE), strict=True)
    return torch.cat([cross_entropy(head(h).float(), y, reduction="none") for h, y in pieces])


def logits_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """NLL of each label in nats, fp32, from [tokens, vocab]: cast to fp32 a piece at a time."""
    pieces = zip(logits.split(PIECE), labels.split(PIECE), strict=True)
    return torch.cat([cross_entropy(piece.float(), y, reduction="none") for piece, y in pieces])


class _LinearNLL(torch.autograd.Function):
    """A token's NLL depends on its own hidden state alone, so its gradient is made on the way forward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: nn.Module, labels: Tensor) -> Tensor:
        gradient, nlls = torch.empty_like(hidden), []
        pieces = zip(hidden.split(PIECE), gradient.split(PIECE), labels.split(PIECE), strict=True)
        for states, out, target in pieces:
            with torch.enable_grad():
                leaf = states.detach().requires_grad_()
                nll = cross_entropy(head(leaf).float(), target, reduction="none")
                (slope,) = torch.autograd.grad(nll.sum(), leaf)
            out.copy_(slope)
            nlls.append(nll.detach())
        ctx.save_for_backward(gradient)
        return torch.cat(nlls)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[0].unsqueeze(1).to(gradient.dtype), None, None
