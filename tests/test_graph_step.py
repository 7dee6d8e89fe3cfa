"""A token's pass of fixed shapes, as a CUDA graph wants it, against the model: here without a graph."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM

import templora
from templora import graph_step
from templora.base import Base
from templora.cache import WindowCache, on_top_of
from templora.cache_layers import WindowLayer
from templora.graph_step import GraphStep, piece_of, suits
from templora.session import Session
from templora.testing import ByteTokenizer, tiny_llama
from tests.architectures import ARCHITECTURES, MORE, Architecture
from tests.test_step import SHAPES, logits, runs_an_adapter

CLOSE = 1e-5  # logits are about 1
LONGER = {"n_positions": 128, "max_position_embeddings": 128}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
SUIT = [each for each in (*ARCHITECTURES, *MORE) if each.model_type in graph_step.KNOWN]
ATEN = torch.ops.aten
ASKS = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2")
WAITING = {getattr(ATEN, name).default for name in ASKS}


def made_by(model: Any) -> GraphStep:
    """The short cut, wherever the model is."""
    return GraphStep(model, records=False)


@pytest.mark.parametrize("architecture", SUIT, ids=str)
def test_it_gives_the_logits_of_the_model(architecture: Architecture) -> None:
    """Those with blocks that see a window of their own among them."""
    longer = {key: value for key, value in LONGER.items() if hasattr(architecture.config(), key)}
    model = architecture.build(**longer)
    assert suits(model)
    theirs = logits(model, model)
    assert torch.allclose(logits(made_by(model), model), theirs, atol=CLOSE * float(theirs.abs().max()))


def test_every_family_that_is_known_is_tried() -> None:
    assert {architecture.model_type for architecture in SUIT} == graph_step.KNOWN


class Own(LlamaForCausalLM):
    """Somebody's own model, which may do anything."""


def test_what_is_not_known_goes_the_usual_way() -> None:
    own: Any = tiny_llama()
    assert suits(own)
    own.__class__ = Own
    assert not suits(own)
    experts, watched, moving = (tiny_llama(**more) for more in ({}, {}, {"rope_parameters": DYNAMIC}))
    experts.config.model_type = "mixtral"
    watched.model.norm.register_forward_hook(lambda *_: None)
    flash = tiny_llama()
    flash.config._attn_implementation = "flash_attention_2"  # pyright: ignore[reportPrivateUsage]
    for model in (experts, watched, moving, flash):
        assert not suits(model)


class NoWaiting(TorchDispatchMode):
    """While it is entered nothing may ask the device for a number, or be copied from one to another."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        indices = args[1] if func is ATEN.index.Tensor or func is ATEN.index_put_.default else ()
        assert not any(each is not None and each.dtype == torch.bool for each in indices)
        assert func not in WAITING, func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("architecture", SUIT, ids=str)
@pytest.mark.parametrize("adapted", [False, True])
def test_nothing_waits_for_the_device(architecture: Architecture, adapted: bool) -> None:
    """As nothing may that is recorded; on a CPU that is seen by what torch runs."""
    model = architecture.build()
    step, cache = made_by(model), WindowCache(64)
    base = Base(model, None)
    session = base.session(seed=1, window=16, chunk=8, context=16)
    with torch.no_grad(), session.adapter.attached() if adapted else nullcontext():
        model(torch.arange(1, 20).unsqueeze(0), **on_top_of(model, cache))
        step(5, 19, cache)
        (text,) = step._texts.values()  # pyright: ignore[reportPrivateUsage]
        (made,) = text.passes.values()
        with NoWaiting():
            made.start()
    assert any("lora" in type(module).__name__.lower() for module in model.modules()) is False
    assert (
        any("Lora" in type(one).__name__ for each in text.stands.values() for one in each.modules) == adapted
    )


@pytest.mark.parametrize("ask", [int, torch.nonzero, lambda x: x[x > 0], lambda x: x.item()])
def test_waiting_is_seen(ask: Any) -> None:
    with pytest.raises(AssertionError), NoWaiting():
        ask(torch.ones(2)[:1])


def test_where_nothing_can_be_recorded_it_goes_on_with_the_same_bits() -> None:
    """As here, where there is no GPU."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    model = tiny_llama()
    step = GraphStep(model, records=True)
    with pytest.warns(UserWarning, match="a token cannot be recorded, so writing is slower: .+") as warned:
        made = logits(step, model)
    assert len(warned) == 1
    assert torch.equal(made, logits(made_by(model), model))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_gives_the_logits_of_a_llama(shape: str, dtype: torch.dtype) -> None:
    model: Any = tiny_llama(**SHAPES[shape]).to(dtype)  # pyright: ignore[reportArgumentType]
    within = CLOSE if dtype == torch.float32 else 0.02
    assert torch.allclose(logits(made_by(model), model), logits(model, model), atol=within)


@pytest.mark.parametrize("place", ["attached", "decoding"])
def test_it_runs_the_layers_of_an_adapter(place: str) -> None:
    runs_an_adapter(made_by, place, within=CLOSE)


def test_what_is_no_number_is_seen_only_where_it_is_visible() -> None:
    model = tiny_llama()
    run, inputs = made_by(model), torch.arange(1, 20).unsqueeze(0)
    for first, visible in ((8, False), (0, True)):
        made: list[torch.Tensor] = []
        for poisoned in (False, True):
            cache = WindowCache(64)
            with torch.no_grad():
                model(inputs, **on_top_of(model, cache))
                cache.forget_before(8)
                if poisoned:
                    for layer in cache.layers:
                        assert isinstance(layer, WindowLayer) and layer.keys is not None
                        layer.clean(float("nan"))
                        layer.first = first
                made.append(run(5, 19, cache))
        assert made[1].isnan().any() == visible
        assert visible or torch.equal(*made)


