"""On a GPU: the same numbers as on the CPU, the same text again, the same base afterwards."""

from pathlib import Path
from typing import Any

import pytest
import torch

import templora
from templora import graph_step
from templora.base import Base
from templora.cache import WindowCache, on_top_of
from templora.sampling import Sampling
from templora.tasks.batch import score_batch
from templora.tasks.score import score
from templora.testing import ByteTokenizer, tiny_llama

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
TEXT = (Path(__file__).parent.parent / "LICENSE").read_text("utf-8")
SIZES: dict[str, Any] = {"window": 64, "chunk": 16, "context": 64}
GREEDY = Sampling(temperature=0.0, repetition_penalty=None, top_p=None, dry_multiplier=None)
RECIPES = pytest.mark.parametrize("recipe", ["default", "paper"])


def base_on(device: str, dtype: torch.dtype = torch.float32) -> Base:
    """The same tiny base, there."""
    return templora.load(model=tiny_llama(initializer_range=0.2).to(device, dtype), tokenizer=ByteTokenizer())


def text_of(base: Base, tokens: int = 80, **more: Any) -> str:
    """What it writes after the same words, with the same seed."""
    session = base.session("default", seed=3, **(SIZES | more))
    session.read(TEXT[:400])
    for _ in session.write(tokens):
        pass
    return session.text


@RECIPES
def test_a_text_scores_as_on_the_cpu(recipe: str) -> None:
    gpu, cpu = (
        score(base_on(device), TEXT[:1500], recipe, seed=1, **SIZES).chunks for device in ("cuda", "cpu")
    )
    assert [c["start"] for c in gpu] == [c["start"] for c in cpu]
    for key in ("adapted_nll", "base_nll"):
        assert [c[key] for c in gpu] == pytest.approx([c[key] for c in cpu], rel=1e-3)


def test_the_embedded_base_learns_there_too() -> None:
    gpu, cpu = (
        score(templora.load("novelist", device=device), TEXT[:6000], seed=1, window=256, context=256)
        for device in ("cuda", "cpu")
    )
    assert gpu.adapted.nll == pytest.approx(cpu.adapted.nll, rel=1e-3)
    assert gpu.adapted.perplexity < gpu.base.perplexity


@pytest.mark.parametrize("kind", [{}, {"cache": "recompute"}, {"dropout": 0.1}, {"parallel": True}], ids=str)
def test_the_same_seed_writes_the_same_text(kind: dict[str, Any]) -> None:
    assert text_of(base_on("cuda"), **kind) == text_of(base_on("cuda"), **kind)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_is_recorded_and_gives_the_logits_of_the_model(dtype: torch.dtype) -> None:
    model: Any = tiny_llama(initializer_range=0.2).to("cuda", dtype)
    step = graph_step.step_of(model)
    assert step is not None
    cache, other = WindowCache(128), WindowCache(128)
    with torch.no_grad():
        for each in (cache, other):
            model(torch.arange(1, 20, device="cuda").unsqueeze(0), **on_top_of(model, each))
        for position in range(19, 100):
            token = 7 * position % 250
            if position == 60:
                cache.forget_before(30)
                other.forget_before(30)
            theirs = graph_step.usual(model, token, position, other)
            within = 1e-4 if dtype == torch.float32 else 0.05
            assert torch.allclose(
                step(token, position, cache), theirs, atol=within * float(theirs.abs().max())
            )
    assert any(made.replay for made in step._texts[cache].passes.values())  # pyright: ignore[reportPrivateUsage]


def test_what_is_recorded_gives_the_bits_that_it_gave_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a text does not depend on whether it was resumed in between."""
    recorded = text_of(base_on("cuda"), 200)
    monkeypatch.setattr(graph_step, "USES", 1 << 30)
    assert text_of(base_on("cuda"), 200) == recorded


def test_the_base_stays_as_it_was() -> None:
    base = base_on("cuda")
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    text_of(base)
    after = base.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_session_goes_on_from_its_folder(tmp_path: Path) -> None:
    whole = text_of(base_on("cuda"), 80)
    with base_on("cuda").session("default", seed=3, dir=tmp_path / "s", **SIZES) as session:
        session.read(TEXT[:400])
        for _ in session.write(37):
            pass
    with templora.resume(tmp_path / "s", base_on("cuda")) as again:
        for _ in again.write(43):
            pass
        assert again.text == whole


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_in_half_precision_learns(dtype: torch.dtype) -> None:
    found = score(base_on("cuda", dtype), TEXT[:3000], seed=1, **SIZES)
    assert found.adapted.nll < found.base.nll


def test_several_texts_at_once_score_as_alone() -> None:
    texts = [TEXT[:500], TEXT[600:900], TEXT[1000:1100]]
    for together, text in zip(score_batch(base_on("cuda"), texts, seed=1, **SIZES), texts, strict=True):
        alone = score(base_on("cuda"), text, seed=1, **SIZES)
        assert together.adapted.nll == pytest.approx(alone.adapted.nll, rel=1e-3)
