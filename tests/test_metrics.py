"""Sums are carried to the end and divided once."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from templora.metrics import Tally, perplexity

pieces = st.lists(st.tuples(st.floats(0, 1e4), st.integers(1, 500)), max_size=20)


@given(pieces)
def test_a_tally_does_not_depend_on_how_the_text_is_cut(parts: list[tuple[float, int]]) -> None:
    cut, whole = Tally(), Tally()
    for nll, tokens in parts:
        cut.add(nll, tokens)
    whole.add(sum(p[0] for p in parts), sum(p[1] for p in parts))
    assert cut.nll == pytest.approx(whole.nll)
    assert cut.tokens == whole.tokens
    assert cut.perplexity == (pytest.approx(whole.perplexity) if parts else None)


def test_perplexity_weighs_tokens_not_pieces() -> None:
    tally = Tally()
    tally.add(math.log(2) * 30, 30)
    tally.add(math.log(8) * 10, 10)
    assert tally.perplexity == pytest.approx(2 ** (6 / 4))


def test_a_uniform_guess_over_bytes_costs_eight_bits_each() -> None:
    tally = Tally(math.log(256) * 12, 12, 12)
    assert tally.perplexity == pytest.approx(256)
    assert tally.bits_per_byte == pytest.approx(8)


def test_without_tokens_or_bytes_there_is_no_figure() -> None:
    assert Tally().perplexity is None
    assert Tally(nll=3.0, tokens=2).bits_per_byte is None


@pytest.mark.parametrize(("nll", "expected"), [(0.0, 1.0), (1e6, math.inf), (math.inf, math.inf)])
def test_a_perplexity_that_no_float_holds_is_infinite(nll: float, expected: float) -> None:
    assert perplexity(nll, 2) == expected


def test_a_perplexity_of_what_is_not_a_number_is_not_one() -> None:
    assert math.isnan(perplexity(math.nan, 2))
