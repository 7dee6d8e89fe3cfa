"""One text in time: the same seed, the same text, however its loop is left, cut or interleaved."""

import gc
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessor, LogitsProcessorList

import templora
from templora.base import Base
from templora.errors import (
    InvalidRecipe,
    InvalidText,
    OutOfMemory,
    SessionClosed,
    SessionInUse,
    TemploraError,
)
from templora.events import (
    ChunkLearned,
    ChunkScored,
    ChunkWritten,
    End,
    Event,
    Token,
    Warned,
)
from templora.sampling import Sampling
from templora.session import Session
from templora.testing import ByteTokenizer, ScriptedModel, tiny_llama

PROSE = "The lighthouse keeper climbed the stairs each evening, counting them aloud."
SIZES: dict[str, Any] = {"window": 40, "chunk": 16, "context": 40}
# Small enough that many chunks pass in a test, and fast enough that a version more or less shows in the text.
FAST: dict[str, Any] = SIZES | {"learning_rate": 5e-3, "guard": False, "warmup_chunks": 0}
MODEL = tiny_llama(initializer_range=0.2)
BASE = templora.load(model=MODEL, tokenizer=ByteTokenizer())
FIXED = torch.arange(1, 30).unsqueeze(0)
KINDS = pytest.mark.parametrize(
    "kind",
    [
        {},
        {"cache": "reuse"},
        {"cache": "base"},
        {"context_from": "recompute"},
        {"dropout": 0.1, "epochs": 2},
        {"context": 20},
        {"guard": True},
    ],
    ids=str,
)


def session(seed: int = 7, base: Base = BASE, **changes: Any) -> Session:
    """A session that has read PROSE."""
    made = base.session("default", seed=seed, **(FAST | changes))
    made.read(PROSE)
    return made


def text_after(made: Session, *numbers: int, **wishes: Any) -> str:
    for tokens in numbers:
        for _ in made.write(tokens, **wishes):
            pass
    return made.text


def timeless(events: Iterator[Event] | list[Event]) -> list[dict[str, Any]]:
    """Events without what a clock says."""
    return [{k: v for k, v in event.as_dict().items() if k != "seconds"} for event in events]


@KINDS
def test_the_same_seed_gives_the_same_text_and_another_does_not(kind: dict[str, Any]) -> None:
    first, again, other = session(**kind), session(**kind), session(seed=8, **kind)
    assert text_after(first, 60) == text_after(again, 60)
    assert first.ids == again.ids
    assert torch.equal(first.adapter.flat, again.adapter.flat)
    assert text_after(other, 60) != first.text


def test_the_same_seed_gives_the_same_events() -> None:
    first, again = (timeless(session().write(60)) for _ in range(2))
    assert first == again


def test_streamed_token_by_token_or_all_at_once_the_text_is_the_same() -> None:
    streamed = session()
    pieces: list[str] = []
    for event in streamed.write(80):
        if isinstance(event, Token):
            pieces.append(event.text)
            assert streamed.text == PROSE + "".join(pieces)
    whole = session()
    list(whole.write(80))
    assert streamed.text == whole.text == PROSE + "".join(pieces)


def test_what_else_draws_random_numbers_does_not_matter() -> None:
    made = session(dropout=0.1)
    torch.manual_seed(99)
    for _ in made.write(60):
        torch.rand(3)
    assert made.text == text_after(session(dropout=0.1), 60)


def test_a_session_leaves_torchs_generator_alone() -> None:
    before = torch.random.get_rng_state()
    text_after(session(dropout=0.1), 40)
    assert torch.equal(torch.random.get_rng_state(), before)


@KINDS
def test_writing_twice_is_writing_once(kind: dict[str, Any]) -> None:
    whole, halves = session(**kind), session(**kind)
    text_after(whole, 70)
    text_after(halves, 29, 0, 41)
    assert halves.ids == whole.ids
    assert halves.text == whole.text
    assert torch.equal(halves.adapter.flat, whole.adapter.flat)


