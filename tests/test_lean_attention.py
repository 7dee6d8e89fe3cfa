"""Attention that keeps less: the same values, one mask, no repeated keys."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import templora
from templora import lean_attention
from templora.lean_attention import LeanAttention
from templora.testing import ByteTokenizer, tiny_llama

CHUNK = 300


def learned(**changes: Any) -> tuple[Tensor, Tensor, int, int]:
    """NLL and gradient of a chunk after a context from the cache; masks and numbers that its pass keeps."""
    base = templora.load(
        model=tiny_llama(max_position_embeddings=2 * CHUNK, num_hidden_layers=3, **changes),
        tokenizer=ByteTokenizer(),
    )
    cached: dict[str, Any] = {"context_from": "cache", "dropout": 0.0}
    session = base.session("paper", seed=1, window=CHUNK, context=CHUNK, chunk=CHUNK, **cached)
    with torch.no_grad():
        session.adapter.flat.normal_(std=0.05, generator=torch.Generator().manual_seed(5))
    session.extend([7 * i % 250 for i in range(2 * CHUNK)], "")
    masks, sizes, all_kept = set[int](), dict[int, int](), list[Tensor]()

    def keep(tensor: Tensor) -> Tensor:
        all_kept.append(tensor)  # so that nothing else comes to lie where it lies
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes() // 4
        if tensor.shape[:3] == (1, 1, CHUNK) and tensor.shape[3] >= CHUNK and tensor.is_floating_point():
            masks.add(storage.data_ptr())
        return tensor

    with session.adapter.attached(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        nll = session.study.passes.nll(session.ids, session.plan.span(1), CHUNK)
    nll.mean().backward()
    return nll.detach(), session.adapter.gradient.clone(), len(masks), sum(sizes.values())


@pytest.mark.parametrize("own", [4, 2])
def test_the_same_values_and_less_kept(own: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """own: heads of keys and values, for four of queries."""
    changes = {"num_attention_heads": 4, "num_key_value_heads": own}
    # Where the package's own attention pays no mask is kept at all.
    monkeypatch.setattr("templora.kernels.pays", lambda: False)
    nll, gradient, masks, kept = learned(**changes)
    monkeypatch.setattr(lean_attention, "FEWEST", 10_000)
    plain_nll, plain_gradient, plain_masks, plain_kept = learned(**changes)
    assert torch.equal(nll, plain_nll)
    if own < 4:  # gradients of shared keys are added up in another order
        assert torch.allclose(gradient, plain_gradient, rtol=1e-3, atol=1e-6)
    else:
        assert torch.equal(gradient, plain_gradient)
    assert gradient.abs().sum() > 0
    assert (masks, plain_masks) == (1, 3)
    mask, width = CHUNK * (2 * CHUNK - 1), 32
    repeated = 3 * 2 * (2 * CHUNK - 1) * width // 2 if own < 4 else 0  # of 3 layers half of keys and values
    assert plain_kept - kept >= 2 * mask + repeated


def test_the_attention_of_the_package_keeps_no_repeated_keys_either(monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"num_attention_heads": 4, "num_key_value_heads": 2}
    monkeypatch.setattr("templora.kernels.pays", lambda: True)
    nll, gradient, _, kept = learned(**changes)
    monkeypatch.setattr("templora.lean_attention.shared_by", lambda _: 1)
    plain_nll, plain_gradient, _, plain_kept = learned(**changes)
    assert torch.allclose(nll, plain_nll, atol=1e-5)
    assert torch.allclose(gradient, plain_gradient, rtol=1e-3, atol=1e-6)
    assert plain_kept - kept >= 3 * 2 * (2 * CHUNK - 1) * 32 // 2  # of 3 layers half of keys and values


def test_only_what_was_repeated_is_taken_together() -> None:
    query, key, value = (torch.randn(1, 4, tokens, 8) for tokens in (5, 9, 9))
    expected = scaled_dot_product_attention(query, key, value)
    with LeanAttention(shared_by=2):
        assert torch.equal(scaled_dot_product_attention(query, key, value), expected)
        key, value = (state[:, ::2].repeat_interleave(2, 1) for state in (key, value))
        shared = scaled_dot_product_attention(query, key, value)
    assert torch.allclose(shared, scaled_dot_product_attention(query, key, value), atol=1e-6)
