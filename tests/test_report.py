"""The status line: what matters most comes first, and fits."""

import pytest
from rich.console import Console

from templora.events import ChunkScored, Token
from templora.report import Screen, Status

SCORED = [ChunkScored(0, 1, 64, 190.0, 190.0), ChunkScored(1, 65, 64, 170.0, 180.0)]


def status() -> Status:
    made = Status(400, 1024)
    for event in (Token(0, 5, "It"), SCORED[0], Token(1, 6, " was"), SCORED[1]):
        made.take(event)
    return made


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_the_perplexities_are_seen_at_every_width(width: int) -> None:
    line = status().line(width)
    assert line.startswith("perplexity base 18.00 → adapter 16.65 (-7.5 %)")
    assert len(line) <= width
    assert ("MB" in line) == (width == 200)
    assert ("2/400 tokens" in line) == (width > 60)


def test_what_was_read_does_not_count_among_what_is_written() -> None:
    made = Status(400, 1024)
    made.take(SCORED[0])
    assert made.line(60).startswith("perplexity base 19.47 → adapter 19.47 (+0.0 %)")
    made.take(Token(0, 5, "It"))
    assert made.line(60).startswith("1/400 tokens")
    made.take(SCORED[1])
    assert made.line(60).startswith("perplexity base 16.65 → adapter 14.24 (-14.5 %)")


def test_a_terminal_of_80_columns_shows_it() -> None:
    console = Console(force_terminal=True, width=80, record=True, highlight=False)
    with Screen(status(), console) as screen:
        screen.take(Token(2, 7, " dark."))
        screen.take(SCORED[1])
    shown = console.export_text()
    assert "adapter 1" in shown and "…" not in shown
