"""A learned start: it finds what books differ in, and a base's sessions begin there."""

import json
import lzma
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "recipes" / "pretrain" / "start.py"
NOVELIST = ROOT / "src" / "templora" / "models" / "novelist"
PAGE = "The old captain looked at the grey sea and said nothing to his young friend {}. "


def test_it_finds_the_direction_in_which_books_differ_under_louder_noise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    from start import Moments

    torch.manual_seed(0)
    width, loud = 12, torch.tensor([20.0] * 6 + [1.0] * 6)
    direction = torch.zeros(width)
    direction[[7, 9]] = 0.5**0.5
    moments = Moments(width)
    for _ in range(40):
        about = torch.randn(5, 1) * direction  # what this book is about
        for _ in range(30):
            moments.add(about + loud * torch.randn(5, width))
        moments.end_book()
    rows = moments.directions(3).float()
    best = rows[0] / rows[0].norm()
    assert abs(float(best @ direction)) > 0.95
    noise = ((rows @ moments.noise.float()) * rows).sum(1)
    assert noise.tolist() == pytest.approx([float(moments.noise.trace()) / (3 * width)] * 3, rel=0.15)


@pytest.mark.slow
def test_the_script_writes_what_a_base_loads(tmp_path: Path) -> None:
    books = {title: "".join(PAGE.format(title * (n % 7)) for n in range(60)) for title in "abc"}
    dev = {"d": " ".join(f"word{n} of a book that must stay unseen" for n in range(400))}
    for part, texts in (("train", books | dev), ("dev", dev)):
        with lzma.open(tmp_path / f"novels.{part}.jsonl.xz", "wt", encoding="utf-8") as file:
            for title, text in texts.items():
                file.write(json.dumps({"title": title, "text": text}) + "\n")
    out = tmp_path / "start.safetensors"
    sizes = ["--books", "3", "--chunks", "3", "--rows", "8", "--hold-out", "1"]
    words = [NOVELIST, "--data", tmp_path, *sizes, "--out", out]
    command = [sys.executable, str(SCRIPT), *map(str, words)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "overlap dropped" in printed and "3/3 c" in printed and " d\n" not in printed.split("1/3")[1]
    made, shipped = load_file(out), load_file(NOVELIST / "start.safetensors")
    assert made.keys() == {name for name in shipped if name.endswith(".lora_A.weight")}
    assert {tuple(rows.shape) for rows in made.values()} == {(8, 320), (8, 832)}
    assert all(bool(rows.isfinite().all()) for rows in [*made.values(), *shipped.values()])
