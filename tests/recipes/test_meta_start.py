"""A start that is learned through updates: what a text says of it makes that very text easier."""

import json
import lzma
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import templora
from templora.start import B_RATE, A, B
from templora.testing import ByteTokenizer, tiny_llama

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "recipes" / "pretrain" / "meta_start.py"
NOVELIST = ROOT / "src" / "templora" / "models" / "novelist"
SIZES = {A: 0.02, B: 5e-4, B_RATE: 0.1}
NONE = {B: torch.zeros_like, B_RATE: torch.ones_like}
BOOK = (ROOT / "LICENSE").read_text("utf-8")


@pytest.mark.slow
def test_a_step_along_what_a_text_says_makes_it_easier(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    from meta_start import read

    base = templora.load("novelist")
    ids = base.encode(BOOK)[:3072]
    begun, (said, nll, _) = dict(base.start), read(base, ids, "default")

    def after(size: float, kind: str) -> float:
        """NLL per token from a start that went against the gradient, by that share of what it is."""
        moved = {name: -size * gradient for name, gradient in said.items() if name.endswith(kind)}
        for name, step in moved.items():
            old = begun[name].float() if name in begun else NONE[kind](step)
            base.start[name] = (
                old * step.exp() if kind == B_RATE else old + (old.std() if kind == A else 1) * step
            )
        changed, _ = read(base, ids, "default")[1], base.start.update(begun)
        return changed

    for kind in SIZES:
        better, worse = after(SIZES[kind], kind), after(-SIZES[kind], kind)
        print(kind, better, nll, worse)
        assert better < nll < worse, kind


def test_an_update_does_not_speak_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """It always fits the chunk that it was made of; of updates along noise nothing must remain."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    from meta_start import Layer

    torch.manual_seed(0)
    session = templora.load(model=tiny_llama(), tokenizer=ByteTokenizer()).session(
        seed=0, window=32, chunk=16
    )
    site, own = session.adapter.sites[0], 0.0
    layer = Layer(site, None)
    for _ in range(400):
        layer.whole = torch.randn(len(site.b), site.a.shape[1])
        of_b = layer.whole @ site.a.detach().T
        with torch.no_grad():
            site.b.sub_(0.01 * of_b)
        own += 0.01 * float(of_b.square().sum())
        layer.learned(1.0, 1.0, torch.ones_like(site.b), counts=True)
    assert abs(float(layer.log_rate.sum())) < 0.3 * own


@pytest.mark.slow
def test_the_script_goes_on_from_a_start_and_writes_what_a_base_loads(tmp_path: Path) -> None:
    books = {"train": [BOOK, BOOK[::-1]], "dev": ["A text that must stay unseen."]}
    for part, texts in books.items():
        with lzma.open(tmp_path / f"novels.{part}.jsonl.xz", "wt", encoding="utf-8") as file:
            for text in texts:
                file.write(json.dumps({"title": text[:5], "text": text}) + "\n")
    out = tmp_path / "start.safetensors"
    words = [NOVELIST, "--data", tmp_path, "--texts", 2, "--tokens", 600, "--out", out]
    run = subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, words)], check=True, capture_output=True, text=True
    )
    assert [line.split()[0] for line in run.stdout.splitlines()[-2:]] == ["1/2", "2/2"]
    made, shipped = load_file(out), load_file(NOVELIST / "start.safetensors")
    layers = {name.removesuffix(A) for name in shipped if name.endswith(A)}
    assert made.keys() == {layer + kind for layer in layers for kind in (A, B, B_RATE)}
    for name, value in made.items():
        assert bool(value.isfinite().all()) and not (name in shipped and torch.equal(value, shipped[name]))
        assert float(value.min()) > 0 if name.endswith(B_RATE) else bool(value.any())