@settings(max_examples=15)
@given(cuts=st.lists(st.integers(1, 60), max_size=6))
@example(cuts=[1])
def test_reading_in_pieces_is_reading_at_once(cuts: list[int]) -> None:
    whole, pieces = BASE.session(seed=7, **FAST), BASE.session(seed=7, **FAST)
    expected = timeless(whole.reading(PROSE))
    events: list[Event] = []
    rest = PROSE
    for cut in cuts:
        if piece := rest[:cut]:
            events += pieces.reading(piece)
        rest = rest[cut:]
    if rest:
        events += pieces.reading(rest)
    assert timeless(events) == expected
    assert pieces.ids == whole.ids
    assert pieces.text == whole.text == PROSE
    assert torch.equal(pieces.adapter.flat, whole.adapter.flat)


def test_reading_scores_each_token_but_the_first_once_until_a_chunk_is_full() -> None:
    made = BASE.session(seed=7, **FAST)
    events = list(made.reading(PROSE))
    scored = [e for e in events if isinstance(e, ChunkScored)]
    # One token more than the text: what the base puts before any text.
    assert len(made.ids) == 1 + len(PROSE)
    assert [(e.chunk, e.start, e.tokens) for e in scored] == [
        (n, 1 + 16 * n, 16) for n in range(len(PROSE) // 16)
    ]
    assert [type(e) for e in events[:2]] == [ChunkScored, ChunkLearned]


def test_reading_says_what_it_came_to() -> None:
    made = BASE.session(seed=7, **FAST)
    reading = made.read(PROSE, score_base=True)
    assert reading.tokens == len(PROSE), "what the base puts before a text was not read"
    assert reading.scored_tokens == len(PROSE) // 16 * 16
    assert reading.base_perplexity is not None
    assert reading.adapted_perplexity is not None
    short = made.read("ab")
    assert (short.tokens, short.scored_tokens, short.adapted_perplexity) == (2, 0, None)


def test_what_was_read_and_not_learned_is_learned_when_its_chunk_is_full() -> None:
    made = session()
    waiting = (len(made.ids) - 1) % 16
    events = list(made.write(16))
    written = next(e for e in events if isinstance(e, ChunkWritten))
    assert 0 < waiting < 16
    assert (written.tokens, written.written) == (16, 16 - waiting)


def test_a_chunk_is_written_scored_learned_in_this_order() -> None:
    events = [type(e) for e in session().write(40) if not isinstance(e, Token)]
    cycle = [ChunkWritten, ChunkScored, ChunkLearned]
    assert events[:-1] == cycle * (len(events) // 3)
    assert events[-1] is End


def test_the_end_says_what_happened() -> None:
    made = session()
    *events, end = list(made.write(40))
    assert isinstance(end, End)
    scored = [e for e in events if isinstance(e, ChunkScored)]
    assert (end.reason, end.tokens) == ("tokens", 40)
    assert end.scored_tokens == sum(e.tokens for e in scored)
    assert sum(isinstance(e, Token) for e in events) == 40
    assert [e.index for e in events if isinstance(e, Token)] == list(range(len(made.ids) - 40, len(made.ids)))


def test_nothing_to_write_writes_nothing() -> None:
    made = session()
    (end,) = list(made.write(0))
    assert isinstance(end, End)
    assert (end.tokens, made.text) == (0, PROSE)


@pytest.mark.parametrize(
    "use",
    [
        lambda made: made.write(3),
        lambda made: list(made.write(3)),
        lambda made: made.read("more"),
        lambda made: list(made.reading("more")),
    ],
)
def test_after_a_discard_any_use_is_refused_and_the_text_stays(use: Any) -> None:
    made = session()
    made.discard()
    with pytest.raises(SessionClosed, match="make a new one"):
        use(made)
    assert made.text == PROSE
    made.discard()


def test_after_a_discard_nothing_is_kept_but_the_text() -> None:
    made = session()
    list(made.write(40))
    held = [weakref.ref(part) for part in (made.learner, made.study, made.passes, made.decoder.cache)]
    made.discard()
    gc.collect()
    assert [part() for part in held] == [None] * 4


def test_a_loop_that_is_open_when_its_session_is_discarded_is_refused() -> None:
    made = session()
    loop = made.write(40)
    next(loop)
    made.discard()
    with pytest.raises(SessionClosed):
        list(loop)
    assert torch.equal(BASE.model(FIXED).logits, MODEL(FIXED).logits)


@pytest.mark.parametrize("kind", [Token, ChunkWritten, ChunkLearned])
def test_at_whatever_event_it_was_discarded_the_text_stays(kind: type[Event]) -> None:
    made = session()
    loop = made.write(40)
    next(event for event in loop if isinstance(event, kind))
    made.discard()
    text = made.text
    with pytest.raises(SessionClosed):
        list(loop)
    assert made.text == text


@KINDS
def test_two_sessions_on_one_base_do_not_know_of_each_other(kind: dict[str, Any]) -> None:
    alone = [text_after(session(seed, **kind), 50) for seed in (1, 2)]
    pair = [session(seed, **kind) for seed in (1, 2)]
    loops = [made.write(50) for made in pair]
    for _ in zip_longest(*loops):  # one event of each in turn
        pass
    assert [made.text for made in pair] == alone


def test_a_session_after_another_finds_a_fresh_base() -> None:
    first = text_after(session(), 40)
    one = session(seed=3)
    text_after(one, 40)
    one.discard()
    assert text_after(session(), 40) == first


@settings(max_examples=12)
@given(
    stops=st.lists(st.integers(1, 30), min_size=1, max_size=3),
    kind=st.sampled_from(["reuse", "recompute", "base"]),
)
def test_the_loop_may_be_left_at_any_event_and_taken_up_again(stops: list[int], kind: str) -> None:
    left = session(cache=kind)
    before = len(left.ids)
    for stop in stops:
        loop: Any = left.write(100)
        with closing(loop):
            for _ in islice(loop, stop):
                pass
    written = len(left.ids) - before
    whole = session(cache=kind)
    text_after(whole, written + 20)
    text_after(left, 20)
    assert left.ids == whole.ids
    assert left.text == whole.text
    assert torch.equal(left.adapter.flat, whole.adapter.flat)


@settings(max_examples=10)
@given(stop=st.integers(1, 20))
def test_reading_may_be_left_at_any_event_and_is_finished_by_what_comes_next(stop: int) -> None:
    left, whole = (BASE.session(seed=7, **FAST) for _ in range(2))
    loop: Any = left.reading(PROSE)
    with closing(loop):
        for _ in islice(loop, stop):
            pass
    whole.read(PROSE)
    assert text_after(left, 20) == text_after(whole, 20)
    assert torch.equal(left.adapter.flat, whole.adapter.flat)


@KINDS
def test_between_two_events_the_model_is_bare(kind: dict[str, Any]) -> None:
    with torch.no_grad():
        bare = MODEL(FIXED).logits
        modules = dict(MODEL.named_modules())
        made = BASE.session("default", seed=7, **(FAST | kind))
        seen = 0
        for event in made.reading(PROSE):
            seen += 1
            assert torch.equal(MODEL(FIXED).logits, bare), event
        for event in made.write(30):
            seen += 1
            assert torch.equal(MODEL(FIXED).logits, bare), event
            assert dict(MODEL.named_modules()) == modules
        assert made.adapter.version > 2
        assert seen > 30


@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad])
def test_what_the_caller_does_with_gradients_does_not_matter(context: Any) -> None:
    with context():
        made = session()
        enabled = torch.is_grad_enabled()
        for _ in made.write(40):
            assert torch.is_grad_enabled() == enabled
    assert made.text == text_after(session(), 40)


