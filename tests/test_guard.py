"""The guard: first its judgement on plain numbers, then real attacks on a real base."""

import json
import math
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import templora
from templora.base import Base
from templora.events import ChunkLearned, ChunkScored, ChunkSkipped, RolledBack, Warned
from templora.guard import (
    CLEARLY,
    ENOUGH,
    HISTORY,
    LARGEST_LOSS,
    LONGEST_NOISE,
    LOOP_SHRINK,
    OWN_DRIFT,
    Guard,
    Verdict,
    distinct_4,
)
from templora.injection import PEFT_PREFIX, named
from templora.start import A, B
from templora.tasks.score import Scores, scoring
from templora.testing import ByteTokenizer, tiny_llama

ROOT = Path(__file__).parent.parent
VARIED = list(range(400))


def settled() -> Guard:
    """A guard that has seen enough usual chunks, at 4 nats per token."""
    guard = Guard()
    for _ in range(ENOUGH):
        assert guard.judge(VARIED, 64, 4.0, None, 0) == Verdict()
    return guard


@pytest.mark.parametrize(
    ("ids", "share"),
    [([], 1.0), ([1, 2, 3], 1.0), ([1, 2, 3, 4], 1.0), ([7] * 13, 0.1), ([1, 2, 3, 4, 1, 2, 3, 4], 0.8)],
)
def test_distinct_4_is_the_share_of_4_grams_that_differ(ids: list[int], share: float) -> None:
    assert distinct_4(ids) == pytest.approx(share)


@given(st.lists(st.integers(0, 5), max_size=60))
def test_distinct_4_counts_as_a_plain_loop_does(ids: list[int]) -> None:
    grams = [tuple(ids[i : i + 4]) for i in range(len(ids) - 3)]
    assert distinct_4(ids) == (len(set(grams)) / len(grams) if grams else 1.0)


def test_noise_is_left_out_and_what_goes_on_for_long_is_the_text() -> None:
    guard = settled()
    assert guard.judge(VARIED, 64, 4.9, None, 0) == Verdict(), "a harder page is not noise"
    assert guard.judge(VARIED, 64, 8.0, None, 0) == Verdict("noise")
    assert guard.judge(VARIED, 64, 4.0, None, 0) == Verdict()
    chunks = 0
    while guard.judge(VARIED, 64, 8.0, None, 0) == Verdict("noise"):
        chunks += 1
    assert chunks == LONGEST_NOISE // 64


