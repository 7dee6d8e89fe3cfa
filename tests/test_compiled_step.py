"""A token compiled, against the model itself: the same logits up to rounding, and the same text."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import nn

import templora
from templora import compiled_step, step
from templora.base import Base
from templora.compiled_step import CompiledStep
from templora.session import Session
from templora.step import Step
from templora.testing import ByteTokenizer, tiny_llama
from tests.test_step import SHAPES, logits, runs_an_adapter

numba = pytest.importorskip("numba")
compiled = pytest.importorskip("templora.compiled")
CLOSE = 1e-5  # logits are about 1


def made_by(model: Any) -> CompiledStep:
    """The short cut, whatever this machine is."""
    exact = step.step_of(model)
    assert exact is not None
    return CompiledStep(exact)


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


def test_numba_runs_here_and_compiles_once_for_all() -> None:
    """Else the tests above and below would compare the usual way with itself."""
    assert compiled_step._compiled() is compiled  # pyright: ignore[reportPrivateUsage]
    model: Any = tiny_llama(**SHAPES["biases"])
    assert not torch.equal(logits(made_by(model), model), logits(model, model))
    for function in (compiled.block, compiled.head):
        assert len(function.signatures) == 1  # pyright: ignore[reportFunctionMemberAccess]


def test_a_gate_that_is_shut_lets_nothing_through() -> None:
    model: Any = tiny_llama()
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.gate_proj.weight.mul_(1e4)  # past what an exponential in fp32 can hold
    theirs = logits(model, model)
    assert torch.isfinite(theirs).all()
    assert torch.allclose(logits(made_by(model), model), theirs, rtol=1e-3, atol=1e-3)
    shut, open_ = np.float32([[-90, 0], [0, -1e20]]), np.float32([[1e38, 0], [0, 1e20]])
    x, y, none = np.ones(2, np.float32), np.zeros(2, np.float32), np.empty(0, np.float32)
    compiled.mlp(x, ((shut, none), (open_, none), (np.eye(2, dtype=np.float32), none)), y)
    assert not y.any()


def test_what_is_divided_by_zero_is_what_the_model_says() -> None:
    model: Any = tiny_llama(rms_norm_eps=0.0)
    run = made_by(model)
    with torch.no_grad():
        model.model.embed_tokens.weight.zero_()
    assert logits(run, model).isnan().all()
    assert logits(model, model).isnan().all()


def wide_head(model: Any) -> None:
    """More rows than the vocabulary has tokens: they are there to make it divisible."""
    model.lm_head = nn.Linear(32, 320)


def strided(model: Any) -> None:
    down = model.model.layers[1].mlp.down_proj
    down.weight = nn.Parameter(down.weight.T.contiguous().T)


def spread_bias(model: Any) -> None:
    model.lm_head = nn.Linear(32, 257)
    model.lm_head.bias = nn.Parameter(torch.ones(1))


@pytest.mark.parametrize("strange", [wide_head, strided, spread_bias])
@pytest.mark.parametrize("when", ["at load", "later"])
def test_layers_of_strange_shapes(strange: Any, when: str) -> None:
    """Loops that look nowhere where they read must not meet them."""
    model: Any = tiny_llama()
    if when == "at load":
        strange(model)
    run = made_by(model)
    strange(model)
    assert torch.allclose(logits(run, model), logits(model, model), atol=CLOSE)


def test_a_layer_that_does_not_fit_is_the_models_error() -> None:
    model: Any = tiny_llama()
    run = made_by(model)
    model.model.layers[1].mlp.down_proj = nn.Linear(8, 32)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        logits(run, model)


@pytest.mark.parametrize("place", ["attached", "decoding"])
def test_it_runs_the_layers_of_an_adapter(place: str) -> None:
    runs_an_adapter(made_by, place, within=CLOSE)


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
    mixed = tiny_llama()
    mixed.model.norm.bfloat16()
    for pays in (True, False):
        monkeypatch.setattr(compiled_step, "pays", lambda _, pays=pays: pays)
        taken = Base(tiny_llama(), None)._step  # pyright: ignore[reportPrivateUsage]
        assert type(taken) is (CompiledStep if pays else Step)
        assert type(compiled_step.step_of(half)) is Step
        assert type(compiled_step.step_of(mixed)) is Step


def test_threads_must_be_few_or_the_model_small(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    monkeypatch.setattr(compiled_step, "measured", lambda: True)
    for threads, small, pays in ((1, 0, True), (4, 0, True), (64, 0, False), (64, 1 << 24, True)):
        monkeypatch.setattr(compiled_step, "SMALL", small)
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert compiled_step.pays(model) is pays
    monkeypatch.setattr(compiled_step, "measured", lambda: False)
    assert not compiled_step.pays(model)


@pytest.fixture
def _anew() -> Iterator[None]:
    """numba is looked for anew, here and after."""
    compiled_step._compiled.cache_clear()  # pyright: ignore[reportPrivateUsage]
    yield
    compiled_step._compiled.cache_clear()  # pyright: ignore[reportPrivateUsage]


@pytest.mark.usefixtures("_anew")
@pytest.mark.parametrize("reason", ["not there", "not made for this numpy", "fails", "switched off"])
@pytest.mark.filterwarnings("ignore:numba does not run here")
def test_where_numba_does_not_run_it_gives_the_bits_of_the_model(
    reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = tiny_llama()
    match reason:
        case "switched off":
            monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)
        case "fails":
            monkeypatch.setattr(compiled, "_run", Mock(side_effect=TypeError("of some version")))
        case _:
            monkeypatch.setitem(sys.modules, "numba" if reason == "not there" else "templora.compiled", None)
            monkeypatch.delattr(templora, "compiled", raising=False)
    assert torch.equal(logits(made_by(model), model), logits(model, model))


def in_a_process(folder: Path | None) -> str:
    """What `norm` makes of three ones, where functions may be kept in that folder and nowhere else."""
    code = (
        "import numpy as np; from templora import compiled; compiled.ready(); x = np.ones(3, np.float32);"
        "y = 0 * x; compiled.norm(x, x, np.float32(0), y); print(y.sum())"
    )
    env = {**os.environ, "NUMBA_CACHE_LOCATOR_CLASSES": "UserProvidedCacheLocator"}
    env["NUMBA_CACHE_DIR"] = str(folder or "")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_runs_also_where_no_folder_can_keep_it() -> None:
    """Such as in a system's package, for a user without a home: compiled in each process."""
    assert in_a_process(None) == "3.0\n"


def test_what_was_kept_and_is_damaged_is_compiled_anew(tmp_path: Path) -> None:
    assert in_a_process(tmp_path) == "3.0\n"
    kept = list(tmp_path.rglob("compiled.block*.nb[ic]"))
    assert kept
    for file in kept:
        file.write_bytes(b"")
    assert in_a_process(tmp_path) == "3.0\n"