def alphabet() -> Base:
    """Writes the bytes of "abcdefghij" round and round, with an end of the document after "j"."""
    tokenizer = ByteTokenizer()
    ids = [*tokenizer.encode("abcdefghij", add_special_tokens=False), 256]
    circle = dict(zip(ids, [*ids[1:], ids[0]], strict=True))
    return templora.load(model=ScriptedModel(circle), tokenizer=tokenizer)


PLAIN: dict[str, Any] = {"temperature": 0.0, "repetition_penalty": 1.0}


@pytest.mark.parametrize(
    ("stop", "written"),
    [(["d"], "bcd"), (["cde"], "bcde"), (["x", "ef"], "bcdef"), (["bcdefghi"], "bcdefghi")],
)
def test_a_stop_string_ends_the_text_after_it(stop: list[str], written: str) -> None:
    made = alphabet().session(seed=1, **FAST)
    made.extend(made.base.encode("a"), "a")
    *_, end = list(made.write(40, stop=stop, **PLAIN))
    assert isinstance(end, End)
    assert (end.reason, end.tokens) == ("stop", len(written))
    assert made.text == "a" + written


def test_a_stop_string_in_the_prompt_does_not_count() -> None:
    made = alphabet().session(seed=1, **FAST)
    made.extend(made.base.encode("bca"), "bca")
    *_, end = list(made.write(4, stop=["ca", "ab"], **PLAIN))
    assert isinstance(end, End)
    assert end.reason == "tokens"