def test_a_text_that_has_become_another_one_is_learned_from_then_on() -> None:
    guard = Guard()
    for _ in range(2 * HISTORY):
        guard.judge(VARIED, 64, 4.0, None, 0)
    for _ in range(LONGEST_NOISE // 64):
        assert guard.judge(VARIED, 64, 8.0, None, 0) == Verdict("noise")
    assert [guard.judge(VARIED, 64, 8.0, None, 0) for _ in range(HISTORY)] == [Verdict()] * HISTORY
    assert guard.judge(VARIED, 64, 12.0, None, 0) == Verdict("noise")


def test_a_score_that_is_not_finite_is_noise_from_the_first_chunk_on_and_for_ever() -> None:
    guard = Guard()
    for _ in range(LONGEST_NOISE // 64 + 9):
        assert guard.judge(VARIED, 64, math.nan, None, 0) == Verdict("noise")
    assert not guard.usual


def page(number: int) -> list[int]:
    """64 tokens, no two pages alike."""
    return list(range(64 * number, 64 * number + 64))


def test_own_text_is_learned_only_near_the_base_and_given_text_widens_that() -> None:
    guard = Guard()
    assert guard.judge(page(1), 64, 3.0, 3.05, 64) == Verdict()
    drifted = guard.judge(page(2), 64, 3.0, 3.0 + 4 * OWN_DRIFT, 64)
    assert drifted.reason == "drift"
    assert drifted.keep == pytest.approx(0.5), "a quarter of the KL is half of the scale"
    assert guard.judge(page(3), 64, 3.0, 3.4, 0) == Verdict(), "given text may teach as much as it can"
    assert guard.judge(page(4), 64, 3.0, 3.4, 64) == Verdict()


def test_short_chunks_of_own_text_are_judged_together() -> None:
    guard, line = Guard(), 16
    for number in range(3):
        assert guard.judge(page(number)[:line], line, 3.0, 3.0 + 8 * OWN_DRIFT, line) == Verdict()
    again = Guard()
    again.load_state(json.loads(json.dumps(guard.state())))
    drifted = again.judge(page(3)[:line], line, 3.0, 3.0 - 8 * OWN_DRIFT, line)
    assert drifted.reason == "drift"
    assert drifted.keep == pytest.approx(0.5), "24 - 8 over four is 4"
    assert again.judge(page(4)[:line], line, 3.0, 3.0 + 8 * OWN_DRIFT, line) == Verdict(), "counted anew"
    assert again.must_go_back(2 * LARGEST_LOSS, 0.0)
    assert again.drifted == (0.0, 0), "of an adapter that is no more"


def test_own_text_may_repeat_itself_less_than_given_text_and_pulls_the_adapter_back() -> None:
    pages = [[*page(number)[24:], *page(0)[:24]] for number in range(10)]  # with a refrain each
    given, own = (
        [guard.judge(ids, 64, 3.0, 3.0, written) for ids in pages]
        for guard, written in ((Guard(), 0), (Guard(), 64))
    )
    assert given == [Verdict()] * 10
    assert own[0] == Verdict()
    assert own[-1] == Verdict("repetition", LOOP_SHRINK)
    assert Guard().judge([7] * 400, 64, 3.0, 3.0, 0) == Verdict("repetition")


def test_an_adapter_that_loops_gives_way_to_the_base() -> None:
    session = Base(tiny_llama(), ByteTokenizer()).session(seed=1, window=64, context=64, chunk=32)
    session.read("The old captain looked at the sea, and the sea looked back. " * 3)
    with torch.no_grad():
        session.adapter.b.add_(0.01 * torch.randn(session.adapter.b.shape))
    norms, loops = [float(session.adapter.b.detach().norm())], 0
    for event in session.write(600, temperature=0.0):
        if isinstance(event, ChunkSkipped) and event.reason == "repetition":
            loops += 1
            norms.append(float(session.adapter.b.detach().norm()))
    assert loops >= 5, "greedy and random weights: it must loop"
    assert norms[-1] < norms[0] * LOOP_SHRINK**4


def test_going_back_waits_for_a_loss_that_is_not_chance_and_halves_the_rate() -> None:
    guard = Guard()
    assert not any(guard.must_go_back(100 + loss, 100) for loss in (5, -5, 8, -9, 4))
    losses = [guard.must_go_back(100 + LARGEST_LOSS / 2 + 1, 100) for _ in range(2)]
    assert losses == [False, True]
    assert guard.rate == 0.5
    for _ in range(40):
        assert not guard.must_go_back(99, 100)
    assert guard.rate == 1.0
    assert guard.must_go_back(math.nan, 100)


def test_a_book_is_not_forgotten_over_a_few_strange_sentences() -> None:
    guard, tokens = Guard(), 64
    assert not guard.must_give_up(203.0, 200.0, tokens), "a little worse on one chunk is chance"
    assert guard.must_give_up(199.0, 200.0, tokens), "it went back before, and has not been good since"
    assert guard.must_give_up(200.0 + 1.01 * CLEARLY * tokens, 200.0, tokens), "clearly worse"
    assert guard.must_give_up(math.nan, 200.0, tokens)
    assert not guard.must_give_up(203.0, 200.0, tokens), "having begun anew it may go back again"


def test_its_state_survives_a_round_trip() -> None:
    guard, other = settled(), Guard()
    guard.must_go_back(110, 100)
    guard.must_give_up(100, 100, 10)
    other.load_state(guard.state())
    assert other == guard


def prose(base: Base, tokens: int) -> list[int]:
    """English that this base has not written, and that nobody edits."""
    ids = base.encode((ROOT / "LICENSE").read_text("utf-8"))
    assert len(ids) >= tokens
    return ids[:tokens]


def attacked(base: Base, ids: list[int], **changes: object) -> tuple[float, list[object]]:
    """Change of perplexity against the base over the document, and all events; the base must be untouched."""
    before = base.fingerprint()
    session = base.session(seed=1, window=256, context=256, **changes)
    scores, events = Scores(), list[object]()
    for event in scoring(session, ids):
        scores.take(event)
        events.append(event)
    session.discard()
    assert base.fingerprint() == before
    assert scores.change is not None
    return scores.change, events


@pytest.fixture(scope="module")
def novelist() -> Base:
    return templora.load("novelist")


@pytest.mark.slow
def test_a_rate_a_hundred_times_too_high_costs_at_most_one_percent(novelist: Base) -> None:
    change, events = attacked(novelist, prose(novelist, 3000), learning_rate=0.1)
    assert change <= 0.01
    assert any((isinstance(e, ChunkLearned) and e.share < 1) or isinstance(e, RolledBack) for e in events)
    unguarded, _ = attacked(novelist, prose(novelist, 1000), learning_rate=0.1, guard=False)
    assert unguarded > 0.5, "the attack is harmless, so the test above proves nothing"


@pytest.mark.slow
def test_a_text_is_learned_alike_whether_the_score_of_its_base_is_shown_or_not(novelist: Base) -> None:
    seen: list[list[object]] = []
    for score_base in (True, False):
        session = novelist.session(seed=1, window=256, context=256, learning_rate=0.1)
        events = list(scoring(session, prose(novelist, 1500), score_base=score_base))
        assert any(isinstance(event, RolledBack) for event in events), "the guard must have had to act"
        told = [{**event.as_dict(), "base_nll": None, "seconds": None} for event in events]
        seen.append([told, session.adapter.snapshot().tolist()])
        session.discard()
    assert seen[0] == seen[1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["random bytes", "one word"])
def test_garbage_in_the_middle_costs_at_most_one_percent_and_the_text_after_it_still_gains(
    novelist: Base, kind: str
) -> None:
    if kind == "random bytes":
        draw = random.Random(0)
        garbage = novelist.encode(bytes(draw.randrange(256) for _ in range(10_000)).decode("latin-1"))[:4000]
    else:
        garbage = novelist.encode(" never" * 5000)[:4000]
    ids = prose(novelist, 3000)
    change, events = attacked(novelist, ids[:1500] + garbage + ids[1500:])
    assert change <= 0.01
    assert any(isinstance(e, ChunkSkipped) for e in events)
    scored = [e for e in events if e.kind == "chunk_scored"]
    after = [e for e in scored if e.start > 1500 + len(garbage)]
    gain = sum(e.base_nll - e.adapted_nll for e in after)
    assert gain > -0.01 * sum(e.tokens for e in after)


@pytest.mark.slow
def test_a_text_that_becomes_another_one_is_learned_anew(novelist: Base) -> None:
    """What a table of numbers teaches is worth much on the table and harmful on the prose after it."""
    table = "".join(f"{n * 2654435761 % 2**32:08x} {n * 40503 % 65536:04x}\n" for n in range(1, 600))
    writer = novelist.session(seed=2, learning_rate=0.0)
    writer.read("The old captain looked at the sea. ")
    for _ in writer.write(2500, temperature=0.8):
        pass
    ids = novelist.encode(table)[:6000]
    assert len(ids) == 6000
    change, events = attacked(novelist, ids + writer.ids[1:])
    scored = [e for e in events if isinstance(e, ChunkScored)]
    on_prose = [e for e in scored if e.start > len(ids) + 800]
    lost = sum(e.adapted_nll - (e.base_nll or 0.0) for e in on_prose) / sum(e.tokens for e in on_prose)
    assert change < -0.2
    assert lost < 0.03, "nats per token"
    assert any(isinstance(e, RolledBack) for e in events), "harmless, so this proves nothing"


def test_a_start_that_harms_goes_although_nothing_is_ever_learned() -> None:
    base = templora.load(model=tiny_llama(), tokenizer=ByteTokenizer())
    wishes = {"seed": 1, "window": 32, "context": 32, "chunk": 32}
    bare = base.session(**wishes)
    for name, site in named(base.model, bare.adapter.sites):
        layer = name.removeprefix(PEFT_PREFIX)
        base.start |= {layer + A: site.a.detach(), layer + B: torch.full_like(site.b, 0.02)}
    events = list(scoring(base.session(**wishes), [7] * 640))
    assert sum(isinstance(event, ChunkSkipped) for event in events) > 10, "repetition is not learned"
    assert [type(event) for event in events].count(RolledBack) == 2
    scored = [event for event in events if isinstance(event, ChunkScored)]
    assert scored[0].adapted_nll > (scored[0].base_nll or 0.0) + 4, "harmless, so this proves nothing"
    assert scored[-1].adapted_nll == scored[-1].base_nll


def test_nan_gradients_drop_the_update_and_the_text_goes_on() -> None:
    base = templora.load(model=tiny_llama(), tokenizer=ByteTokenizer())
    session = base.session(seed=1, window=32, chunk=16, context=32)
    ids = base.encode(" ".join((ROOT / "LICENSE").read_text("utf-8").split()))[:400]
    broken = iter([False, False, True, False])
    norm = base.model.model.norm

    def spoil(_: torch.nn.Module, __: object, output: torch.Tensor) -> None:
        if output.requires_grad and next(broken, False):
            output.register_hook(lambda gradient: gradient * torch.nan)

    handle = norm.register_forward_hook(spoil)
    events = list(scoring(session, ids))
    handle.remove()
    scores = Scores()
    for event in events:
        scores.take(event)
    assert scores.guarded["not_finite"] == 1
    assert [e.code for e in events if isinstance(e, Warned)] == ["not_finite"]
    assert bool(torch.isfinite(session.adapter.flat).all())
    learned = [e for e in events if isinstance(e, ChunkLearned)]
    assert [e.version for e in learned] == list(range(1, len(learned) + 1))
    assert len(learned) > 10
