"""Keys that are moved to other positions are those that the model would make there."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import Cache

import templora
from templora.cache import on_top_of
from templora.cache_layers import PrefixLayer
from templora.decoder import Decoder
from templora.events import ChunkScored
from templora.rotary import CLOSE, Rotary, rotary_of
from templora.testing import ByteTokenizer, tiny_llama
from tests.architectures import ARCHITECTURES, LLAMA_LIKE, POSITIONS, Architecture

# Positions that are learned or in the scores, rotations of neighbours, a frequency for each kind of block.
STAY = {"gpt2", "opt", "bloom", "cohere2", "gemma3_text"}
# Every fourth block has no positions.
SMOLLM3 = Architecture("smollm3", LLAMA_LIKE | {"no_rope_layers": [1, 0]})
PROSE = "The old captain looked at the sea for a long time before he answered. " * 12
SIZES: dict[str, Any] = {"window": 48, "context": 48, "chunk": 16}


@torch.no_grad()
def keys(model: Any, start: int) -> list[Tensor]:
    """Of eight tokens that begin at that position, a tensor for each block."""
    ids = torch.arange(40, 48).unsqueeze(0)
    places, cache = torch.arange(start, start + 8).unsqueeze(0), Cache(layer_class_to_replicate=PrefixLayer)
    model(ids, position_ids=places, **on_top_of(model, cache))
    return [layer.new[0] for layer in cache.layers if isinstance(layer, PrefixLayer) and layer.new]


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, SMOLLM3], ids=lambda a: a.name or a.model_type)
def test_moved_keys_are_those_made_there(architecture: Architecture) -> None:
    model = architecture.build().eval()
    rotary = rotary_of(model, POSITIONS)
    assert (rotary is None) == (architecture.model_type in STAY)
    if rotary is None:
        return
    assert rotary.layers == [True, architecture is not SMOLLM3]
    here, there = keys(model, 3), keys(model, 70)
    assert not torch.allclose(here[0], there[0], atol=1e-2)
    for moved, made in zip(rotary(here, 67), there, strict=True):
        torch.testing.assert_close(moved, made, atol=1e-4, rtol=1e-3)
    for back, made in zip(rotary(there, -67), here, strict=True):
        torch.testing.assert_close(back, made, atol=1e-4, rtol=1e-3)


def test_low_precision_is_told_from_another_layout() -> None:
    model = tiny_llama(initializer_range=0.2)
    found = rotary_of(model, 128)
    low = rotary_of(model.bfloat16(), 128)
    assert found is not None and low is not None and low.layers == found.layers
    moved, made = found(keys(model, 0), 60), keys(model, 60)
    error = (moved[1].float() - made[1].float()).norm() / made[1].float().norm()
    assert moved[1].dtype == torch.bfloat16 and float(error) < CLOSE


def test_frequencies_that_follow_the_length_are_left_alone() -> None:
    scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    assert rotary_of(tiny_llama(rope_parameters=scaling), 128) is None


def scores(base: templora.Base, **wishes: Any) -> list[float]:
    """NLL of each chunk of PROSE, which is longer than the base's positions."""
    session = base.session(seed=1, **SIZES, **{"sinks": 0, **wishes})
    return [e.adapted_nll for e in session.reading(PROSE) if isinstance(e, ChunkScored)]


def base_of(positions: int) -> templora.Base:
    """The same weights whatever the positions."""
    model = tiny_llama(initializer_range=0.2, max_position_embeddings=positions)
    return templora.load(model=model, tokenizer=ByteTokenizer())


def test_a_text_that_runs_out_of_positions_is_one_that_never_does(monkeypatch: pytest.MonkeyPatch) -> None:
    again, moves = 0, 0
    run, move = Decoder._run, Rotary.__call__  # pyright: ignore[reportPrivateUsage]

    def counted(self: Decoder, ids: Any, stop: int, *more: Any, **named: Any) -> Tensor:
        nonlocal again
        again += stop - self.cache.stop if self.adapter else 0  # the base's own cache is another one
        return run(self, ids, stop, *more, **named)

    def moved(self: Rotary, keys: Any, by: int) -> list[Tensor]:
        nonlocal moves
        moves += 1
        return move(self, keys, by)

    monkeypatch.setattr(Decoder, "_run", counted)
    monkeypatch.setattr(Rotary, "__call__", moved)
    endless = scores(base_of(4096))
    assert moves == 0
    assert scores(base_of(128)) == pytest.approx(endless, rel=1e-4)
    assert moves >= 8 and again == 0, "nothing of the text ran twice"
    stuck = base_of(128)
    stuck.rotary = None
    assert scores(stuck) != pytest.approx(endless, rel=1e-4), "a window made anew sees less far"
    assert again > 0


def test_with_keys_of_the_base_too() -> None:
    assert scores(base_of(128), cache="base") == pytest.approx(scores(base_of(4096), cache="base"), rel=1e-4)


def test_sinks_stay_where_they_were_made_while_the_window_moves() -> None:
    session = base_of(128).session(seed=1, sinks=4, **SIZES)
    made, origins = list[Tensor](), set[int]()
    for event in session.reading(PROSE):
        if not isinstance(event, ChunkScored):
            continue
        cache = session.decoder.cache
        origins.add(cache.origin)
        sinks = [layer.keys[:, :, layer.first :][:, :, :4].clone() for layer in cache.layers]  # pyright: ignore
        made = made or sinks
        assert all(torch.equal(one, other) for one, other in zip(made, sinks, strict=True))
    assert len(origins) >= 8


def test_an_interrupt_while_keys_move_costs_the_cache_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    base, stuck, moves, whole = base_of(128), base_of(128), 0, Rotary.moved
    stuck.rotary = None
    anew = scores(stuck)

    def interrupted(self: Rotary, keys: Tensor, by: int) -> Tensor:
        nonlocal moves
        moves += 1
        if moves == 2:
            raise KeyboardInterrupt
        return whole(self, keys, by)

    monkeypatch.setattr(Rotary, "moved", interrupted)
    session = base.session(seed=1, sinks=0, **SIZES)
    with pytest.raises(KeyboardInterrupt):
        session.read(PROSE)
    found = [e.adapted_nll for e in session.learning() if isinstance(e, ChunkScored)]
    assert 1 < len(found) < len(anew), "it went on where it had stopped"
    assert found[0] == pytest.approx(anew[-len(found)], rel=1e-4), "half-moved keys were not used"
