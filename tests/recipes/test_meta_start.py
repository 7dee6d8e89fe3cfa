"""A start that is learned through updates: what a text says of it makes that very text easier."""

import json
import lzma
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import templora
from templora.start import RMS_A, RMS_B, A, B
from templora.testing import ByteTokenizer, tiny_llama

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "recipes" / "pretrain" / "meta_start.py"
NOVELIST = ROOT / "src" / "templora" / "models" / "novelist"
SIZES = {A: 0.02, B: 5e-4, RMS_A: 0.1, RMS_B: 0.1}
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
        for name, old in begun.items():
            if name.endswith(kind):
                step = -size * said[name]
                is_log = kind in (RMS_A, RMS_B)
                moved = old.float() * step.exp() if is_log else old + (old.std() if kind == A else 1) * step
                base.start[name] = moved
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
    layer = Layer(site, torch.ones_like(site.b))
    for _ in range(400):
        layer.whole = torch.randn(len(site.b), site.a.shape[1])
        of_b = layer.whole @ site.a.detach().T
        with torch.no_grad():
            site.b.sub_(0.01 * of_b)
        own += 0.01 * float(of_b.square().sum())
        layer.learned(1.0, 1.0)
    assert abs(float(layer.found[RMS_B].sum())) < 0.3 * own


@pytest.mark.slow
def test_the_script_goes_on_from_a_start_and_writes_what_a_base_loads(tmp_path: Path) -> None:
    books = {"train": [BOOK, BOOK[::-1]], "dev": ["A text that must stay unseen."]}
    for part, texts in books.items():
        with lzma.open(tmp_path / f"novels.{part}.jsonl.xz", "wt", encoding="utf-8") as file:
            for text in texts:
                file.write(json.dumps({"title": text[:5], "text": text}) + "\n")
    shipped = load_file(NOVELIST / "start.safetensors")
    model = shutil.copytree(NOVELIST, tmp_path / "novelist")
    # What start.py writes: what Adam divides by is to be found first.
    save_file({name: rows for name, rows in shipped.items() if name.endswith(A)}, model / "start.safetensors")
    out = tmp_path / "start.safetensors"
    texts = ["--texts", 4, "--texts-a-step", 2, "--tokens", 600]
    words = [model, "--data", tmp_path, *texts, "--hold-out", 1, "--out", out]
    run = subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, words)], check=True, capture_output=True, text=True
    )
    assert [line.split()[0] for line in run.stdout.splitlines()[-2:]] == ["1/2", "2/2"]
    made = load_file(out)
    layers = {name.removesuffix(A) for name in shipped if name.endswith(A)}
    assert made.keys() == {layer + kind for layer in layers for kind in (A, B, RMS_A, RMS_B)}
    for name, value in made.items():
        assert bool(value.isfinite().all()) and bool(value.any()), name
        assert float(value.min()) > 0 or name.endswith((A, B))
    shutil.copy(out, model / "start.safetensors")
    assert templora.load(str(model)).session(seed=0).adapter.squares is not None


@pytest.mark.slow
def test_what_adam_divides_by_comes_from_other_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers that are loud in every text are told from those that are not, less than they differ."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    from squares import FLATTER, expected
    from team import Team

    base = templora.load("novelist")
    base.start = {name: rows for name, rows in base.start.items() if name.endswith(A)}
    ids = base.encode(BOOK)[:640]
    found = expected(base, [ids, ids], "default", Team())
    session = base.session("default", seed=0, window=256, context=256)
    session.extend(ids, "")
    for _ in session.learning():
        pass
    state = session.learner.optimizer.state[session.adapter.b]
    square = state["exp_avg_sq"] / (1 - session.recipe.beta2 ** float(state["step"]))
    plain = square.clamp_min(1e-20).log() / 2
    of_b = torch.cat([rms.flatten() for name, rms in found.items() if name.endswith(RMS_B)]).log()
    assert float(of_b.std()) == pytest.approx(FLATTER * float(plain.std()), rel=1e-3)
    assert float(of_b.mean()) == pytest.approx(float(plain.mean()), rel=1e-3)
