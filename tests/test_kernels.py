"""The fast products and attention against torch's own: values, gradients, and what they must leave alone."""

import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import templora
from templora import half, kernels
from templora.causal_attention import BLOCK
from templora.events import ChunkScored
from templora.half import Halves
from templora.kernels import Fast
from templora.lora_linear import LoraLinear
from templora.products import product
from templora.testing import ByteTokenizer, tiny_llama

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
PROSE = "The tide came in twice that night, and twice the keeper rowed out to look for the boy. " * 6


def rows(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def compared(inputs: list[Tensor], compute: object, atol: float = 1e-5) -> None:
    """The value and every gradient must be the same with and without `Fast`."""
    made: list[list[Tensor]] = []
    for fast in (False, True):
        leaves = [x.clone().requires_grad_() for x in inputs]
        if fast:
            with Fast():
                y = compute(*leaves)  # type: ignore[operator]
        else:
            y = compute(*leaves)  # type: ignore[operator]
        made.append([y.detach(), *torch.autograd.grad(y.sin().sum(), leaves)])
    for slow, quick in zip(*made, strict=True):
        assert torch.allclose(slow, quick, atol=atol)


def test_a_fast_pass_in_one_thread_changes_nothing_in_another() -> None:
    with ThreadPoolExecutor(1) as other, Fast():
        assert kernels.is_fast()
        assert not other.submit(kernels.is_fast).result()
    assert not kernels.is_fast()


def test_a_product_is_the_same_in_any_layout() -> None:
    x, weight, wide = rows(40, 24), rows(16, 24), rows(40, 100)
    assert torch.allclose(product(x, weight), x @ weight.T, atol=1e-5)
    assert torch.allclose(product(x, rows(24, 16).T), x @ rows(24, 16), atol=1e-5)
    assert torch.allclose(product(x, weight, wide[:, :16]), wide[:, :16] + x @ weight.T, atol=1e-5)
    assert torch.allclose(product(x.T, wide[:, 7:90].T), x.T @ wide[:, 7:90], atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_is_the_same(bias: bool) -> None:
    weight, shift = rows(16, 24), rows(16) if bias else None
    compared([rows(2, 20, 24)], lambda x: functional.linear(x, weight, shift))


def test_a_weight_that_learns_gets_its_gradient() -> None:
    compared([rows(20, 24), rows(16, 24)], functional.linear)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("queries", [16, BLOCK, BLOCK + 1, 2 * BLOCK + 5])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention_over_a_whole_text_is_the_same(kv_heads: int, queries: int, scale: float | None) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=kv_heads < 4
        )

    shapes = [(1, heads, queries, 8) for heads in (4, kv_heads, kv_heads)]
    compared([rows(*shape) for shape in shapes], attend)


@pytest.mark.parametrize("queries", [16, BLOCK, BLOCK + 30])
def test_attention_over_a_cache_is_the_same_and_the_cache_gets_no_gradient(queries: int) -> None:
    old_keys, old_values = rows(1, 2, 50, 8), rows(1, 2, 50, 8).flip(2)
    mask = torch.ones(queries, 50 + queries, dtype=torch.bool).tril(50)[None, None]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = torch.cat((old_keys, k), dim=2), torch.cat((old_values, v), dim=2)
        return functional.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=True)

    compared([rows(1, 4, queries, 8), rows(1, 2, queries, 8), rows(1, 2, queries, 8)], attend)


@pytest.mark.parametrize("kind", ["sliding", "bidirectional", "additive", "none"])
def test_other_masks_are_left_to_torch(kind: str) -> None:
    causal = torch.ones(20, 20, dtype=torch.bool).tril()
    masks = {
        "sliding": causal.triu(-5),
        "bidirectional": torch.ones_like(causal),
        "additive": torch.zeros(20, 20),
        "none": None,
    }
    inputs, mask = [rows(1, 2, 20, 8) + i for i in range(3)], masks[kind]
    with Fast():
        functional.scaled_dot_product_attention(*inputs, attn_mask=causal)  # a causal one seen before
        fast = functional.scaled_dot_product_attention(*inputs, attn_mask=mask)
    assert torch.equal(fast, functional.scaled_dot_product_attention(*inputs, attn_mask=mask))