def test_a_document_ends_where_the_model_ends_it_if_that_is_wished() -> None:
    made = alphabet().session(seed=1, **FAST)
    made.extend(made.base.encode("a"), "a")
    *_, end = list(made.write(40, stop_at_eos=True, **PLAIN))
    assert isinstance(end, End)
    assert (end.reason, end.tokens) == ("eos", 9)
    assert made.text == "abcdefghij"
    assert 256 not in made.ids[1:]


def test_otherwise_the_end_is_never_drawn() -> None:
    made = alphabet().session(seed=1, **FAST)
    made.extend(made.base.encode("a"), "a")
    *_, end = list(made.write(40, **PLAIN))
    assert isinstance(end, End)
    assert (end.reason, end.tokens) == ("tokens", 40)
    assert 256 not in made.ids[1:]


def test_temperature_0_does_not_depend_on_the_seed_of_sampling() -> None:
    texts = {text_after(session(learning_rate=0.0, seed=seed), 30, temperature=0.0) for seed in (1, 2, 3)}
    assert len(texts) == 1


def test_an_empty_text_is_refused_and_an_empty_prompt_begins_where_the_base_does() -> None:
    made = BASE.session(seed=1, **FAST)
    with pytest.raises(InvalidText, match="at least one character"):
        made.read("")
    assert made.ids == []
    text_after(made, 5)
    assert made.ids[0] == 256
    assert len(made.ids) == 6
    bare = templora.load(model=tiny_llama()).session(seed=1, **FAST)
    with pytest.raises(InvalidText, match="give a prompt"):
        bare.write(5)


class NaNOnce:
    """A forward hook that spoils the hidden states of one training pass, after letting some pass."""

    def __init__(self, after: int = 0) -> None:
        self.passes = after

    def __call__(self, _module: object, _inputs: object, output: Any) -> None:
        if torch.is_grad_enabled() and output.last_hidden_state.requires_grad:
            if self.passes == 0:
                output.last_hidden_state = output.last_hidden_state * float("nan")
            self.passes -= 1


@pytest.mark.parametrize("guard", [False, True])
@pytest.mark.parametrize("epochs", [1, 2])
def test_a_loss_that_is_not_a_number_drops_the_update_and_the_text_goes_on(guard: bool, epochs: int) -> None:
    # A context of its own makes the learning pass another one than the pass that scores.
    made = session(guard=guard, epochs=epochs, context=20)
    weights, version = made.adapter.snapshot(), made.adapter.version
    handle = MODEL.model.register_forward_hook(NaNOnce(after=epochs - 1))  # in the last epoch
    try:
        loop = made.write(60)
        warning = next(e for e in loop if isinstance(e, Warned))
        assert warning.code == "not_finite"
        assert "the update was dropped, the text goes on" in warning.message
        assert torch.equal(made.adapter.flat, weights)
        assert made.adapter.version == version
        rest = list(loop)
    finally:
        handle.remove()
    # What the guard makes of the model's own text is for its own tests.
    assert guard or any(isinstance(e, ChunkLearned) for e in rest)
    assert isinstance(rest[-1], End)
    assert torch.isfinite(made.adapter.flat).all()


def test_a_pass_that_both_scores_and_teaches_may_fail_too() -> None:
    made = session()
    handle = MODEL.model.register_forward_hook(NaNOnce())
    try:
        events = list(made.write(60))
    finally:
        handle.remove()
    assert [e.code for e in events if isinstance(e, Warned)] == ["not_finite"]
    assert torch.isfinite(made.adapter.flat).all()
    assert any(isinstance(e, ChunkLearned) for e in events)


