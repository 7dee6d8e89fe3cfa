"""Learning while writing: what is written is fixed by the chunks, whatever the threads do."""

import sys
import threading
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from templora.adapter import Adapter
from templora.base import Base
from templora.cli import app
from templora.decoder import Decoder
from templora.errors import OutOfMemory, SessionClosed, TemploraError
from templora.events import ChunkLearned, ChunkScored, ChunkWritten, End, Event, RolledBack, Token
from templora.learner import Learner
from templora.parallel import ParallelSession, twin_of
from templora.passes import Passes
from templora.recipe import load as load_recipe
from templora.sampling import Sampler, Sampling
from templora.study import Study
from templora.window import fit
from tests.sessions import BASE, PROSE
from tests.sessions import SIZES as FAST
from tests.sessions import base as new_base

KINDS = pytest.mark.parametrize(
    "kind",
    [
        {},
        {"cache": "recompute"},
        {"cache": "base"},
        {"context_from": "recompute"},
        {"dropout": 0.1, "epochs": 2},
        {"guard": True},
    ],
    ids=str,
)


def session(base: Base = BASE, **changes: Any) -> ParallelSession:
    """A session that has read PROSE."""
    made = base.session("default", seed=7, parallel=True, **(FAST | changes))
    made.read(PROSE)
    return made


def written(made: Any, *numbers: int) -> list[Event]:
    """All events of writing so many tokens, and so many more."""
    return [event for tokens in numbers for event in made.write(tokens)]


def scores(events: list[Event]) -> list[tuple[int, float, float | None]]:
    return [(e.chunk, e.adapted_nll, e.base_nll) for e in events if isinstance(e, ChunkScored)]


def timeless(events: list[Event]) -> list[dict[str, Any]]:
    """Events without what a clock says."""
    return [{k: v for k, v in event.as_dict().items() if k != "seconds"} for event in events]


class InSequence:
    """The same staleness with one thread and two models: learn at once, show it a chunk later."""

    def __init__(self, **changes: Any) -> None:
        recipe = load_recipe("default", FAST | changes)
        reader, self.writer = new_base(), new_base()
        self.plan = fit(recipe.window, recipe.chunk, recipe.context, 128, sinks=recipe.sinks)
        self.adapter = Adapter(reader.model, recipe, 7)
        passes = Passes(reader, self.adapter, self.plan, recipe)
        self.study = Study(passes, Learner(self.adapter, recipe, 7), recipe)
        self.follower = Adapter(self.writer.model, recipe, 7)
        self.decoder = Decoder(self.writer, self.follower, self.plan, recipe.cache)
        self.sampler = Sampler(7)
        self.processors = Sampling.of(self.writer.model.generation_config).processors([256])
        self.ids: list[int] = []
        self.own: list[bool] = []
        self.went_back = False
        self.versions = [self.adapter.snapshot()]  # before chunk 0, after it, after chunk 1, …
        self.scores: list[tuple[int, float, float | None]] = []

    def give(self, ids: list[int]) -> None:
        self.ids += ids
        self.own += [False] * len(ids)
        self.learn()

    def write(self, tokens: int) -> None:
        for _ in range(tokens):
            span = self.plan.span(len(self.versions) - 1)
            logits = self.decoder.logits(self.ids, span)
            token = self.sampler.draw(logits, self.ids[span.visible :], self.processors, greedy=False)
            self.ids.append(token)
            self.own.append(True)
            self.learn()

    def learn(self) -> None:
        while len(self.ids) >= (span := self.plan.span(len(self.versions) - 1)).stop:
            own = sum(self.own[span.start : span.stop])
            events = self.study.finish(self.ids, span, own, score_base=own > 0)
            self.scores += scores(events)
            self.versions.append(self.adapter.snapshot())
            # What the writer knows from here on: all, or all but this chunk.
            self.follower.restore(self.versions[-2 if own else -1], 0)
            if self.went_back:  # a chunk late, as all that the writer knows
                self.decoder.forget()
            back = any(isinstance(event, RolledBack) for event in events)
            self.went_back = back and own > 0
            if back and not own:
                self.decoder.forget()


@KINDS
def test_it_writes_what_the_same_staleness_writes_in_sequence(kind: dict[str, Any]) -> None:
    expected = InSequence(**kind)
    expected.give([256, *BASE.encode(PROSE)])
    read = len(expected.scores)
    expected.write(90)
    made = session(**kind)
    events = written(made, 90)
    assert made.ids == expected.ids
    assert scores(events) == expected.scores[read:]
    assert torch.equal(made.adapter.flat, expected.versions[-1])