@pytest.mark.parametrize("recipe", ["default", "paper"])
@pytest.mark.parametrize("context_from", ["cache", "recompute"])
def test_a_text_is_scored_and_learned_as_without_them(
    recipe: str, context_from: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores: dict[bool, list[float]] = {}
    for fast in (False, True):
        monkeypatch.setattr(kernels, "pays", lambda fast=fast: fast)
        base = templora.load(model=tiny_llama(), tokenizer=ByteTokenizer())
        changes: dict[str, Any] = {
            "dropout": 0.0,
            "context_from": context_from,
            "learning_rate": 1e-3,
        }
        session = base.session(recipe, seed=3, window=48, context=48, chunk=32, **changes)
        events = session.reading(PROSE)
        scores[fast] = [event.adapted_nll for event in events if isinstance(event, ChunkScored)]
    assert len(scores[True]) > 10
    assert scores[True] == pytest.approx(scores[False], abs=1e-2)
    assert scores[True] != scores[False], "the fast kernels did not run"


@pytest.mark.parametrize("changes", [{"rank": 8, "alpha": 64}, {"dropout": 0.05}], ids=str)
def test_logits_that_are_made_again_are_made_by_the_same_kernels(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """More labels than a piece holds, and an output layer that learns with a scale of its own."""
    weights: dict[bool, Tensor] = {}
    for fast in (False, True):
        monkeypatch.setattr(kernels, "pays", lambda fast=fast: fast)
        model = tiny_llama(initializer_range=0.2, max_position_embeddings=512)
        base = templora.load(model=model, tokenizer=ByteTokenizer())
        sizes: dict[str, Any] = {"window": 200, "context": 200, "chunk": 200, "learning_rate": 1e-3}
        session = base.session(seed=3, guard=False, **sizes, **changes)
        session.read(PROSE[:420])
        weights[fast] = session.adapter.gradient.clone()
    assert float(weights[True].norm()) > 0
    apart = float((weights[True] - weights[False]).norm() / weights[False].norm())
    assert apart < 1e-2


def test_at_rate_zero_they_leave_the_base_and_the_adapter_the_same_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernels, "pays", lambda: True)
    base = templora.load(model=tiny_llama(), tokenizer=ByteTokenizer())
    session = base.session(seed=4, window=48, chunk=32, context=48, learning_rate=0.0)
    for event in session.reading(PROSE, score_base=True):
        assert isinstance(event, ChunkScored)
        assert event.adapted_nll == event.base_nll
    assert not kernels.is_fast()


@pytest.mark.parametrize("bias", [True, False])
def test_a_row_of_bf16_is_a_vector_and_the_same(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "as_vector", lambda: True)
    made: list[tuple[int, ...]] = []
    real = torch.mv
    monkeypatch.setattr(torch, "mv", lambda *pair: (made.append(pair[1].shape), real(*pair))[1])
    weight, shift = rows(16, 24).bfloat16(), rows(16).bfloat16() if bias else None
    for x in (rows(1, 1, 24), rows(1, 24), rows(24), rows(2, 24)):
        exact = functional.linear(x, weight.float(), shift.float() if shift is not None else None)
        with Fast(wide=False):
            y = functional.linear(x.bfloat16(), weight, shift)
        assert y.dtype == torch.bfloat16
        assert y.shape == exact.shape
        assert float((y.float() - exact).norm()) < 2**-6 * float(exact.norm())
    assert made == [(24,)] * 3, "two rows are a matrix"


@pytest.mark.parametrize("has", [True, False])
def test_a_base_of_bf16_writes_that_way_where_the_cpu_is_faster_so(
    has: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "as_vector", lambda: has)
    base = templora.load(model=tiny_llama().bfloat16(), tokenizer=ByteTokenizer())
    assert isinstance(base.fast(1), Fast) is has
    assert not isinstance(base.fast(2), Fast)
    session = base.session(window=48, context=48, chunk=32, seed=3)
    session.extend(base.encode(PROSE[:9]), PROSE[:9])
    span, found = session.plan.span(0), list[Tensor]()
    for one in (False, True):
        monkeypatch.setattr(kernels, "as_vector", lambda one=one: one)
        session.decoder.forget()
        for stop in (5, 6, 7):
            found.append(session.decoder.logits(session.ids[:stop], span))
    for usual, quick in zip(found[:3], found[3:], strict=True):
        assert torch.allclose(usual.float(), quick.float(), atol=0.02 * float(usual.float().abs().max()))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("count", [1, 2, 15])
def test_a_few_rows_have_the_same_product(count: int, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    real = kernels.product
    monkeypatch.setattr(kernels, "product", lambda x, *rest: (made.append(len(x)), real(x, *rest))[1])
    x, weight, shift = rows(1, count, 24), rows(16, 24), rows(16) if bias else None
    exact = functional.linear(x, weight, shift)
    assert torch.equal(kernels.rows_through(x[0], weight, shift), exact[0])
    assert not made
    with Fast(), torch.no_grad():
        assert torch.allclose(functional.linear(x, weight, shift), exact, atol=1e-5)
        assert torch.allclose(kernels.rows_through(x[0], weight, shift), exact[0], atol=1e-5)
    assert made == [count] * 2


@pytest.mark.parametrize("large", [True, False])
def test_tokens_of_a_base_of_large_layers_take_them(large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "pays", lambda: True)
    usual, found = list[Tensor](), list[Tensor]()
    for logits, least in ((usual, 1 << 30), (found, 1 if large else 1 << 30)):
        monkeypatch.setattr(kernels, "LARGE", least)
        base = templora.load(model=tiny_llama(), tokenizer=ByteTokenizer())
        assert isinstance(base.fast(1), Fast) is (least == 1)
        assert isinstance(base.fast(kernels.FEWEST), Fast)
        session = base.session(window=48, context=48, chunk=32, seed=3)
        session.extend(base.encode(PROSE[:39]), PROSE[:39])
        assert [*session.learning()]
        session.decoder.forget()
        span = session.plan.span(1)
        logits += [session.decoder.logits(session.ids[:stop], span) for stop in (36, 37, 38)]
    for one, other in zip(usual, found, strict=True):
        assert torch.allclose(one, other, atol=1e-4)


@pytest.mark.parametrize("wide", [True, False])
def test_a_layer_that_gets_no_token_gives_none(wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an expert to which none is sent."""
    monkeypatch.setattr(half, "SMALLEST", 1)
    model: Any = tiny_llama().requires_grad_(False)
    layer, halves = model.model.layers[0].mlp.up_proj, None if wide else Halves(model)
    out, width = layer.weight.shape
    side = LoraLinear(layer, torch.nn.Parameter(rows(8, width)), torch.nn.Parameter(rows(out, 8)), 1.0)
    x = torch.empty(0, width, requires_grad=True)
    with Fast(halves, wide=wide):
        assert (kernels.used(layer.weight) is layer.weight) is wide
        for y in (layer(x), side(x)):
            assert y.shape == (0, out)
            y.sum().backward()


def test_what_was_rounded_last_is_not_rounded_again() -> None:
    x = rows(4, 6)
    with Fast() as mode:
        once = kernels.rounded(x, torch.bfloat16)
        assert kernels.rounded(x, torch.bfloat16) is once
        assert torch.equal(once, x.bfloat16())
        for change in (lambda: x.add_(1), lambda: x[0].mul_(2), lambda: x.t_()):
            change()
            again = kernels.rounded(x, torch.bfloat16)
            assert again is not once
            assert torch.equal(again, x.bfloat16())
            once = again
        # A part of it begins at the same place.
        assert kernels.rounded(x[:2], torch.bfloat16).shape == (2, 4)
        assert kernels.rounded(x, torch.float16).dtype == torch.float16
    alive = weakref.ref(mode)
    del mode
    assert alive() is None, "a mode, and what it keeps, goes with its pass"
    assert torch.equal(kernels.rounded(x, torch.bfloat16), x.bfloat16())
