"""Where a base's adapters begin, and by what Adam divides: as its folder says, if recipe and folder do."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import templora
from templora.errors import ModelNotFound, WrongBase
from templora.events import ChunkScored
from templora.injection import PEFT_PREFIX, named
from templora.start import RMS_A, RMS_B, A

LAYER = "model.layers.1.mlp.down_proj"
ROWS, COLUMNS = f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight"
SIZES = {"window": 32, "context": 32, "chunk": 16}


def begun(folder: Path, **changes: object) -> torch.Tensor:
    """A of that layer in a new session, [rank, in]."""
    session = templora.load(str(folder)).session(seed=1, rank=8, alpha=8, **SIZES, **changes)
    *_, last = (site.a for site in session.adapter.sites if site.name == "down_proj")
    return last.detach().clone()


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


def test_what_adam_divides_by_is_known_from_the_start(folder: Path) -> None:
    wishes = {"magnitude_rate": 0.0, "layer_rate": 0.0, "guard": False, "epochs": 1, "clip": None, **SIZES}
    wishes["chunk"] = 24  # of which the text fills one

    def learned(rank: int = 8, alpha: float = 8) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Change of A, and of B, of each layer after a chunk."""
        session = templora.load(str(folder)).session(seed=1, rank=rank, alpha=alpha, **wishes)
        sites = {n.removeprefix(PEFT_PREFIX): s for n, s in named(session.base.model, session.adapter.sites)}
        before = {name: (site.a.detach().clone(), site.b.detach().clone()) for name, site in sites.items()}
        session.read("The old captain looked at the sea.")
        of_a = {name: site.a.detach() - before[name][0] for name, site in sites.items()}
        return of_a, {name: site.b.detach() - before[name][1] for name, site in sites.items()}

    def known(rms: float) -> dict[str, torch.Tensor]:
        return {
            name: value
            for layer, (rows, out) in sizes.items()
            for name, value in {
                layer + A: torch.randn(rows, generator=torch.Generator().manual_seed(1)) / 8,
                layer + RMS_A: torch.full(rows, rms),
                layer + RMS_B: torch.linspace(rms, 2 * rms, out).repeat(8, 1).T.contiguous(),
            }.items()
        }

    of_a, of_b = learned()
    sizes = {layer: (of_a[layer].shape, len(of_b[layer])) for layer in of_b}
    save_file(known(1.0), folder / "start.safetensors")
    _, once = learned()
    save_file(known(0.5), folder / "start.safetensors")
    _, twice = learned()
    _, scaled = learned(alpha=16)
    for layer, step in once.items():
        assert bool(step.any())
        assert torch.allclose(twice[layer], 2 * step, rtol=0.01), "as long as its gradient is large"
        assert torch.allclose(scaled[layer], twice[layer], rtol=0.01), "and no longer for a larger scale"
    incomplete = known(0.5)
    del incomplete[LAYER + RMS_B]
    save_file(incomplete, folder / "start.safetensors")
    largest = [float(step.abs().max()) for step in learned()[1].values()]
    assert largest == pytest.approx([max(largest)] * len(largest), rel=0.05), "plain Adam: all alike"
    save_file(known(0.5), folder / "start.safetensors")
    largest = [float(step.abs().max()) for step in learned(rank=16)[1].values()]
    assert largest == pytest.approx([max(largest)] * len(largest), rel=0.05), "more rows than are known"


def test_what_this_text_says_loudly_is_divided_by_more_and_nothing_by_less(folder: Path) -> None:
    """However long the text: what is quieter in it than in others keeps the rate that those gave it."""

    def divided_by(rms: float) -> torch.Tensor:
        """The squares for B after a few chunks, where all are known to be alike."""
        session = templora.load(str(folder)).session(seed=1, rank=8, **SIZES)
        start = dict[str, torch.Tensor]()
        for name, site in named(session.base.model, session.adapter.sites):
            layer = name.removeprefix(PEFT_PREFIX)
            like_a, like_b = site.a.detach(), torch.full_like(site.b, rms)
            start |= {layer + A: like_a, layer + RMS_A: torch.full_like(like_a, rms), layer + RMS_B: like_b}
        save_file(start, folder / "start.safetensors")
        session = templora.load(str(folder)).session(seed=1, rank=8, alpha=8, **SIZES)
        session.read("The old captain looked at the sea. " * 4)
        return session.learner.optimizer.state[session.adapter.b]["max_exp_avg_sq"]

    known = (64 / SIZES["chunk"]) * 10.0**2  # the fewer tokens, the more noise
    assert bool((divided_by(10.0) == known).all())
    assert float((divided_by(1e-9) > 1e-18).float().mean()) > 0.9


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