def test_a_chunk_more_or_less_of_staleness_would_show() -> None:
    keys: dict[str, Any] = {"cache": "recompute"}
    made, in_turn = session(**keys), BASE.session("default", seed=7, **(FAST | keys))
    written(made, 90)
    in_turn.read(PROSE)
    written(in_turn, 90)
    # The first own chunk is the one that PROSE ends in; both write it knowing all before it.
    same = made.plan.span(len(PROSE) // 16).stop
    assert made.ids[:same] == in_turn.ids[:same]
    assert made.ids != in_turn.ids


@KINDS
def test_the_same_seed_gives_the_same_text_and_events(kind: dict[str, Any]) -> None:
    first, again = session(**kind), session(**kind)
    assert timeless(written(first, 70)) == timeless(written(again, 70))
    assert first.text == again.text
    assert torch.equal(first.adapter.flat, again.adapter.flat)


@KINDS
def test_writing_twice_is_writing_once(kind: dict[str, Any]) -> None:
    whole, parts = session(**kind), session(**kind)
    written(whole, 90)
    written(parts, 29, 0, 41, 20)
    assert parts.ids == whole.ids
    assert torch.equal(parts.adapter.flat, whole.adapter.flat)


def test_what_else_draws_random_numbers_does_not_matter() -> None:
    torch.manual_seed(99)
    expected = torch.rand(60)
    torch.manual_seed(99)
    made, drawn = session(dropout=0.1), list[torch.Tensor]()
    for event in made.write(60):
        if isinstance(event, Token):
            drawn.append(torch.rand(1))
    other = session(dropout=0.1)
    written(other, 60)
    assert made.text == other.text
    assert torch.equal(torch.cat(drawn), expected)


def test_a_chunk_is_learned_while_the_next_is_written_and_its_events_come_at_the_next_chunks_end() -> None:
    events = [e for e in written(session(), 64) if not isinstance(e, Token)]
    chunks = [(type(e), e.chunk) for e in events if isinstance(e, ChunkWritten | ChunkScored | ChunkLearned)]
    first, last = chunks[0][1], chunks[-1][1]
    expected: list[tuple[type, int]] = [(ChunkWritten, first)]
    for chunk in range(first, last):
        expected += [(ChunkScored, chunk), (ChunkLearned, chunk), (ChunkWritten, chunk + 1)]
    assert chunks == [*expected, (ChunkScored, last), (ChunkLearned, last)]
    end = events[-1]
    assert isinstance(end, End)
    assert end.scored_tokens == 16 * (last - first + 1)


@contextmanager
def held(made: ParallelSession) -> Generator[threading.Event]:
    """Whatever the session learns waits for the event; afterwards it is set."""
    release = threading.Event()

    def hold(*_: object) -> None:
        if threading.current_thread() is not threading.main_thread():  # the writer has the same hooks
            assert release.wait(30)

    handle = made.passes.base.model.register_forward_pre_hook(hold)
    inner = made.passes.base.model.base_model.register_forward_pre_hook(hold)
    try:
        yield release
    finally:
        release.set()
        handle.remove()
        inner.remove()


def test_a_whole_chunk_is_written_while_one_is_being_learned() -> None:
    made, whole = session(), session()
    version = made.adapter.version
    with held(made) as release:
        loop = made.write(100)
        chunks = (e.chunk for e in loop if isinstance(e, ChunkWritten))
        first = next(chunks)
        while len(made.ids) < made.plan.span(first + 1).stop - 1:
            next(loop)
        assert made.adapter.version == version
        release.set()
        list(loop)
    written(whole, 100)
    assert made.ids == whole.ids


def test_the_base_is_bare_at_every_event_and_bit_identical() -> None:
    base = new_base()
    modules, tensors = list(base.model.modules()), base.fingerprint()
    ids = torch.arange(1, 30).unsqueeze(0)
    with torch.no_grad():
        logits = base.model(ids).logits
    made = session(base)
    for _ in made.write(80):
        assert all(a is b for a, b in zip(base.model.modules(), modules, strict=True))
        with torch.no_grad():
            assert torch.equal(base.model(ids).logits, logits)
    assert made.adapter.version > 4
    made.discard()
    assert base.fingerprint() == tensors
    assert not any(p.requires_grad or p.grad is not None for p in base.model.parameters())


def test_the_twin_shares_every_tensor_and_no_module() -> None:
    base = new_base()
    twin = twin_of(base, "mend it")
    for kind in (nn.Module.named_parameters, nn.Module.named_buffers):
        own, other = dict(kind(base.model)), dict(kind(twin.model))
        assert own.keys() == other.keys()
        assert all(own[name] is other[name] for name in own)
    assert not {id(m) for m in base.model.modules()} & {id(m) for m in twin.model.modules()}


def test_what_is_given_is_never_stale() -> None:
    # Keys made again, so that only the adapter's version can differ.
    keys: dict[str, Any] = {"cache": "recompute"}
    made, in_turn = session(**keys), BASE.session("default", seed=7, **(FAST | keys))
    in_turn.read(PROSE)
    left = made.plan.span(made.chunk).stop - len(made.ids)
    # The first own chunk is learned by both before anything shows, so up to its end both are alike.
    written(made, left)
    written(in_turn, left)
    for each in (made, in_turn):
        each.read(PROSE[: 2 * 16])
    written(made, 16)
    written(in_turn, 16)
    assert made.ids == in_turn.ids


def test_reading_scores_as_in_turn_to_the_last_token() -> None:
    made, in_turn = (BASE.session("default", seed=7, parallel=p, **FAST) for p in (True, False))
    events = [list(each.reading(PROSE, score_base=True)) for each in (made, in_turn)]
    assert timeless(events[0]) == timeless(events[1])
    rest = [list(each.score_rest(score_base=True)) for each in (made, in_turn)]
    assert timeless(rest[0]) == timeless(rest[1]) != []


@KINDS
def test_a_state_continues_bit_for_bit(kind: dict[str, Any]) -> None:
    continues(25, **kind)


@pytest.mark.parametrize("stop", [3, 6, 23, 40])
def test_a_state_may_be_taken_at_any_event(stop: int) -> None:
    continues(stop)


def continues(stop: int, **kind: Any) -> None:
    """A session whose loop was left after so many events goes on in another one as by itself."""
    made = session(**kind)
    loop = made.write(70)
    for _ in islice(loop, stop):
        pass
    state, at = made.state(), len(made.ids)
    resumed = BASE.session("default", seed=7, parallel=True, **(FAST | kind))
    written(resumed, 40)  # whatever it was before
    resumed.load_state(state)
    assert len(resumed.ids) == at
    list(loop)
    written(resumed, len(made.ids) - at)
    assert resumed.ids == made.ids
    assert resumed.text == made.text
    assert torch.equal(resumed.adapter.flat, made.adapter.flat)
    assert resumed.study.guard.state() == made.study.guard.state()
    undisturbed = session(**kind)
    written(undisturbed, 70)
    assert made.ids == undisturbed.ids


def test_a_state_can_be_stored(tmp_path: Path) -> None:
    made = session()
    written(made, 30)
    torch.save(made.state(), tmp_path / "state")
    resumed = BASE.session("default", seed=7, parallel=True, **FAST)
    resumed.load_state(torch.load(tmp_path / "state", weights_only=True))
    written(made, 40)
    written(resumed, 40)
    assert resumed.ids == made.ids


def test_on_disk_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TemploraError, match="on disk learns in turn; leave out parallel"):
        BASE.session(dir=tmp_path / "s", parallel=True)
    assert not (tmp_path / "s").exists()


