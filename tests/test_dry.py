"""DRY: what carries a repetition on is less likely, by as much as the formula says; all else stays."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import templora
from templora.dry import CROWDED, ENOUGH, LEAST_ENTROPY, LONGEST, DryLogitsProcessor, repetitions
from templora.events import Token
from templora.guard import distinct_4


def slow(ids: list[int]) -> dict[int, int]:
    """The definition, place by place."""
    found = dict[int, int]()
    for place in range(1, len(ids)):
        length = 0
        while length < min(place, LONGEST) and ids[place - 1 - length] == ids[-1 - length]:
            length += 1
        if length:
            found[ids[place]] = max(length, found.get(ids[place], 0))
    return found


@given(st.lists(st.integers(0, 3), max_size=150))
def test_repetitions_are_those_of_the_definition(ids: list[int]) -> None:
    assert repetitions(ids) == slow(ids)


def test_a_penalty_grows_with_the_span() -> None:
    seen: Any = torch.tensor([[5, 6, 7, 1, 7, 2, 5, 6, 7], [1, 2, 3, 4, 5, 6, 7, 8, 9]])
    scores = torch.zeros(2, 10)
    made = DryLogitsProcessor(0.5, 2.0, allowed_length=1)(seen, scores)
    expected = torch.zeros(2, 10)
    expected[0, 1], expected[0, 2] = -0.5 * 2**2, -0.5
    assert torch.equal(made, expected)
    assert torch.equal(scores, torch.zeros(2, 10))


def test_what_is_allowed_stays_bit_for_bit() -> None:
    seen: Any = torch.tensor([[5, 6, 7, 1, 5, 6, 7]])
    scores = torch.randn(1, 10, dtype=torch.bfloat16)
    assert torch.equal(DryLogitsProcessor(0.8, 1.75, allowed_length=4)(seen, scores), scores)
    changed = DryLogitsProcessor(0.8, 1.75, allowed_length=3)(seen, scores)
    assert changed.dtype == scores.dtype and (changed != scores).nonzero().tolist() == [[0, 1]]


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_a_loop_ends(temperature: float) -> None:
    """With a fixed adapter, and nothing else against repetition."""
    plain: dict[str, Any] = {"temperature": temperature, "repetition_penalty": 1.0, "min_p": 0.3}
    ids = dict[float, list[int]]()
    for multiplier in (0.0, 0.8):
        session = templora.load("novelist").session("default", seed=1, learning_rate=0.0)
        session.extend(session.base.encode("He went up, and he went down. " * 8), "")
        wishes = plain | {"dry_multiplier": multiplier, "dry_allowed_length": 4}
        events = session.write(200, score_base=False, **wishes)
        ids[multiplier] = [event.id for event in events if isinstance(event, Token)]
        session.discard()
    assert distinct_4(ids[0.0]) < 0.5 < 0.55 < distinct_4(ids[0.8])


def test_what_fills_a_window_that_says_little_loses_by_its_share() -> None:
    seen: Any = torch.tensor([[1, 2, 1, 3] * (ENOUGH // 4)])
    made = DryLogitsProcessor(0.0, 1.75, allowed_length=4)(seen, torch.zeros(1, 5))
    bits = 0.5 * math.log2(2) + 2 * 0.25 * math.log2(4)
    lost = CROWDED * (1 - bits / math.log2(ENOUGH) / LEAST_ENTROPY)
    assert made[0].tolist() == pytest.approx([0, -lost / 2, -lost / 4, -lost / 4, 0])
    assert not DryLogitsProcessor(0.0, 1.75, allowed_length=4)(seen[:, 1:], torch.zeros(1, 5)).any()


@pytest.mark.slow
@pytest.mark.parametrize("junk", ["_", " ."])
def test_leaders_are_left(junk: str) -> None:
    """What a base goes on with for ever, and never in the same way twice."""
    base = templora.load("novelist")
    leader, words = base.encode(junk)[-1], base.encode("She said that he would be there in the morning.")
    places = torch.randint(8, (700,), generator=torch.Generator().manual_seed(0)).tolist()
    session = base.session("default", seed=1, window=512, context=512, learning_rate=0.0)
    session.extend([words[place % len(words)] if place < 2 else leader for place in places], "")
    written = [event.id for event in session.write(600, score_base=False) if isinstance(event, Token)]
    assert written[-200:].count(leader) < 40
