"""Attention that keeps less: the same values, one mask, no repeated keys."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import repeat_kv

import templora
from templora import lean_attention
from templora.kernels import Fast
from templora.lean_attention import LeanAttention
from templora.repeated import Repeated
from templora.testing import ByteTokenizer, tiny_llama

CHUNK = 300
# Numbers of keys and values that 3 layers repeat, where two heads of width 8 share them; and of one token's,
# for which a cache, whose own are kept in their place, has room as well.
REPEATED, ROOM = 3 * 2 * 2 * 8 * (2 * CHUNK - 1), 3 * 2 * 2 * 8


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
    repeated = REPEATED - ROOM if own < 4 else 0
    assert plain_kept - kept >= 2 * CHUNK * (2 * CHUNK - 1) + repeated


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")
def test_the_attention_of_the_package_keeps_no_repeated_keys_either(monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"num_attention_heads": 4, "num_key_value_heads": 2}
    monkeypatch.setattr("templora.kernels.pays", lambda: True)
    nll, gradient, _, kept = learned(**changes)
    monkeypatch.setattr("templora.repeated.Repeats.watched", lambda *_: None)
    plain_nll, plain_gradient, _, plain_kept = learned(**changes)
    assert torch.allclose(nll, plain_nll, atol=1e-5)
    assert torch.allclose(gradient, plain_gradient, rtol=1e-3, atol=1e-6)
    assert plain_kept - kept >= REPEATED - ROOM


@pytest.mark.parametrize("mode", [LeanAttention, Fast])
def test_repeats_are_what_they_are_to_whoever_asks(mode: Any) -> None:
    state = torch.randn(2, 3, 5, 8, requires_grad=True)
    expected = repeat_kv(state, 4)
    with mode():
        found = repeat_kv(state, 4)
        assert isinstance(found, Repeated)
        assert (found.shape, found.ndim, found.dtype) == (expected.shape, 4, expected.dtype)
        assert (found.size(1), found.requires_grad, found.is_contiguous()) == (12, True, True)
        doubled = found * 2
        (slope,) = torch.autograd.grad(found.sin().sum(), state)
        others = state.detach().unsqueeze(2).expand(2, 3, 4, 5, 8).reshape(6, 4, 5, 8)
    assert torch.equal(doubled, expected * 2)
    assert torch.equal(slope, torch.autograd.grad(expected.sin().sum(), state)[0])
    assert not isinstance(doubled, Repeated)
    assert torch.equal(others.flatten(0, 1), expected.flatten(0, 1))


@pytest.mark.parametrize("mode", [LeanAttention, Fast])
def test_attention_takes_what_is_repeated(mode: Any) -> None:
    query = torch.randn(1, 4, 20, 8)
    states = [torch.randn(1, 2, 20, 8, requires_grad=True) for _ in range(2)]

    def attended(*states: Tensor, **how: Any) -> list[Tensor]:
        y = scaled_dot_product_attention(query, *states, **how)
        return [y.detach(), *torch.autograd.grad(y.sin().sum(), own)]

    own = states
    for how in (
        {"is_causal": True},
        {},
        {"attn_mask": torch.ones(20, 20, dtype=torch.bool).tril()[None, None]},
    ):
        expected = attended(*(repeat_kv(state, 2) for state in states), **how)
        with mode():
            found = attended(*(repeat_kv(state, 2) for state in states), **how)
            mixed = attended(repeat_kv(states[0], 2), repeat_kv(states[1], 2).clone(), **how)
        for one in (found, mixed):
            assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(one, expected, strict=True))


def test_repeats_are_made_for_any_other_attention_than_torchs() -> None:
    changes = {"num_attention_heads": 4, "num_key_value_heads": 2}
    for way, lazily in (("sdpa", True), ("eager", False)):
        base = templora.load(model=tiny_llama(attn_implementation=way, **changes), tokenizer=ByteTokenizer())
        with lean_attention.lean(CHUNK, base.model):
            assert isinstance(repeat_kv(torch.randn(1, 2, 5, 8), 2), Repeated) is lazily


def test_what_is_expanded_otherwise_is_not_taken_for_repeats() -> None:
    with LeanAttention():
        wider = torch.randn(1, 2, 1, 1, 8).expand(1, 2, 3, 5, 8).reshape(1, 6, 5, 8)
        assert not isinstance(wider, Repeated)
        query, key = torch.randn(1, 1, 5, 8), repeat_kv(torch.randn(1, 2, 5, 8), 2)
        one_for_all = scaled_dot_product_attention(query, key, key)
    assert torch.equal(one_for_all, scaled_dot_product_attention(query, key, key))
