"""Which tokens are seen while which are written: laws that hold for all sizes, and a few cases in full."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from templora.errors import WindowTooLarge
from templora.window import Plan, Span, fit

sizes = st.integers(1, 300)
names = st.frozensets(st.sampled_from(["window", "chunk", "context"]))


def spans(plan: Plan, tokens: int) -> list[tuple[int, int, int, int]]:
    return [(s.chunk, s.visible, s.start, s.stop) for s in plan.spans(tokens)]


@given(window=sizes, chunk=sizes, tokens=st.integers(0, 2000))
def test_the_chunks_of_a_text_tile_it_and_each_token_but_the_first_is_a_target_once(
    window: int, chunk: int, tokens: int
) -> None:
    targets = [t for span in Plan(window, chunk, 1).spans(tokens) for t in range(span.start, span.stop)]
    assert targets == list(range(1, tokens))


@given(window=sizes, chunk=sizes, number=st.integers(0, 50))
def test_nothing_older_than_the_window_is_visible_and_nothing_within_it_is_hidden(
    window: int, chunk: int, number: int
) -> None:
    span = Plan(window, chunk, 1).span(number)
    assert span.chunk == number
    assert span.tokens == chunk
    assert span.start - span.visible == min(window, span.start)
    assert span.visible >= 0


@given(window=sizes, chunk=sizes, tokens=st.integers(0, 2000))
def test_all_chunks_are_full_but_the_last_and_as_the_plan_gives_them(
    window: int, chunk: int, tokens: int
) -> None:
    plan = Plan(window, chunk, 1)
    *full, last = [*plan.spans(tokens)] or [plan.span(0)]
    assert full == [plan.span(span.chunk) for span in full]
    assert 0 < last.tokens <= chunk


@given(
    window=sizes,
    chunk=sizes,
    context=sizes,
    sinks=st.integers(0, 8),
    positions=st.integers(1, 400),
    fixed=names,
)
def test_a_fitted_plan_never_exceeds_the_positions_and_never_changes_what_was_fixed(
    window: int, chunk: int, context: int, sinks: int, positions: int, fixed: frozenset[str]
) -> None:
    wished = {"window": window, "chunk": chunk, "context": context}
    try:
        plan = fit(**wished, positions=positions, fixed=fixed, sinks=sinks)
    except WindowTooLarge:
        # Refused only where the fixed sizes leave no room, even for chunks of one token.
        least = {name: size if name in fixed else 1 for name, size in wished.items()}
        assert max(least["window"], least["context"]) + least["chunk"] + sinks > positions
        return
    assert plan.needed == sinks + plan.window + plan.chunk <= positions
    assert plan.needed <= plan.room <= positions
    assert sinks + plan.context + plan.chunk <= positions
    for name, size in wished.items():
        assert 1 <= getattr(plan, name) <= size
        if name in fixed:
            assert getattr(plan, name) == size


@given(window=sizes, chunk=sizes, context=sizes)
def test_what_fits_is_left_as_it_is(window: int, chunk: int, context: int) -> None:
    context = min(context, window)
    for positions in (None, window + chunk):
        # A chunk of more than half the positions would leave less than itself to look back on.
        fixed = frozenset({"chunk"})
        assert fit(window, chunk, context, positions, fixed) == Plan(window, chunk, context, positions)


def test_a_text_of_eleven_tokens_in_full() -> None:
    assert spans(Plan(window=4, chunk=3, context=4), 11) == [
        (0, 0, 1, 4),
        (1, 0, 4, 7),
        (2, 3, 7, 10),
        (3, 6, 10, 11),
    ]


def test_chunks_longer_than_the_window_in_full() -> None:
    assert spans(Plan(window=2, chunk=5, context=2), 12) == [(0, 0, 1, 6), (1, 4, 6, 11), (2, 9, 11, 12)]


@pytest.mark.parametrize(("tokens", "expected"), [(0, []), (1, []), (2, [(0, 0, 1, 2)])])
def test_the_shortest_texts_in_full(tokens: int, expected: list[tuple[int, int, int, int]]) -> None:
    assert spans(Plan(window=4, chunk=3, context=4), tokens) == expected


@pytest.mark.parametrize(
    ("wished", "positions", "fixed", "fitted"),
    [
        ((1024, 1024, 1024), None, (), (1024, 1024, 1024)),
        ((1024, 1024, 1024), 2048, (), (1024, 1024, 1024)),
        ((1024, 1024, 1024), 512, (), (256, 256, 256)),
        ((1024, 64, 1024), 512, (), (448, 64, 448)),
        ((1024, 64, 1024), 512, ("window",), None),
        ((400, 256, 1024), 512, ("window",), (400, 112, 400)),
        ((1024, 500, 1024), 512, ("chunk",), (12, 500, 12)),
        ((128, 64, 1024), 512, ("window",), (128, 64, 128)),
        ((128, 64, 256), 512, ("context",), (128, 64, 256)),
        ((1024, 1024, 1024), 1, (), None),
    ],
)
def test_sizes_fit_the_base(
    wished: tuple[int, int, int],
    positions: int | None,
    fixed: tuple[str, ...],
    fitted: tuple[int, int, int] | None,
) -> None:
    if fitted is None:
        with pytest.raises(WindowTooLarge):
            fit(*wished, positions, frozenset(fixed))
    else:
        assert fit(*wished, positions, frozenset(fixed)) == Plan(*fitted, positions)


def test_an_error_says_the_largest_that_works() -> None:
    with pytest.raises(WindowTooLarge) as caught:
        Plan(window=2048, chunk=256, context=1024, positions=2048)
    expected = "window 2048 + chunk 256 exceed the 2048 positions of this base; the largest window is 1792"
    assert str(caught.value) == expected
    assert Plan(window=1792, chunk=256, context=1024, positions=2048)
    with pytest.raises(WindowTooLarge, match=r"context 300 .* the largest context is 256"):
        Plan(window=100, chunk=256, context=300, positions=512)
    with pytest.raises(WindowTooLarge, match="lower the chunk to 256 or less"):
        Plan(window=100, chunk=600, context=100, positions=512)
    with pytest.raises(WindowTooLarge, match="chunk must be at least 1 token, not 0"):
        Plan(window=1, chunk=0, context=1)


def test_a_span_is_a_value() -> None:
    assert Span(1, 0, 4, 7) == Plan(4, 3, 4).span(1)
    assert Span(1, 0, 4, 7).tokens == 3


def test_keys_that_stay_have_room_but_not_for_all_positions() -> None:
    """A hundred thousand positions would fill a GPU."""
    assert Plan(1024, 64, 1024, 131_072).room == 4 * 1088
    assert Plan(256, 64, 256, 131_072).room == 2048
    assert Plan(256, 64, 256, 512).room == 512
    assert Plan(1024, 64, 1024).room == 2 * 1088
