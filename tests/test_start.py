"""Where a base's adapters begin: at rows of A from its folder, if recipe and folder have them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import templora
from templora.base import Base
from templora.errors import ModelNotFound, WrongBase
from templora.testing import ByteTokenizer, tiny_llama

LAYER = "model.layers.1.mlp.down_proj"
SIZES = {"window": 32, "context": 32, "chunk": 16}


@pytest.fixture
def base() -> Base:
    return templora.load(model=tiny_llama(), tokenizer=ByteTokenizer())


def begun(folder: Path, **changes: object) -> torch.Tensor:
    """A of that layer in a new session, [rank, in]."""
    session = templora.load(str(folder)).session(seed=1, rank=8, alpha=8, **SIZES, **changes)
    (a,) = (site.a for site in session.adapter.sites if site.name == "down_proj")
    return a.detach().clone()


def test_a_recipe_that_wants_it_begins_there_and_others_do_not(folder: Path) -> None:
    random = begun(folder)
    rows = torch.arange(4.0 * random.shape[1]).reshape(4, -1) / 100  # fewer than its rank
    save_file(
        {LAYER: rows.half(), "model.layers.1.mlp.up_proj": torch.ones(4, 7)}, folder / "start.safetensors"
    )
    learned = begun(folder)
    assert torch.equal(learned[:4], rows.half().float())
    assert torch.equal(learned[4:], random[4:]), "more rows than it has stay random"
    more = rows.repeat(4, 1)
    save_file({LAYER: more}, folder / "start.safetensors")
    assert torch.equal(begun(folder), more[:8])
    assert torch.equal(begun(folder, start="random"), random)


def test_a_session_is_not_continued_from_another_start(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "s"
    save_file({LAYER: torch.ones(4, 8)}, folder / "start.safetensors")
    with templora.load(str(folder)).session(dir=place, seed=1, **SIZES) as session:
        session.read("The old captain looked at the sea.")
    save_file({LAYER: torch.zeros(4, 8)}, folder / "start.safetensors")
    with pytest.raises(WrongBase, match="start"):
        templora.resume(place, templora.load(str(folder)))


def test_a_damaged_file_is_named_with_a_cure(folder: Path) -> None:
    (folder / "start.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ModelNotFound, match=r"start\.safetensors.*remove it"):
        templora.load(str(folder))