def test_the_command_writes_the_same_and_says_how_to_go_on(tmp_path: Path) -> None:
    BASE.model.save_pretrained(tmp_path / "tiny")
    BASE.tokenizer.save_pretrained(tmp_path / "tiny")
    args = [PROSE, "--model", str(tmp_path / "tiny"), "--window", "40", "--chunk", "16", "--context", "40"]
    args += ["--set", "learning_rate=5e-3", "--set", "guard=false", "--seed", "7", "--tokens", "60"]
    out, threads = tmp_path / "out.txt", torch.get_num_threads()
    try:
        done = CliRunner().invoke(app, ["write", *args, "--parallel", "--out", str(out)])
        assert torch.get_num_threads() == max(1, threads // 2)
    finally:
        torch.set_num_threads(threads)
    assert done.exit_code == 0, done.stderr
    made = session()
    written(made, 60)
    assert out.read_bytes().decode() == made.text
    assert " --parallel" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("place", [["--session", "s"], ["--prompts", "p.txt", "--out-dir", "texts"]])
def test_the_command_refuses_it_on_disk_and_for_several_texts(place: list[str], tmp_path: Path) -> None:
    args = [str(tmp_path / word) if index % 2 else word for index, word in enumerate(place)]
    done = CliRunner().invoke(app, ["write", "--parallel", *args])
    assert done.exit_code == 2
    assert "leave out --parallel" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_translation_is_refused() -> None:
    with pytest.raises(TemploraError, match="learns in turn; leave out parallel"):
        session().translate([], "German", "English")


def test_it_may_be_discarded_while_a_chunk_is_being_learned() -> None:
    made = session()
    with held(made) as release:
        loop = made.write(60)
        next(e for e in loop if isinstance(e, ChunkWritten))
        threading.Timer(0.2, release.set).start()
        made.discard()
    text = made.text
    with pytest.raises(SessionClosed):
        list(loop)
    with pytest.raises(SessionClosed):
        made.state()
    made.discard()
    assert made.text == text
    assert BASE.fingerprint() == new_base().fingerprint()


@contextmanager
def failing(made: ParallelSession, error: BaseException) -> Generator[list[bool]]:
    """The first pass that learns fails."""
    once = [True]

    def fail(*_: object) -> None:
        if once and threading.current_thread() is not threading.main_thread():
            once.clear()
            raise error

    handle = made.passes.base.model.base_model.register_forward_hook(fail)
    try:
        yield once
    finally:
        handle.remove()


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB."), OutOfMemory),
        (ValueError("anything"), ValueError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
    ids=["memory", "bug", "interrupt"],
)
def test_what_goes_wrong_while_learning_surfaces_and_nothing_is_lost(
    error: BaseException, raised: type[BaseException]
) -> None:
    made, whole = session(), session()
    before, version = len(made.ids), made.adapter.version
    with failing(made, error) as once:
        with pytest.raises(raised):
            written(made, 60)
        assert not once
    assert made.adapter.version == version
    assert BASE.fingerprint() == new_base().fingerprint()
    events = written(made, 60)
    written(whole, len(made.ids) - before)
    assert made.ids == whole.ids
    assert torch.equal(made.adapter.flat, whole.adapter.flat)
    learned = [e.chunk for e in events if isinstance(e, ChunkLearned)]
    assert learned == list(range(learned[0], made.chunk))


def test_a_given_chunk_that_failed_is_learned_before_anything_is_written() -> None:
    made, whole = session(), session()
    with failing(made, MemoryError()), pytest.raises(OutOfMemory):
        made.read(PROSE)
    whole.read(PROSE)
    written(made, 40)
    written(whole, 40)
    assert made.ids == whole.ids
    assert torch.equal(made.adapter.flat, whole.adapter.flat)


def test_two_at_once_do_not_know_of_each_other() -> None:
    alone = session()
    written(alone, 60)
    pair = [session(), session()]
    loops = [made.write(60) for made in pair]
    for _ in zip(*loops, strict=True):
        pass
    assert [made.ids for made in pair] == [alone.ids] * 2


def test_with_gradients_switched_off_it_learns_all_the_same() -> None:
    made, whole = session(), session()
    with torch.no_grad():
        written(made, 60)
    written(whole, 60)
    assert torch.equal(made.adapter.flat, whole.adapter.flat)


def test_a_loop_that_is_left_is_settled_by_hand() -> None:
    made = session()
    version = made.adapter.version
    loop = made.write(60)
    next(e for e in loop if isinstance(e, ChunkWritten))
    made.settle()
    assert made.adapter.version == version + 1


def test_a_hook_works_in_both_threads_whenever_it_is_set() -> None:
    base = new_base()
    made, calls = session(base), set[str]()
    layer = base.model.model.layers[0].mlp

    def noted(*_: Any) -> None:
        calls.add(threading.current_thread().name)

    handle = layer.register_forward_hook(noted)
    list(made.write(60))
    assert any(name.startswith("templora") for name in calls), "the learner's"
    assert threading.current_thread().name in calls, "the writer's"
    handle.remove()
    calls.clear()
    list(made.write(40))
    assert not calls


def test_sessions_that_begin_in_several_threads_are_each_their_seeds() -> None:
    bases = [new_base() for _ in range(4)]
    alone = [base.session(seed=seed).adapter.flat.clone() for seed, base in enumerate(bases)]
    interval, before = sys.getswitchinterval(), torch.random.get_rng_state()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as pool:
            for _ in range(6):
                made = pool.map(lambda base, seed: base.session(seed=seed), bases, range(4))
                assert all(torch.equal(a.adapter.flat, b) for a, b in zip(made, alone, strict=True))
    finally:
        sys.setswitchinterval(interval)
    assert torch.equal(torch.random.get_rng_state(), before), "the user's random numbers"