def test_out_of_memory_says_what_to_lower_and_the_session_can_go_on() -> None:
    made, once = session(), [True]

    def no_memory(*_: object) -> None:
        if once and torch.is_grad_enabled():
            once.clear()
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")

    handle = MODEL.model.register_forward_hook(no_memory)
    try:
        with pytest.raises(OutOfMemory, match="at window 40, chunk 16, context 40; lower chunk or context"):
            list(made.write(40))
        written = len(made.ids)
        text_after(made, 40)
        assert len(made.ids) == written + 40
        whole = session()
        text_after(whole, len(made.ids) - len(whole.ids))
    finally:
        handle.remove()
    assert made.ids == whole.ids
    assert torch.equal(made.adapter.flat, whole.adapter.flat)


@pytest.mark.parametrize("parallel", [False, True])
def test_an_update_that_had_no_memory_is_made_when_it_is_tried_again(parallel: bool) -> None:
    """What the guard noted of a chunk before its update failed must not count twice."""

    def begun() -> Session:
        made = BASE.session(
            "default", seed=7, parallel=parallel, **(FAST | {"guard": True, "learning_rate": 1e-3})
        )
        made.read(PROSE)
        return made

    made, learner, calls = begun(), None, list[int]()
    learner = made.learner
    backward = learner._backward  # pyright: ignore[reportPrivateUsage]

    def no_memory(nll: torch.Tensor) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        backward(nll)

    learner._backward = no_memory  # pyright: ignore[reportPrivateUsage]
    with pytest.raises(OutOfMemory):
        list(made.write(150, temperature=1.0))
    whole = begun()
    text_after(made, 150 - (len(made.ids) - len(whole.ids)), temperature=1.0)
    text_after(whole, 150, temperature=1.0)
    assert len(calls) > 3
    assert made.ids == whole.ids
    assert torch.equal(made.adapter.flat, whole.adapter.flat)


def test_a_state_may_be_loaded_more_than_once() -> None:
    first = session()
    text_after(first, 40)
    state, texts = first.state(), list[str]()
    for _ in range(2):
        other = BASE.session("default", seed=7, **FAST)
        other.load_state(state)
        text_after(other, 60)
        texts.append(other.text)
    assert texts[0] == texts[1]


@pytest.mark.parametrize("place", ["mlp", "self_attn.v_proj", "mlp.down_proj"])
def test_a_hook_on_the_model_works_in_each_pass(place: str) -> None:
    """As those of people who steer a model do: here base and adapter that learns nothing must agree."""
    made = BASE.session("default", seed=7, **(FAST | {"learning_rate": 0.0}))
    plain = BASE.session("default", seed=7, **(FAST | {"learning_rate": 0.0}))
    layer: Any = MODEL.model.layers[1]
    handle = layer.get_submodule(place).register_forward_hook(lambda _m, _i, output: 1.5 * output)
    try:
        events = [*made.reading(PROSE, score_base=True), *made.write(40)]
    finally:
        handle.remove()
    scored = [event for event in events if isinstance(event, ChunkScored)]
    assert len(scored) > 5
    for event in scored:
        assert event.adapted_nll == pytest.approx(event.base_nll, rel=1e-6)
    unsteered = [e for e in [*plain.reading(PROSE), *plain.write(40)] if isinstance(e, ChunkScored)]
    assert unsteered[0].adapted_nll != pytest.approx(scored[0].adapted_nll, rel=1e-4)
    # A token alone goes the short way, where there is nobody to call.
    step = made.ids[len(made.base.encode(PROSE)) + 1 :]
    assert step and made.ids != plain.ids


def test_a_sampling_option_that_does_not_exist_is_refused() -> None:
    with pytest.raises(InvalidRecipe, match=r"unknown sampling option 'temprature'.*'temperature'"):
        session().write(3, temprature=0.1)
    with pytest.raises(InvalidRecipe, match="sampling and temperature were both given"):
        session().write(3, sampling=Sampling(), temperature=0.1)


def test_sizes_that_nobody_fixed_are_fitted_and_that_is_said_once() -> None:
    made = BASE.session("paper", seed=1)
    assert made.plan.window + made.plan.chunk <= 128
    warnings = [e for e in made.reading(PROSE * 4) if isinstance(e, Warned)]
    assert [w.code for w in warnings] == ["fitted"]
    assert "128 positions" in warnings[0].message
    assert not [e for e in made.write(5) if isinstance(e, Warned)]