@pytest.mark.parametrize("capacity", [1, 7, 64, 1092, 4368])
def test_a_piece_holds_what_is_visible_and_little_more(capacity: int) -> None:
    layer, pieces = WindowLayer(capacity), set[tuple[int, int]]()
    for layer.stop in range(1, capacity + 1):
        layer.first = max(0, layer.stop - capacity // 3 - 1)
        piece = piece_of(layer)
        assert 0 <= piece.start <= layer.first < layer.stop <= piece.stop <= capacity
        assert (piece.stop - piece.start) - layer.length <= 2 * (capacity // graph_step.PIECES + 8)
        pieces.add((piece.start, piece.stop))
    assert len(pieces) <= 2 * graph_step.PIECES


def test_a_pass_is_made_once_for_a_piece_an_adapter_and_a_text() -> None:
    model = tiny_llama()
    run, caches = made_by(model), [WindowCache(128), WindowCache(128)]
    with torch.no_grad():
        for cache in caches:
            model(torch.arange(1, 20).unsqueeze(0), **on_top_of(model, cache))
            for layer in cache.layers:  # fresh memory may hold what is no number, and a pass is made again
                assert isinstance(layer, WindowLayer)
                layer.clean()
            run(5, 19, cache)
            run(6, 20, cache)
        texts = run._texts  # pyright: ignore[reportPrivateUsage]
        assert [[each.uses for each in texts[cache].passes.values()] for cache in caches] == [[2], [2]]
        head = model.lm_head
        model.lm_head = nn.Linear(32, 257)
        run(7, 21, caches[0])
        model.lm_head = head
        run(8, 22, caches[0])
        head.weight = nn.Parameter(head.weight.clone())  # the same layer, with its numbers elsewhere
        run(9, 23, caches[0])
    # What read the numbers where they were is gone, and holds them no more.
    assert [each.uses for each in texts[caches[0]].passes.values()] == [1, 1]
    del cache
    caches.clear()
    assert not texts


def written(run: Any, monkeypatch: pytest.MonkeyPatch, **more: Any) -> Session:
    """A session that has written a text with that short cut."""
    base: Base = templora.load(model=tiny_llama(initializer_range=0.2), tokenizer=ByteTokenizer())
    monkeypatch.setattr(base, "_step", run and run(base.model))
    session = base.session(seed=1, window=24, chunk=8, context=24, learning_rate=1e-3, **more)
    session.read("A short text to begin with, long enough to fill some chunks of it. " * 2)
    for _ in session.write(100):
        pass
    return session


@pytest.mark.parametrize("more", [{}, {"sinks": 0}, {"cache": "base"}, {"cache": "recompute"}], ids=str)
def test_a_text_is_written_as_without_it_and_goes_on_bit_for_bit(
    more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    session = written(made_by, monkeypatch, **more)
    assert session.ids == written(None, monkeypatch, **more).ids
    state = session.state()
    again = written(made_by, monkeypatch, **more)
    fresh = templora.load(model=tiny_llama(initializer_range=0.2), tokenizer=ByteTokenizer())
    monkeypatch.setattr(fresh, "_step", made_by(fresh.model))
    other = fresh.session(seed=1, window=24, chunk=8, context=24, learning_rate=1e-3, **more)
    for one in (session, again, other):
        if one is not session:
            one.load_state(state)
        assert list(one.write(40))[-1].tokens == 40  # pyright: ignore[reportAttributeAccessIssue]
        assert one.ids == session.ids
        assert torch.equal(one.adapter.flat, session.adapter.flat)


class Recorded:
    """In place of CUDA graphs: starts all of it again. empty: or nothing, as a graph of nothing would."""

    empty, made = False, 0

    def __init__(self, device: torch.device) -> None:
        assert device.type == "cpu"

    def of(self, start: Any) -> tuple[torch.Tensor, Any]:
        type(self).made += 1
        logits = start()
        return logits, (lambda: None) if self.empty else (lambda: logits.copy_(start()))


@pytest.mark.parametrize("empty", [False, True])
def test_what_was_recorded_is_looked_at_before_it_is_trusted(
    empty: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = type("Kind", (Recorded,), {"empty": empty})
    monkeypatch.setattr(graph_step, "Recording", kind)
    model = tiny_llama()
    step, plain = GraphStep(model, records=True), logits(made_by(model), model)
    with torch.no_grad():
        cache = WindowCache(128)  # nor where what is no number was there at first
        model(torch.arange(1, 20).unsqueeze(0), **on_top_of(model, cache))
        quiet = GraphStep(model, records=True)
        for position in range(19, 19 + graph_step.USES - 1):
            quiet(5, position, cache)
        for layer in cache.layers:
            assert isinstance(layer, WindowLayer)
            layer.clean(float("nan"))
        assert torch.isfinite(quiet(5, 19 + graph_step.USES - 1, cache)).all()
    kind.made = 0
    reason = "what was recorded computes something else"
    with pytest.warns(UserWarning, match=reason) if empty else nullcontext():
        assert torch.equal(logits(step, model), plain)
    assert kind.made == 1 if empty else kind.made > 4


def test_no_more_passes_are_kept_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_step, "MOST", 5)
    model = tiny_llama()
    step = made_by(model)
    texts = step._texts  # pyright: ignore[reportPrivateUsage]
    caches = [WindowCache(128), WindowCache(128)]
    with torch.no_grad():
        for cache, tokens in zip(caches, (40, 20), strict=True):
            model(torch.arange(1, 20).unsqueeze(0), **on_top_of(model, cache))
            for position in range(19, 19 + tokens):
                step(5, position, cache)
                assert sum(len(text.passes) for text in texts.values()) <= 5
    assert [len(texts[cache].passes) for cache in caches] == [2, 3]
