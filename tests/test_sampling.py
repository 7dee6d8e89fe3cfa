"""The draw: the same seed draws the same, and the filters are those of transformers' own pipeline."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from templora import sampling
from templora.errors import InvalidRecipe
from templora.filtering import WAYS, filtered
from templora.sampling import Sampler, Sampling
from templora.testing import tiny_llama

MODEL: Any = tiny_llama()
VISIBLE = [1, 2, 3, 3, 9]
OFF: dict[str, Any] = {
    "temperature": 1.0,
    "top_p": None,
    "repetition_penalty": None,
    "dry_multiplier": None,
}


def logits(seed: int) -> Tensor:
    """[vocab]"""
    return 3 * torch.randn(257, generator=torch.Generator().manual_seed(seed))


def theirs(**settings: Any) -> LogitsProcessorList:
    """What `model.generate` would use."""
    config = GenerationConfig(do_sample=True, **settings)
    return MODEL._get_logits_processor(
        generation_config=config, input_ids_seq_length=len(VISIBLE), device="cpu"
    )


def draws(seed: int, number: int, sampling: Sampling, *, greedy: bool = False) -> list[int]:
    sampler, processors = Sampler(seed), sampling.processors()
    return [sampler.draw(logits(i), VISIBLE, processors, greedy=greedy) for i in range(number)]


def test_the_same_seed_draws_the_same_and_another_seed_does_not() -> None:
    first = draws(7, 50, Sampling())
    torch.manual_seed(1)
    torch.rand(5)
    assert draws(7, 50, Sampling()) == first
    assert draws(8, 50, Sampling()) != first


def test_a_draw_leaves_torchs_generator_alone() -> None:
    before = torch.random.get_rng_state()
    draws(7, 5, Sampling())
    assert torch.equal(torch.random.get_rng_state(), before)


def test_greedy_takes_the_likeliest() -> None:
    expected = [int(logits(i).argmax()) for i in range(20)]
    plain = Sampling(temperature=0, top_p=None, repetition_penalty=None, dry_multiplier=None)
    assert draws(7, 20, plain, greedy=True) == expected


def test_a_greedy_draw_uses_no_randomness() -> None:
    sampler = Sampler(7)
    sampler.draw(logits(0), VISIBLE, Sampling().processors(), greedy=True)
    assert sampler.draws == 0


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    scores, number = 2 * torch.randn(12, generator=torch.Generator().manual_seed(3)), 20_000
    scores[[0, 5, 11]] = -torch.inf
    likely = scores.softmax(0)
    for seed in (0, 1, -1, 1 << 70):
        sampler = Sampler(seed)
        drawn = [sampler.draw(scores, [], LogitsProcessorList(), greedy=False) for _ in range(number)]
        seen = torch.bincount(torch.tensor(drawn), minlength=12)
        assert not seen[[0, 5, 11]].any()
        # Chi-square of eight degrees of freedom: above 37.3 once in a hundred thousand times.
        assert ((seen - number * likely) ** 2 / (number * likely))[likely > 0].sum() < 37.3
        pairs = torch.bincount(torch.tensor(drawn[1:]) * 12 + torch.tensor(drawn[:-1]), minlength=144)
        both = number * torch.outer(likely, likely).flatten()
        large = both > 20  # and neighbours have nothing in common
        assert ((pairs - both) ** 2 / both)[large].sum() < 2 * large.sum()


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1 - 2**-53])
def test_what_is_impossible_is_never_drawn(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "_uniform", lambda *_: share)
    for scores in ([-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf], [-torch.inf] * 9 + [5.0], [1.0]):
        given_ = torch.tensor(scores)
        assert given_[Sampler(1).draw(given_, [], LogitsProcessorList(), greedy=False)].isfinite()


@pytest.mark.parametrize("scores", [[-torch.inf] * 3, [0.0, torch.nan], [torch.inf, 0.0]])
def test_where_nothing_is_left_it_says_so(scores: list[float]) -> None:
    sampler = Sampler(1)
    with pytest.raises(RuntimeError, match="no token is left to draw"):
        sampler.draw(torch.tensor(scores), [], LogitsProcessorList(), greedy=False)
    assert sampler.draws == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_in_half_precision_are_drawn_from_in_full(dtype: torch.dtype) -> None:
    rounded = logits(3).to(dtype)
    processors = Sampling().processors()
    token = Sampler(7).draw(rounded, VISIBLE, processors, greedy=False)
    assert token == Sampler(7).draw(rounded.float(), VISIBLE, processors, greedy=False)


@pytest.mark.parametrize(
    "wishes",
    [
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_k": 0},
        {"top_k": 1000},
        {"top_p": 0.6},
        {"top_p": 1.0},
        {"min_p": 0.2},
        {"min_p": 0.0},
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 1.0},
        {"temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.1},
    ],
    ids=str,
)
def test_each_filter_does_what_transformers_does(wishes: dict[str, Any]) -> None:
    ids: Any = torch.tensor([VISIBLE])
    # In transformers, a top_k that is not given means 50; 0 leaves it out.
    given_ = {"top_k": 0, **wishes}
    for seed in range(5):
        scores = logits(seed).unsqueeze(0)
        ours = Sampling(**(OFF | wishes)).processors()(ids, scores.clone())
        assert torch.equal(ours, theirs(**given_)(ids, scores.clone()))


@settings(max_examples=200)
@given(
    scores=st.lists(st.floats(-30, 30, width=16), min_size=2, max_size=40),
    top_p=st.floats(0.01, 0.99),
    banned=st.lists(st.integers(-1, 60), min_size=1, max_size=3),
)
def test_the_short_ways_give_the_scores_of_the_long_ones(
    scores: list[float], top_p: float, banned: list[int]
) -> None:
    given_ = torch.tensor([scores])
    processors = Sampling(**(OFF | {"top_p": top_p, "temperature": 0.7})).processors(banned)
    before = given_.clone()
    long = processors(torch.tensor([VISIBLE]), given_.clone())  # pyright: ignore[reportArgumentType]
    assert torch.equal(filtered(processors, VISIBLE, given_), long)
    assert torch.equal(given_, before)


def test_a_short_way_is_taken_where_no_scores_are_equal() -> None:
    scores = logits(1).unsqueeze(0)
    processors = Sampling(**(OFF | {"top_p": 0.9})).processors([3])
    for processor in processors:
        made = WAYS[type(processor)](processor, scores)
        assert made is not None
        assert torch.equal(made, processor(torch.tensor([VISIBLE]), scores))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("banned", [[-1], [257], [-1, 5, 300], [256, 0]])
def test_an_id_outside_the_vocabulary_bans_nothing(banned: list[int]) -> None:
    scores, ids = logits(1).unsqueeze(0), torch.tensor([VISIBLE])
    processors = Sampling(**OFF).processors(banned)
    assert torch.equal(filtered(processors, VISIBLE, scores), processors(ids, scores))  # pyright: ignore[reportArgumentType]


def test_a_ban_of_nothing_bans_nothing() -> None:
    scores = logits(1).unsqueeze(0)
    nothing = theirs(suppress_tokens=[])  # as some models' generation config says
    assert torch.equal(filtered(nothing, VISIBLE, scores), scores)


def test_a_processor_of_ones_own_sees_the_text() -> None:
    seen = list[list[int]]()

    class Own(LogitsProcessor):
        def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
            seen.append(input_ids[0].tolist())
            return scores

    Sampler(1).draw(logits(1), VISIBLE, LogitsProcessorList([Own()]), greedy=True)
    assert seen == [VISIBLE]


def test_the_filters_come_in_transformers_order() -> None:
    every: dict[str, Any] = {
        "temperature": 0.7,
        "top_k": 40,
        "top_p": 0.9,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
    }
    ours = [type(p) for p in Sampling(**every, dry_multiplier=0).processors(banned=[256])]
    assert ours == [type(p) for p in theirs(**every, suppress_tokens=[256])]


@given(seed=st.integers(0, 1000))
def test_what_is_banned_is_never_drawn(seed: int) -> None:
    scores = torch.zeros(257)
    scores[[5, 6]] = 20.0
    processors = Sampling(**OFF).processors(banned=[5])
    assert Sampler(seed).draw(scores, VISIBLE, processors, greedy=False) == 6
    assert Sampler(seed).draw(scores, VISIBLE, processors, greedy=True) == 6


def test_at_temperature_0_only_the_penalties_and_the_ban_remain() -> None:
    every = Sampling(temperature=0, top_k=3, top_p=0.5, min_p=0.1, repetition_penalty=1.2)
    names = [type(p).__name__ for p in every.processors(banned=[1])]
    penalties = ["RepetitionPenaltyLogitsProcessor", "DryLogitsProcessor"]
    assert names == [*penalties, "SuppressTokensLogitsProcessor"]
    plain = Sampling(temperature=0, dry_multiplier=0, repetition_penalty=1).processors()
    assert not list(plain)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -3),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", float("nan")),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -1.0),
        ("repetition_penalty", float("inf")),
        ("dry_multiplier", -0.5),
        ("dry_multiplier", float("nan")),
        ("dry_base", 0.9),
        ("dry_base", float("inf")),
        ("dry_allowed_length", 0),
    ],
)
def test_a_value_that_cannot_work_is_refused(name: str, value: Any) -> None:
    with pytest.raises(InvalidRecipe, match=f"{name} is {value}; it must be") as caught:
        Sampling(**{name: value})
    assert "\n" not in str(caught.value)


def test_wishes_win_over_the_models_config_and_that_over_the_defaults() -> None:
    config = GenerationConfig(temperature=0.5, top_k=7)
    made = Sampling.of(config, temperature=0.9, min_p=None)
    assert made == Sampling(temperature=0.9, top_k=7)
    assert Sampling.of(None) == Sampling()


def test_a_wish_of_zero_is_a_wish() -> None:
    assert Sampling.of(GenerationConfig(temperature=0.5), temperature=0).temperature == 0
