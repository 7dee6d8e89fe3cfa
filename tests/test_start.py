"""Where a base's adapters begin, and at which rates: as its folder says, if recipe and folder do."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import templora
from templora.base import Base
from templora.errors import ModelNotFound, WrongBase
from templora.events import ChunkScored
from templora.testing import ByteTokenizer, tiny_llama

LAYER = "model.layers.1.mlp.down_proj"
ROWS, COLUMNS = f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight"
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
        {ROWS: rows.half(), "model.layers.1.mlp.up_proj.lora_A.weight": torch.ones(4, 7)},
        folder / "start.safetensors",
    )
    learned = begun(folder)
    assert torch.equal(learned[:4], rows.half().float())
    assert torch.equal(learned[4:], random[4:]), "more rows than it has stay random"
    more = rows.repeat(4, 1)
    save_file({ROWS: more}, folder / "start.safetensors")
    assert torch.equal(begun(folder), more[:8])
    assert torch.equal(begun(folder, start="random"), random)


def test_b_begins_there_too_for_any_scale_but_only_where_something_is_learned(folder: Path) -> None:
    base = templora.load(str(folder))
    ids, bare = list(range(7, 40)), base.session(seed=1, **SIZES)
    width = next(site.a.shape[1] for site in bare.adapter.sites if site.name == "down_proj")
    out = next(len(site.b) for site in bare.adapter.sites if site.name == "down_proj")
    torch.manual_seed(1)
    start = {ROWS: torch.randn(8, width) / 8, COLUMNS: torch.randn(out, 8) / 8}
    save_file(start, folder / "start.safetensors")

    def first(**changes: object) -> float:
        """NLL of the first chunk."""
        session = templora.load(str(folder)).session(seed=1, rank=8, **SIZES, **changes)
        session.extend(ids, "")
        (scored, *_) = (e for e in session.learning() if isinstance(e, ChunkScored))
        return scored.adapted_nll

    begun = first(alpha=8)
    assert begun == pytest.approx(first(alpha=32), rel=1e-5), "as for a scale of 1"
    nothing = first(alpha=8, start="random")
    assert abs(begun - nothing) > 1e-3
    assert first(alpha=8, learning_rate=0.0) == nothing, "where nothing is learned, it is the base"
    save_file({COLUMNS: start[COLUMNS]}, folder / "start.safetensors")
    assert first(alpha=8) == nothing, "B without its A"


def test_rows_of_b_learn_at_their_own_rates(folder: Path) -> None:
    def learned(**changes: object) -> torch.Tensor:
        """B of that layer after a chunk, [out, rank]."""
        wishes = {"magnitude_rate": 0.0, "layer_rate": 0.0, "guard": False, **SIZES, **changes}
        session = templora.load(str(folder)).session(seed=1, **wishes)
        session.read("The old captain looked at the sea.")
        (b,) = (site.b for site in session.adapter.sites if site.name == "down_proj")
        return b.detach().clone()

    plain = learned(epochs=1, chunk=24)
    rates = torch.linspace(0.0, 2.0, len(plain))
    save_file({f"{LAYER}.b_rate": rates}, folder / "start.safetensors")
    assert torch.allclose(learned(epochs=1, chunk=24), plain * rates[:, None], atol=1e-7)
    save_file({f"{LAYER}.b_rate": rates[1:]}, folder / "start.safetensors")
    assert torch.equal(learned(epochs=1, chunk=24), plain), "of another layer's size"


def test_a_session_is_not_continued_from_another_start(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "s"
    save_file({ROWS: torch.ones(4, 8)}, folder / "start.safetensors")
    with templora.load(str(folder)).session(dir=place, seed=1, **SIZES) as session:
        session.read("The old captain looked at the sea.")
    save_file({ROWS: torch.zeros(4, 8)}, folder / "start.safetensors")
    with pytest.raises(WrongBase, match="start"):
        templora.resume(place, templora.load(str(folder)))


def test_a_damaged_file_is_named_with_a_cure(folder: Path) -> None:
    (folder / "start.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ModelNotFound, match=r"start\.safetensors.*remove it"):
        templora.load(str(folder))
