"""A token through numpy against the model itself: the same logits up to rounding, and the same text."""

from typing import Any

import pytest
import torch

import templora
from templora import array_step, step
from templora.array_step import ArrayStep
from templora.base import Base
from templora.session import Session
from templora.step import Step
from templora.testing import ByteTokenizer, tiny_llama
from tests.test_step import SHAPES, logits

CLOSE = 1e-5  # logits are about 1


def made_by(model: Any) -> ArrayStep:
    """The short cut, whatever this machine is."""
    exact = step.step_of(model)
    assert exact is not None
    return ArrayStep(exact)


@pytest.mark.parametrize("shape", SHAPES)
def test_it_gives_the_logits_of_the_model(shape: str) -> None:
    model: Any = tiny_llama(**SHAPES[shape])
    with torch.no_grad():
        for block in model.model.layers:  # so that a head looks at few tokens, and where they stand matters
            block.self_attn.q_proj.weight.mul_(30)
            block.self_attn.k_proj.weight.mul_(30)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    assert torch.allclose(logits(made_by(model), model), logits(model, model), atol=CLOSE)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_a_gate_that_is_shut_lets_nothing_through() -> None:
    model: Any = tiny_llama()
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.gate_proj.weight.mul_(1e4)  # past what an exponential in fp32 can hold
    theirs = logits(model, model)
    assert torch.isfinite(theirs).all()
    assert torch.allclose(logits(made_by(model), model), theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("place", ["attached", "decoding"])
def test_it_runs_the_layers_of_an_adapter(place: str) -> None:
    base = templora.load(model=tiny_llama(), tokenizer=ByteTokenizer())
    session = base.session(seed=1, window=32, chunk=16, context=32, first_block=0.0)
    with torch.no_grad():
        session.adapter.flat.normal_(std=0.05, generator=torch.Generator().manual_seed(5))
    session.adapter.updated()
    run = made_by(base.model)
    bare = logits(run, base.model)
    with getattr(session.adapter, place)():
        adapted = logits(run, base.model)
        assert torch.allclose(adapted, logits(base.model, base.model), atol=CLOSE)
        assert not torch.allclose(adapted, bare, atol=1e-3)
    assert torch.equal(logits(run, base.model), bare)


def written(run: Any, monkeypatch: pytest.MonkeyPatch) -> Session:
    """A session that has written a text with that short cut."""
    base = templora.load(model=tiny_llama(), tokenizer=ByteTokenizer())
    monkeypatch.setattr(base, "_step", run and run(base.model))
    session = base.session(seed=1, window=48, chunk=16, context=48, learning_rate=1e-3)
    session.read("A short text to begin with, long enough to fill some chunks of it. " * 2)
    for _ in session.write(100):
        pass
    return session


def test_a_text_is_written_as_without_it_and_goes_on_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    session = written(made_by, monkeypatch)
    assert session.ids == written(None, monkeypatch).ids
    again = written(made_by, monkeypatch)
    again.load_state(session.state())
    for one in (session, again):
        assert list(one.write(40))[-1].tokens == 40  # pyright: ignore[reportAttributeAccessIssue]
    assert again.ids == session.ids
    assert torch.equal(again.adapter.flat, session.adapter.flat)


def test_it_is_taken_for_fp32_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    half: Any = tiny_llama()
    half = half.to(torch.bfloat16)
    for pays in (True, False):
        monkeypatch.setattr(array_step, "pays", lambda pays=pays: pays)
        taken = Base(tiny_llama(), None)._step  # pyright: ignore[reportPrivateUsage]
        assert type(taken) is (ArrayStep if pays else Step)
        assert type(array_step.step_of(half)) is Step


def test_numpys_threads_must_be_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(array_step.kernels, "is_wide", lambda: True)
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    for threads, pays in (("1", True), ("4", True), ("64", False)):
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        assert array_step.pays() is pays
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "2")
    assert array_step.pays()
