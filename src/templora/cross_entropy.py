"""Next-token NLL from hidden states without ever holding all logits.

Same values and gradients as a linear head followed by cross-entropy in fp32.
`torch.nn.functional.linear_cross_entropy` offers this for a mean, and only in the newest torch; here
the NLL of each token is needed.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from templora import kernels

PIECE = 128  # tokens: at a vocabulary of 128K, 67 MB of fp32 logits; at 32K malloc can still keep them
LARGEST_KEPT = 4  # pieces of several texts whose logits are kept for the backward pass, not made again


def linear_nll(hidden: Tensor, head: nn.Module, labels: Tensor) -> Tensor:
    """NLL of each label in nats, fp32.

    Args:
        hidden: [tokens, width], what the head is given.
        head: maps [tokens, width] to [tokens, vocab].
        labels: [tokens].

    Returns:
        [tokens]
    """
    learns = any(weight.requires_grad for weight in head.parameters())
    if torch.is_grad_enabled() and hidden.requires_grad and not learns:
        return _LinearNLL.apply(hidden, head, labels)  # pyright: ignore[reportReturnType]

    def nll(states: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(head(states).float(), target, reduction="none")

    pieces = list(zip(hidden.split(PIECE), labels.split(PIECE), strict=True))
    if torch.is_grad_enabled() and len(pieces) > 1:
        # A head that learns needs all logits for its own gradient: of one piece at a time, made again.
        return torch.cat([_made_again(nll, h, y) for h, y in pieces])
    return torch.cat([nll(h, y) for h, y in pieces])


def texts_nll(hidden: Tensor, head: nn.Module, labels: Tensor) -> Tensor:
    """`linear_nll` of several texts under a head that has its own side path for each of them.

    Args:
        hidden: [texts, tokens, width]. labels: [texts, tokens].

    Returns:
        [texts, tokens]
    """
    if not any(weight.requires_grad for weight in head.parameters()):
        return linear_nll(hidden.flatten(0, 1), head, labels.flatten()).view(labels.shape)

    def nll(states: Tensor, target: Tensor) -> Tensor:
        logits = head(states).flatten(0, 1).float()
        return cross_entropy(logits, target.flatten(), reduction="none").view(target.shape)

    size = max(1, PIECE // len(hidden))  # tokens of each text
    pieces = list(zip(hidden.split(size, 1), labels.split(size, 1), strict=True))
    if torch.is_grad_enabled() and len(pieces) > LARGEST_KEPT:
        return torch.cat([_made_again(nll, h, y) for h, y in pieces], 1)
    return torch.cat([nll(h, y) for h, y in pieces], 1)


def logits_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """NLL of each label in nats, fp32, from [tokens, vocab]: cast to fp32 a piece at a time."""
    pieces = zip(logits.split(PIECE), labels.split(PIECE), strict=True)
    return torch.cat([cross_entropy(piece.float(), y, reduction="none") for piece, y in pieces])


def judged(hidden: Tensor, head: nn.Module, labels: Tensor) -> tuple[Tensor, Tensor]:
    """NLL of each label in nats, fp32, and whether it is the likeliest token; without gradients.

    Args:
        hidden: [tokens, width], what the head is given. labels: [tokens].

    Returns:
        [tokens], and [tokens] of bool.
    """
    nlls, likeliest = list[Tensor](), list[Tensor]()
    for states, target in zip(hidden.split(PIECE), labels.split(PIECE), strict=True):
        logits = head(states).float()
        nlls.append(cross_entropy(logits, target, reduction="none"))
        likeliest.append(logits.argmax(-1) == target)
    return torch.cat(nlls), torch.cat(likeliest)


def _made_again(nll: Callable[[Tensor, Tensor], Tensor], hidden: Tensor, labels: Tensor) -> Tensor:
    """`nll`, whose logits are not kept for the backward pass but made again, by the same kernels.

    That pass runs after `kernels.fast` was left; other kernels would keep other tensors than were promised.
    """
    fast = kernels.is_fast()
    again = lambda: (nullcontext(), kernels.Fast() if fast else nullcontext())  # noqa: E731
    return checkpoint(nll, hidden, labels, use_reentrant=False, context_fn=again)  # pyright: ignore[reportReturnType, reportCallIssue]


class _LinearNLL(torch.autograd.Function):
    """Under a frozen head. A token's NLL depends on its own hidden state alone, so its gradient is made on
    the way forward."""

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
