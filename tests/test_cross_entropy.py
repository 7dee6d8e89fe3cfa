"""NLL from hidden states, in pieces: the values and gradients of one cross-entropy over all logits."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from templora.cross_entropy import PIECE, linear_nll, logits_nll

WIDTH, VOCABULARY = 12, 31
# One token, just below, at and above a piece's border, and more than two pieces.
LENGTHS = [1, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE + 5]


def case(tokens: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, nn.Linear, Tensor]:
    """Hidden states that need a gradient, a frozen head with a bias, labels."""
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, WIDTH, generator=generator).to(dtype).requires_grad_()
    head = nn.Linear(WIDTH, VOCABULARY).to(dtype).requires_grad_(False)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return hidden, head, torch.randint(VOCABULARY, (tokens,), generator=generator)


def plain(hidden: Tensor, head: nn.Linear, labels: Tensor) -> Tensor:
    """All logits at once, in fp32."""
    return cross_entropy(head(hidden).float(), labels, reduction="none")


def gradient(nll: Tensor, hidden: Tensor, weights: Tensor) -> Tensor:
    (slope,) = torch.autograd.grad((nll * weights).sum(), hidden)
    return slope


@pytest.mark.parametrize("tokens", LENGTHS)
def test_values_and_gradients_are_those_of_one_pass_over_all_logits(tokens: int) -> None:
    hidden, head, labels = case(tokens)
    weights = torch.linspace(-1, 2, tokens)  # each token's gradient must be scaled by its own
    ours, theirs = linear_nll(hidden, head, labels), plain(hidden, head, labels)
    assert ours.shape == (tokens,)
    assert ours.dtype == torch.float32
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert torch.allclose(gradient(ours, hidden, weights), gradient(theirs, hidden, weights), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_only_the_head_rounds(dtype: torch.dtype) -> None:
    hidden, head, labels = case(PIECE + 3, dtype)
    weights = torch.ones(PIECE + 3)
    ours, theirs = linear_nll(hidden, head, labels), plain(hidden, head, labels)
    assert ours.dtype == torch.float32
    assert torch.allclose(ours, theirs, atol=1e-5)
    slope = gradient(ours, hidden, weights)
    assert slope.dtype == dtype
    assert torch.allclose(slope.float(), gradient(theirs, hidden, weights).float(), atol=0.05)


@pytest.mark.parametrize("tokens", LENGTHS)
def test_without_gradients_the_values_are_the_same_bits(tokens: int) -> None:
    hidden, head, labels = case(tokens)
    with_gradient = linear_nll(hidden, head, labels)
    with torch.no_grad():
        without = linear_nll(hidden, head, labels)
    assert not without.requires_grad
    assert torch.equal(with_gradient.detach(), without)
    assert torch.equal(linear_nll(hidden.detach(), head, labels), without)


@pytest.mark.parametrize("tokens", LENGTHS)
def test_a_head_that_learns_gets_its_gradient(tokens: int) -> None:
    hidden, head, labels = case(tokens)
    head.requires_grad_()
    weights = torch.rand(tokens)
    slopes = [
        torch.autograd.grad((nll * weights).sum(), (hidden, *head.parameters()))
        for nll in (linear_nll(hidden, head, labels), plain(hidden, head, labels))
    ]
    for ours, theirs in zip(*slopes, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4)


def test_gradients_flow_on_to_what_made_the_hidden_states() -> None:
    hidden, head, labels = case(PIECE + 3)
    slopes: list[Tensor] = []
    for nll in (linear_nll, plain):
        weight = torch.eye(WIDTH, requires_grad=True)
        nll(hidden.detach() @ weight, head, labels).mean().backward()
        assert weight.grad is not None
        slopes.append(weight.grad)
    assert torch.allclose(slopes[0], slopes[1], atol=1e-6)


def test_the_head_gets_no_gradient() -> None:
    hidden, head, labels = case(7)
    linear_nll(hidden, head, labels).sum().backward()
    assert all(parameter.grad is None for parameter in head.parameters())


@pytest.mark.parametrize("tokens", LENGTHS)
def test_the_nll_of_given_logits_is_that_of_one_pass(tokens: int) -> None:
    hidden, head, labels = case(tokens)
    ours, theirs = logits_nll(head(hidden), labels), plain(hidden, head, labels)
    assert torch.allclose(ours, theirs, atol=1e-6)
    weights = torch.linspace(-1, 2, tokens)
    assert torch.allclose(gradient(ours, hidden, weights), gradient(theirs, hidden, weights), atol=1e-6)


def test_never_more_than_one_piece_of_logits_is_made() -> None:
    hidden, head, labels = case(3 * PIECE)
    shapes: list[int] = []
    head.register_forward_hook(lambda _module, _inputs, output: shapes.append(output.shape[0]))
    linear_nll(hidden, head, labels).sum().backward()
    assert shapes == [PIECE] * 3