def test_a_seed_that_no_generator_takes_is_refused() -> None:
    with pytest.raises(InvalidRecipe, match="up to 18 digits"):
        BASE.session(seed=2**70)


def test_numbers_of_numpy_and_torch_are_numbers(tmp_path: Path) -> None:
    loop = BASE.encode("ab" * 60)
    told: list[list[str]] = []
    for ids, folder in ((loop, None), (torch.tensor(loop), None), (torch.tensor(loop), tmp_path / "s")):
        made = BASE.session(seed=np.int64(7), dir=folder, **FAST | {"guard": True})  # pyright: ignore
        made.extend(ids, "ab" * 60)  # pyright: ignore[reportArgumentType]
        told.append([event.kind for event in made.learning()])
        assert next(e.kind for e in made.write(1)) == "token"
        made.discard()
    assert told[0] == told[1] == told[2]
    assert "chunk_skipped" in told[0], "a repetition is one in every form"


def test_a_base_without_a_tokenizer_works_with_ids() -> None:
    base = templora.load(model=MODEL)
    made = base.session(seed=7, **FAST)
    made.extend([5, 6, 7], "")
    events = list(made.write(30))
    assert made.ids[:3] == [5, 6, 7]
    assert len(made.ids) == 33
    assert {e.text for e in events if isinstance(e, Token)} == {""}
    assert made.text == ""


def test_inside_inference_mode_a_session_says_what_to_do() -> None:
    base = templora.load(model=tiny_llama(), tokenizer=ByteTokenizer())
    session = base.session(seed=1, window=32, chunk=16, context=32)
    with torch.inference_mode(), pytest.raises(TemploraError, match="no_grad"):
        session.read("The lamp was lit.")
    with torch.no_grad():
        assert session.read("The lamp was lit, and the sea was calm.").scored_tokens > 0


def test_what_cannot_be_learned_says_why() -> None:
    made = BASE.session(seed=7, **FAST)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TemploraError, match="autocast"):
        made.read(PROSE)
    with pytest.raises(InvalidText, match="is no character"):
        made.read("half of a character: \ud83d")
    with pytest.raises(InvalidText, match="token 257 is none of this base's 257"):
        made.extend([5, 257], "")
    with pytest.raises(InvalidText, match="a string to stop at is empty"):
        made.write(5, stop=["x", ""])
    assert made.ids == []
    with pytest.raises(InvalidText, match="no tokenizer"):
        templora.load(model=MODEL).session(**FAST).read(PROSE)
    with pytest.raises(InvalidRecipe, match="leave them out"):
        templora.load(model=MODEL, device="cpu")


def test_a_token_that_the_tokenizer_alone_has_leaves_the_session_as_it_was() -> None:
    tokenizer = ByteTokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    made = templora.load(model=tiny_llama(), tokenizer=tokenizer).session(seed=1, **FAST)
    with pytest.raises(InvalidText, match="take its text out"):
        made.read("In HTML one writes <pad> for padding.")
    assert made.read(PROSE).scored_tokens > 0


def test_one_string_to_stop_at_is_one_string() -> None:
    whole = text_after(session(), 60)
    end = whole[len(PROSE) + 20 :][:3]
    assert text_after(session(), 60, stop=end) == whole[: whole.index(end, len(PROSE)) + 3]


def test_with_a_session_it_is_discarded_at_the_end() -> None:
    with BASE.session(seed=7, **FAST) as made:
        made.read(PROSE)
    with pytest.raises(SessionClosed):
        made.read(PROSE)


def test_the_rest_is_scored_after_all_full_chunks() -> None:
    left, plain = (BASE.session(seed=7, **FAST) for _ in range(2))
    events = left.reading(PROSE * 2)
    next(events)
    events.close()
    plain.read(PROSE * 2)
    *_, rest = left.score_rest()
    assert rest == [*plain.score_rest()][-1]
    assert torch.equal(left.adapter.flat, plain.adapter.flat)


