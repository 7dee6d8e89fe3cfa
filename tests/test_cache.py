"""The window's cache against transformers' own, which copies and grows, on a tiny Llama."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache

from templora.cache import WindowCache, on_top_of
from templora.testing import tiny_llama

MODEL = tiny_llama(initializer_range=0.2).requires_grad_(False)
IDS = [(37 * i + 11) % 250 for i in range(60)]


def run(cache: Cache, ids: Sequence[int], position: int) -> Tensor:
    """Logits of these tokens on top of the cache, [tokens, vocab]."""
    positions = torch.arange(position, position + len(ids)).unsqueeze(0)
    return MODEL(torch.tensor([ids]), position_ids=positions, **on_top_of(MODEL, cache)).logits[0]


def layers(cache: Cache) -> list[Any]:
    """Its blocks, each with `keys` and `values` of shape [1, heads, tokens, head_dim]."""
    return list(cache.layers)


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, atol=1e-5)


def filled(tokens: int, capacity: int = 60, origin: int = 0) -> WindowCache:
    """A cache that holds the tokens from `origin` on."""
    cache = WindowCache(capacity)
    cache.restart(origin)
    run(cache, IDS[origin : origin + tokens], 0)
    return cache


def seeing(dynamic: DynamicCache, tokens: list[int]) -> DynamicCache:
    """A copy that holds those tokens alone."""
    seen = DynamicCache()
    for index, layer in enumerate(layers(dynamic)):
        seen.update(layer.keys[:, :, tokens], layer.values[:, :, tokens], index)
    return seen


def add(dynamic: DynamicCache, seen: DynamicCache, tokens: int) -> None:
    """Append the last keys and values of `seen`."""
    for index, layer in enumerate(layers(seen)):
        dynamic.update(layer.keys[:, :, -tokens:], layer.values[:, :, -tokens:], index)


@settings(max_examples=25)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=5))
@torch.no_grad()
def test_the_logits_are_those_of_a_dynamic_cache_however_the_text_is_cut(cuts: list[int]) -> None:
    window, dynamic, position = WindowCache(60), DynamicCache(), 0
    for tokens in cuts:
        piece = IDS[position : position + tokens]
        assert close(run(window, piece, position), run(dynamic, piece, position))
        position += tokens
    assert (window.first, window.stop) == (0, position)
    assert window.get_seq_length() == dynamic.get_seq_length() == position


@settings(max_examples=25)
@given(hidden=st.integers(0, 20), more=st.integers(1, 8))
@torch.no_grad()
def test_a_forgotten_token_is_not_attended_to(hidden: int, more: int) -> None:
    cache = filled(20)
    cache.forget_before(hidden)
    assert (cache.first, cache.stop) == (hidden, 20)
    dynamic = DynamicCache()
    run(dynamic, IDS[:20], 0)
    for layer in layers(dynamic):
        layer.keys, layer.values = layer.keys[:, :, hidden:], layer.values[:, :, hidden:]
    assert close(run(cache, IDS[20 : 20 + more], 20), run(dynamic, IDS[20 : 20 + more], 20))


@settings(max_examples=50)
@given(
    sinks=st.integers(1, 5),
    cuts=st.lists(st.tuples(st.integers(0, 20), st.integers(1, 8)), min_size=1, max_size=3),
    context=st.integers(1, 20),
    more=st.integers(1, 8),
)
@torch.no_grad()
def test_sinks_stay_visible_at_the_positions_that_they_were_made_at(
    sinks: int, cuts: list[tuple[int, int]], context: int, more: int
) -> None:
    cache, dynamic = WindowCache(60, sinks), DynamicCache()
    run(cache, IDS[:20], 0)
    run(dynamic, IDS[:20], 0)
    stop = hidden = 20
    for back, tokens in cuts:
        hidden = max(hidden if stop > 20 else 0, stop - back)
        cache.forget_before(hidden)
        assert (cache.first, cache.stop) == (hidden if hidden > sinks else 0, stop)
        seen = seeing(dynamic, [*range(min(sinks, hidden)), *range(hidden, stop)])
        assert close(run(cache, IDS[stop : stop + tokens], stop), run(seen, IDS[stop : stop + tokens], stop))
        add(dynamic, seen, tokens)
        stop += tokens
    first = max(hidden, stop - context)
    seen = seeing(dynamic, [*range(min(sinks, first)), *range(first, stop)])
    ids = IDS[stop - 5 : stop - 5 + more]
    assert close(run(cache.prefix(max(cache.first, first), stop), ids, stop), run(seen, ids, stop))


@settings(max_examples=25)
@given(sinks=st.integers(0, 5), visible=st.integers(0, 20), tokens=st.integers(1, 20))
@torch.no_grad()
def test_a_window_that_is_made_again_has_its_sinks_before_it(sinks: int, visible: int, tokens: int) -> None:
    cache = WindowCache(60, sinks)
    cache.restart(visible)
    missing = [token for part in cache.missing(visible + tokens) for token in range(60)[part]]
    assert missing == [*range(min(sinks, visible)), *range(visible, visible + tokens)]
    run(cache, [IDS[token] for token in missing], cache.stop - cache.origin)
    assert (cache.first, cache.stop) == (visible if visible > sinks else 0, visible + tokens)
    assert cache.missing(visible + tokens + 3) == [slice(visible + tokens, visible + tokens + 3)]


@settings(max_examples=25)
@given(kept=st.integers(0, 20), more=st.integers(1, 8))
@torch.no_grad()
def test_a_cropped_cache_is_as_if_the_rest_had_never_run(kept: int, more: int) -> None:
    cache, fresh = filled(20), WindowCache(60)
    cache.crop(kept)
    assert (cache.first, cache.stop) == (0, kept)
    if kept:
        run(fresh, IDS[:kept], 0)
    other = [(t + 1) % 250 for t in IDS[kept : kept + more]]
    assert close(run(cache, other, kept), run(fresh, other, kept))


@torch.no_grad()
def test_forgetting_and_cropping_know_their_limits() -> None:
    cache = filled(20)
    cache.forget_before(5)
    cache.forget_before(3)
    assert cache.first == 5, "what is forgotten does not come back"
    cache.crop(30)
    assert cache.stop == 20, "a crop does not add tokens"
    cache.crop(2)
    assert (cache.first, cache.stop) == (5, 5)
    cache.forget_before(9)
    assert (cache.first, cache.stop) == (5, 5)


@torch.no_grad()
def test_indices_are_those_of_the_text_and_positions_start_at_the_origin() -> None:
    cache = filled(20, origin=7)
    assert (cache.first, cache.stop) == (7, 27)
    again = WindowCache(60)
    assert close(run(cache, IDS[27:30], 20), run(again, IDS[7:30], 0)[-3:])
    cache.restart(40)
    assert (cache.origin, cache.first, cache.stop) == (40, 40, 40)
    assert close(run(cache, IDS[40:50], 0), run(WindowCache(60), IDS[40:50], 0))


@torch.no_grad()
def test_the_buffers_are_allocated_once() -> None:
    cache = filled(10, capacity=24)
    before = [layer.keys.data_ptr() for layer in layers(cache)]
    run(cache, IDS[10:20], 10)
    cache.restart(30)
    run(cache, IDS[30:54], 0)
    assert [layer.keys.data_ptr() for layer in layers(cache)] == before
    assert [layer.keys.shape[2] for layer in layers(cache)] == [24, 24]


@torch.no_grad()
def test_more_than_the_capacity_is_a_mistake_of_the_plan() -> None:
    cache = filled(10, capacity=10)
    with pytest.raises(AssertionError, match="outgrow"):
        run(cache, IDS[10:11], 10)


@settings(max_examples=25)
@given(cut=st.tuples(st.integers(0, 20), st.integers(0, 20)).map(sorted), more=st.integers(1, 8))
@torch.no_grad()
def test_a_prefix_is_a_frozen_view_of_part_of_the_cache(cut: list[int], more: int) -> None:
    first, stop = cut
    cache = filled(20)
    keys = [layer.keys[:, :, :20].clone() for layer in layers(cache)]
    ids = IDS[stop : stop + more]
    logits = run(cache.prefix(first, stop), ids, stop)
    assert (cache.first, cache.stop) == (0, 20)
    now = [layer.keys[:, :, :20] for layer in layers(cache)]
    assert all(torch.equal(a, b) for a, b in zip(keys, now, strict=True))
    cache.crop(stop)
    cache.forget_before(first)
    assert close(logits, run(cache, ids, stop))


@torch.no_grad()
def test_what_a_pass_over_a_prefix_made_can_be_appended() -> None:
    cache, plain = filled(12), filled(20)
    prefix = cache.prefix(0, 12)
    run(prefix, IDS[12:20], 12)
    cache.extend(prefix)
    assert (cache.first, cache.stop) == (0, 20)
    assert close(run(cache, IDS[20:25], 20), run(plain, IDS[20:25], 20))


def test_gradients_flow_through_new_keys_and_not_into_the_prefix() -> None:
    cache = filled(12)
    embedded = MODEL.model.embed_tokens(torch.tensor([IDS[12:20]])).detach().requires_grad_()
    prefix = cache.prefix(0, 12)
    MODEL(inputs_embeds=embedded, **on_top_of(MODEL, prefix)).logits[0, -1].sum().backward()
    assert embedded.grad is not None
    # The first new token reaches the last output only through its keys and values.
    assert embedded.grad[0, 0].abs().sum() > 0
    cache.extend(prefix)
    assert not any(layer.keys.requires_grad for layer in layers(cache))


@torch.no_grad()
def test_one_cache_serves_two_texts_without_a_trace_of_the_first() -> None:
    cache = filled(20)
    cache.forget_before(13)
    cache.restart(0)
    other = [(5 * i + 3) % 250 for i in range(15)]
    assert close(run(cache, other, 0), run(WindowCache(60), other, 0))
