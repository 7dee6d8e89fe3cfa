"""Continuations are judged where a text stands, and leave no trace there."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import templora
from templora.base import Base
from templora.cross_entropy import judged
from templora.errors import InvalidText
from templora.events import ChunkScored, Token
from templora.session import Session
from templora.shelf import JOURNAL
from templora.tasks.score import scoring
from templora.testing import ByteTokenizer, ScriptedModel, tiny_llama
from tests.sessions import BASE
from tests.sessions import PROSE as SENTENCE
from tests.sessions import SIZES as FAST

PROSE = f"{SENTENCE} " * 3
KINDS = pytest.mark.parametrize(
    "kind",
    [
        {},
        {"cache": "recompute"},
        {"cache": "base"},
        {"context_from": "recompute"},
        {"dropout": 0.1},
        {"sinks": 0},
        {"guard": True},
    ],
    ids=str,
)
LENGTHS = pytest.mark.parametrize("length", [1, 5, 50])  # inside the chunk, and into the third after it


def written(session: Session, tokens: int) -> list[int]:
    wish: dict[str, Any] = {"temperature": 1.0, "dry_multiplier": 0.0}
    return [event.id for event in session.write(tokens, **wish) if isinstance(event, Token)]


def ask(session: Session, length: int) -> None:
    session.logprobs("x" * length, "another one", base=length == 1)


@KINDS
@LENGTHS
@pytest.mark.parametrize("before", [0, 100])
def test_a_session_goes_on_as_if_it_had_not_been_asked(
    kind: dict[str, Any], length: int, before: int
) -> None:
    asked, silent = (BASE.session(seed=3, **FAST | kind) for _ in range(2))
    for session in (asked, silent):
        if before:
            session.read(PROSE[:before])
    for _ in range(6):
        ask(asked, length)
        assert written(asked, 23) == written(silent, 23)
    assert torch.equal(asked.adapter.flat, silent.adapter.flat)


@LENGTHS
def test_nor_does_one_that_learns_while_it_writes_notice(length: int) -> None:
    asked, silent = (BASE.session(seed=3, parallel=True, **FAST) for _ in range(2))
    for session in (asked, silent):
        session.read(PROSE[:100])
    for _ in range(3):
        ask(asked, length)
        assert written(asked, 23) == written(silent, 23)
    for session in (asked, silent):
        session.discard()


@LENGTHS
def test_a_session_on_disk_writes_nothing_down(length: int, tmp_path: Path) -> None:
    asked, silent = BASE.session(seed=3, dir=tmp_path / "asked", **FAST), BASE.session(seed=3, **FAST)
    for session in (asked, silent):
        session.read(PROSE[:100])
    for _ in range(3):
        before = (tmp_path / "asked" / JOURNAL).read_bytes()
        ask(asked, length)
        assert (tmp_path / "asked" / JOURNAL).read_bytes() == before
        assert written(asked, 23) == written(silent, 23)
    ask(asked, length)
    asked.close()
    with templora.resume(tmp_path / "asked", base=BASE) as again:
        assert written(again, 23) == written(silent, 23)


@KINDS
def test_it_is_what_the_next_tokens_are_drawn_from(kind: dict[str, Any]) -> None:
    asked, session = (BASE.session(seed=3, **FAST | kind) for _ in range(2))
    for one in (asked, session):
        one.read(PROSE[:70])
    tokens = written(session, 10)
    (found,) = asked.logprobs(tokens)
    assert found.tokens == tokens
    expected = list[float]()
    span = asked.plan.span(asked.chunk)
    for token in tokens:
        assert len(asked.ids) < span.stop, "the test wants to stay inside one chunk"
        expected.append(float(asked.decoder.logits(asked.ids, span).log_softmax(-1)[token]))
        asked.ids.append(token)
    assert found.values == pytest.approx(expected, abs=2e-4)
    assert found.total == pytest.approx(sum(expected), abs=1e-3)


@pytest.mark.parametrize("kind", [{}, {"cache": "recompute"}, {"context_from": "recompute"}, {"sinks": 0}])
@pytest.mark.parametrize("split", [1, 20, 90])
def test_without_learning_it_is_the_score_of_what_follows(kind: dict[str, Any], split: int) -> None:
    wish = FAST | kind | {"learning_rate": 0.0}
    ids = BASE.encode(PROSE)
    session = BASE.session(seed=3, **wish)
    scored = list[float]()
    for event in scoring(session, ids, score_base=False):
        assert isinstance(event, ChunkScored) and session.study.nll is not None
        assert float(session.study.nll.sum()) == event.adapted_nll
        scored += session.study.nll.tolist()
    asked = BASE.session(seed=3, **wish)
    asked.extend(ids[:split], "")
    # Old keys are the adapter's: the bare base, which was not asked before, makes them of the window alone.
    for base in (False, True) if kind.get("cache") == "recompute" else (False,):
        (found,) = asked.logprobs(ids[split:], base=base)
        assert [-value for value in found.values] == pytest.approx(scored[split:], abs=2e-4)


def test_the_base_is_asked_without_the_adapter() -> None:
    wish = FAST | {"cache": "recompute"}
    learned, bare = BASE.session(seed=3, **wish), BASE.session(seed=3, **wish | {"learning_rate": 0.0})
    for session in (learned, bare):
        session.read(PROSE)
    own, base = learned.logprobs(" counting"), learned.logprobs(" counting", base=True)
    assert base[0].values == pytest.approx(bare.logprobs(" counting")[0].values, abs=2e-4)
    assert own[0].total > base[0].total + 1, "what was read three times is likelier now"


def test_greedy_is_what_greedy_decoding_writes() -> None:
    base = templora.load(model=ScriptedModel({i: i + 1 for i in range(250)}), tokenizer=ByteTokenizer())
    session = base.session(seed=3, **FAST)
    session.read("abc")
    right, wrong = session.logprobs("defghijklmnopqrstuvw", "defghijklmnopqrstuvx")
    assert right.is_greedy and not wrong.is_greedy
    assert right.total == pytest.approx(0.0, abs=1e-3)


def test_a_model_with_more_behind_its_head_is_asked_as_well() -> None:
    """`ScriptedModel` pushes its logits after the head, so hidden states alone do not say them."""
    tokenizer = ByteTokenizer()
    a, b = tokenizer.encode("ab", add_special_tokens=False)
    base = templora.load(model=ScriptedModel({a: b}), tokenizer=tokenizer)
    session = base.session(seed=3, **FAST)
    session.read("xa")
    pushed, other = session.logprobs("b", "c")
    assert pushed.total > -1e-3 > other.total


@pytest.mark.parametrize("tokens", [1, 127, 128, 129, 300])
def test_pieces_of_logits_give_what_all_at_once_give(tokens: int) -> None:
    hidden, head = torch.randn(tokens, 8), nn.Linear(8, 50)
    labels = torch.randint(50, (tokens,))
    nll, likeliest = judged(hidden, head, labels)
    logits = head(hidden)
    torch.testing.assert_close(nll, nn.functional.cross_entropy(logits, labels, reduction="none"))
    assert torch.equal(likeliest, logits.argmax(-1) == labels)


@pytest.mark.parametrize(("continuation", "match"), [("", "empty"), ([], "empty"), ([999], "999")])
def test_what_cannot_be_judged_is_refused(continuation: Any, match: str) -> None:
    session = BASE.session(seed=3, **FAST)
    session.read("abc")
    with pytest.raises(InvalidText, match=match):
        session.logprobs("x", continuation)


def test_something_must_stand_before_it() -> None:
    session = Base(tiny_llama(), None).session(seed=3, **FAST)
    with pytest.raises(InvalidText, match="start token"):
        session.logprobs([1, 2])
    session.extend([1], "")
    assert len(session.logprobs([1, 2])[0].values) == 2


def test_a_score_by_token_adds_up_and_stands_where_it_says() -> None:
    scores = templora.score(BASE, PROSE, seed=3, by_token=True, **FAST)
    for chunk in scores.chunks:
        for side in ("base", "adapted"):
            assert len(chunk[f"{side}_token_nll"]) == chunk["tokens"]
            assert sum(chunk[f"{side}_token_nll"]) == pytest.approx(chunk[f"{side}_nll"], rel=1e-5)
    assert scores.chunks[-1]["tokens"] < FAST["chunk"], "the rest is told as well"
    plain = templora.score(BASE, PROSE, seed=3, score_base=False, **FAST)
    assert "adapted_token_nll" not in plain.chunks[0]
    assert [c["adapted_nll"] for c in plain.chunks] == [c["adapted_nll"] for c in scores.chunks]


def test_a_state_of_another_recipe_is_refused_before_anything_changes() -> None:
    first, other = BASE.session(seed=3, **FAST), BASE.session(seed=3, **FAST | {"rank": 8, "window": 48})
    first.read(PROSE)
    other.read(PROSE[:30])
    before = other.adapter.snapshot(), list(other.ids), other.text
    with pytest.raises(templora.TemploraError, match=r"window, rank|rank, window"):
        other.load_state(first.state())
    assert torch.equal(other.adapter.flat, before[0]) and (other.ids, other.text) == before[1:]
    other.read(PROSE)


@pytest.mark.parametrize("before", range(64, 200, 8))
def test_nor_does_the_base_where_it_is_not_asked_of_each_chunk(before: int) -> None:
    text = PROSE * 2

    def base_nll(ask: bool) -> list[float | None]:
        session = BASE.session(seed=3, **FAST)
        session.read(text[:before], score_base=True)
        for wish in (False, True) if ask else ():
            session.logprobs("x", base=wish)
            list(session.score_rest(score_base=wish))
        session.read(text[before : before + 16])
        events = session.reading(text[before + 16 : before + 48], score_base=True)
        return [event.base_nll for event in events if isinstance(event, ChunkScored)]

    assert base_nll(ask=True) == base_nll(ask=False)
