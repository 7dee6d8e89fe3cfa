"""The short cut for one token against the model itself: the same bits, whatever stands in its places."""

from typing import Any

import pytest
import torch

import templora
from templora.base import Base
from templora.cache import WindowCache, on_top_of
from templora.step import Step, step_of
from templora.testing import ByteTokenizer, tiny_llama

SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped heads": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "scaled rotation": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
}


def logits(run: Any, model: Any) -> torch.Tensor:
    """After each token of a text whose oldest tokens go out of sight on the way, [tokens, vocab].

    run: a short cut for that model, or the model itself.
    """
    cache, made = WindowCache(128), list[torch.Tensor]()
    with torch.no_grad():
        model(torch.arange(1, 70).unsqueeze(0), **on_top_of(model, cache))
        for position in range(69, 120):
            token = 7 * position % 250
            if position == 90:
                cache.forget_before(30)
            if run is not model:
                made.append(run(token, position, cache))
            else:
                inputs: dict[str, Any] = {"position_ids": torch.tensor([[position]])}
                made.append(run(torch.tensor([[token]]), **on_top_of(model, cache), **inputs).logits[0, 0])
    return torch.stack(made)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_gives_the_bits_of_the_model(shape: str, dtype: torch.dtype) -> None:
    model: Any = tiny_llama(**SHAPES[shape])
    model = model.to(dtype)
    step = step_of(model)
    assert step is not None
    assert torch.equal(logits(step, model), logits(model, model))


def runs_an_adapter(made_by: Any, place: str, within: float) -> None:
    """See that a short cut runs an adapter's layers while these stand there, as the model does."""
    base = templora.load(model=tiny_llama(), tokenizer=ByteTokenizer())
    session = base.session(seed=1, window=32, chunk=16, context=32, first_block=0.0)
    with torch.no_grad():
        session.adapter.flat.normal_(std=0.05, generator=torch.Generator().manual_seed(5))
    session.adapter.updated()
    run = made_by(base.model)
    bare = logits(run, base.model)
    with getattr(session.adapter, place)():
        adapted = logits(run, base.model)
        assert torch.allclose(adapted, logits(base.model, base.model), rtol=0, atol=within)
        assert not torch.allclose(adapted, bare, atol=1e-3)
    assert torch.equal(logits(run, base.model), bare)


@pytest.mark.parametrize("place", ["attached", "decoding"])
def test_it_runs_the_layers_of_an_adapter(place: str) -> None:
    runs_an_adapter(Step, place, within=0)


def test_a_text_is_written_as_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    texts: list[list[int]] = []
    calls = 0
    for short in (True, False):
        base = templora.load(model=tiny_llama(), tokenizer=ByteTokenizer())
        assert base._step is not None  # pyright: ignore[reportPrivateUsage]
        if short:
            run = base._step  # pyright: ignore[reportPrivateUsage]

            def counted(*args: Any, run: Any = run) -> torch.Tensor:
                nonlocal calls
                calls += 1
                return run(*args)

            monkeypatch.setattr(base, "_step", counted)
        else:
            monkeypatch.setattr(base, "_step", None)
        session = base.session(seed=1, window=48, chunk=16, context=48, learning_rate=1e-3)
        session.read("A short text to begin with, long enough to fill some chunks of it. " * 2)
        for _ in session.write(100):
            pass
        texts.append(session.ids)
    assert texts[0] == texts[1]
    assert calls > 80


def test_a_model_that_is_watched_or_of_another_kind_has_none() -> None:
    assert Base(tiny_llama(), None)._step is not None  # pyright: ignore[reportPrivateUsage]
    assert isinstance(step_of(tiny_llama()), Step)
    watched: Any = tiny_llama()
    watched.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    assert step_of(watched) is None
    other: Any = tiny_llama()
    other.model.layers[1].mlp = torch.nn.Sequential(torch.nn.Linear(64, 64))
    assert step_of(other) is None
    assert step_of(tiny_llama(hidden_act="gelu")) is None
    eager = tiny_llama()
    eager.set_attn_implementation("eager")
    assert step_of(eager) is None
    wrong: Any = tiny_llama()
    wrong.model.norm.forward = lambda x: x
    assert step_of(wrong) is None