def test_threads_take_turns_on_a_base() -> None:
    base = templora.load(model=tiny_llama(initializer_range=0.2), tokenizer=ByteTokenizer())
    before = base.fingerprint()

    def text(seed: int) -> str:
        with base.session(seed=seed, **FAST) as made:
            made.read(PROSE)
            return text_after(made, 60)

    alone = [text(seed) for seed in range(4)]
    with ThreadPoolExecutor(5) as threads:
        made = threads.map(text, range(4))
        others = [(templora.load(model=base.model), base.fingerprint()) for _ in range(20)]
        assert list(made) == alone
    assert {seen for _, seen in others} == {before}, "what looks at the base waits until it is bare"


def test_a_failing_processor_costs_no_token() -> None:
    class Fails(LogitsProcessor):
        calls = 0

        def __call__(self, input_ids: Any, scores: Any) -> Any:
            self.calls += 1
            if self.calls in (1, 20, 33):
                raise ValueError("a user's mistake")
            return scores

    made, plain = session(), session()
    processors = LogitsProcessorList([Fails()])
    while (left := 60 + len(plain.ids) - len(made.ids)) > 0:
        with suppress(ValueError):
            text_after(made, left, processors=processors)
    text_after(plain, 60, processors=LogitsProcessorList())
    assert made.ids == plain.ids
    assert torch.equal(made.adapter.flat, plain.adapter.flat)


def test_a_first_token_that_was_never_drawn_leaves_a_session_that_reads() -> None:
    def stops(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        raise KeyboardInterrupt

    base = templora.load(model=tiny_llama(), tokenizer=ByteTokenizer())
    session, again = (base.session(seed=1, chunk=16) for _ in range(2))
    session.extend([1, 2, 3], "abc")
    with pytest.raises(KeyboardInterrupt):
        list(session.write(5, processors=LogitsProcessorList([stops])))  # pyright: ignore[reportArgumentType]
    again.load_state(session.state())
    assert again.read(PROSE) == session.read(PROSE)


@pytest.mark.parametrize("other", ["read", "write"])
def test_what_is_given_while_a_loop_is_open_stays_one_text(other: str) -> None:
    base = templora.load("novelist")
    session = base.session(seed=1, window=128)
    session.read("The keeper lit the lamp and looked at the sea.")
    loop = session.write(tokens=30)
    list(islice(loop, 10))
    if other == "read":
        session.read(' He said: "Come to ')
    else:
        list(session.write(tokens=7))
    list(loop)
    assert session.text == base.decode(session.ids)


def test_a_draw_that_is_impossible_is_none() -> None:
    session = BASE.session("default", seed=3, **SIZES)
    session.read(PROSE)
    before = session.sampler.draws

    def broken(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores * torch.nan

    with pytest.raises(RuntimeError):
        list(session.write(5, temperature=1.0, processors=LogitsProcessorList([broken])))
    assert session.sampler.draws == before


class Held(LogitsProcessor):
    """Waits within a token's drawing until it is let go."""

    def __init__(self) -> None:
        self.reached, self.let_go = threading.Event(), threading.Event()

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self.reached.set()
        assert self.let_go.wait(60)
        return scores


@pytest.mark.parametrize("kind", ["plain", "parallel", "disk"])
def test_a_session_refuses_a_second_thread(kind: str, tmp_path: Path) -> None:
    """Whatever it asks for, and the first goes on as if nobody had."""

    def texts(place: dict[str, Any], disturb: bool) -> tuple[str, str]:
        held, changes = Held(), place | ({"parallel": True} if kind == "parallel" else {})
        made = session(**changes)
        uses: list[Any] = [
            lambda: made.read("Not now."),
            lambda: next(made.write(3)),
            lambda: made.logprobs("Nor this."),
            lambda: [*made.score_rest()],
            made.state,
            made.discard,
            *([made.close, made.undo, lambda: made.note("here")] if kind == "disk" else []),
        ]
        with ThreadPoolExecutor(1) as other:
            writing = other.submit(lambda: [*made.write(40, processors=LogitsProcessorList([held]))])
            assert held.reached.wait(60)
            for use in uses if disturb else ():
                with pytest.raises(SessionInUse, match="give each a session of its own"):
                    use()
            held.let_go.set()
            writing.result(60)
        text = made.text
        made.read("And in turn any thread may.")
        after = "".join(e.text for e in made.write(20) if isinstance(e, Token))
        made.discard()
        return text, after

    places = [{"dir": tmp_path / name} if kind == "disk" else {} for name in "ab"]
    assert texts(places[0], True) == texts(places[1], False)
