"""One mask of numbers for all layers: the same bits, kept once."""

from typing import Any

import pytest
import torch
from torch import Tensor

import templora
from templora import shared_mask
from templora.testing import ByteTokenizer, tiny_llama

CHUNK = 300


def learned(**changes: Any) -> tuple[Tensor, Tensor, int]:
    """NLL and gradient of a chunk after a context from the cache, and how many masks its pass keeps."""
    base = templora.load(
        model=tiny_llama(max_position_embeddings=2 * CHUNK, **changes), tokenizer=ByteTokenizer()
    )
    cached: dict[str, Any] = {"context_from": "cache", "dropout": 0.0}
    session = base.session("paper", seed=1, window=CHUNK, context=CHUNK, chunk=CHUNK, **cached)
    with torch.no_grad():
        session.adapter.flat.normal_(std=0.05, generator=torch.Generator().manual_seed(5))
    session.extend([7 * i % 250 for i in range(2 * CHUNK)], "")
    masks = set[int]()

    def keep(tensor: Tensor) -> Tensor:
        if tensor.shape[:3] == (1, 1, CHUNK) and tensor.shape[3] >= CHUNK and tensor.is_floating_point():
            masks.add(tensor.untyped_storage().data_ptr())
        return tensor

    with session.adapter.attached(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        nll = session.study.passes.nll(session.ids, session.plan.span(1), CHUNK)
    nll.mean().backward()
    return nll.detach(), session.adapter.gradient.clone(), len(masks)


@pytest.mark.parametrize("changes", [{}, {"num_attention_heads": 4, "num_key_value_heads": 2}])
def test_the_same_bits_and_one_mask(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    # Where the package's own attention pays no mask is kept at all.
    monkeypatch.setattr("templora.kernels.pays", lambda: False)
    nll, gradient, masks = learned(num_hidden_layers=3, **changes)
    monkeypatch.setattr(shared_mask, "FEWEST", 10_000)
    plain_nll, plain_gradient, plain_masks = learned(num_hidden_layers=3, **changes)
    assert torch.equal(nll, plain_nll)
    assert torch.equal(gradient, plain_gradient)
    assert gradient.abs().sum() > 0
    assert (masks, plain_masks) == (1, 3)
