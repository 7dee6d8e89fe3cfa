"""A session on disk: whatever is done to it, the same past gives the same text, adapter and dice."""

import gc
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

import templora
from templora import header
from templora.errors import (
    ON_DISK,
    InvalidRecipe,
    InvalidText,
    NeedsFolder,
    NoSuchMoment,
    NotASession,
    OutputError,
    SessionClosed,
    SessionLocked,
    TemploraError,
    WrongBase,
)
from templora.events import ChunkLearned, Warned
from templora.history import History
from templora.session import Session
from templora.testing import ByteTokenizer, tiny_llama
from templora.window import Plan
from tests.sessions import BASE, PROSE, SIZES, base, durable, in_memory, killed, state, written

KINDS = pytest.mark.parametrize(
    "kind",
    [
        {},
        {"guard": True},
        {"cache": "recompute"},
        {"context_from": "recompute"},
        {"dropout": 0.1, "epochs": 2},
        {"context": 20},
    ],
    ids=str,
)


@KINDS
def test_on_disk_and_in_memory_the_text_is_the_same(tmp_path: Path, kind: dict[str, Any]) -> None:
    there = written(durable(tmp_path / "s", **kind), 90)
    assert state(there) == state(written(in_memory(**kind), 90))


@KINDS
@pytest.mark.parametrize("cut", [1, 5, 16, 43])
def test_what_is_resumed_goes_on_as_if_never_stopped(tmp_path: Path, kind: dict[str, Any], cut: int) -> None:
    whole = state(written(in_memory(**kind), 90))
    closed = written(durable(tmp_path / "closed", **kind), cut)
    closed.close()
    dead = killed(written(durable(tmp_path / "dead", **kind), cut))
    for folder in (closed.dir, dead):
        resumed = templora.resume(folder, base())
        assert state(written(resumed, 90 - cut)) == whole
        assert resumed.store.warnings == []


def test_a_session_without_one_saved_version_is_computed_from_its_beginning(tmp_path: Path) -> None:
    folder = killed(written(durable(tmp_path / "s", save_every=1000), 60))
    assert not list((folder / "versions").iterdir())
    assert state(templora.resume(folder, base())) == state(written(in_memory(), 60))


@KINDS
def test_undo_then_redo_is_the_identity(tmp_path: Path, kind: dict[str, Any]) -> None:
    made = written(durable(tmp_path / "s", **kind), 50)
    before = state(made)
    made.undo()
    made.undo(3)
    made.redo()
    made.redo()
    assert state(made) == before
    assert state(written(made, 40)) == state(written(in_memory(**kind), 90))


def test_undo_takes_back_a_chunk_and_what_was_learned_from_it(tmp_path: Path) -> None:
    made = written(durable(tmp_path / "s"), 22)
    (at_boundary, unfinished) = (1 + 16 * 5, 1 + 16 * 6)
    assert len(made.ids) == 1 + len(PROSE) + 22 == unfinished + 1
    made.undo()
    assert (len(made.ids), made.chunk, made.adapter.version) == (unfinished, 6, 6)
    made.undo()
    assert (len(made.ids), made.chunk, made.adapter.version) == (at_boundary, 5, 5)
    assert state(made) == state(written(in_memory(), at_boundary - 1 - len(PROSE)))


def test_undo_can_go_back_to_the_beginning_and_no_further(tmp_path: Path) -> None:
    made = written(durable(tmp_path / "s"), 20)
    made.undo(6)
    assert (made.text, made.adapter.version) == ("", 0)
    assert bool((made.adapter.b == 0).all())
    with pytest.raises(NoSuchMoment, match=r"cannot undo 1 chunks of .*: it has 0"):
        made.undo()
    made.redo()
    assert made.text.startswith(PROSE)


def test_what_is_written_after_an_undo_cannot_be_overwritten_by_a_redo(tmp_path: Path) -> None:
    made = written(durable(tmp_path / "s"), 20)
    made.undo()
    written(made, 1)
    with pytest.raises(NoSuchMoment, match="nothing to redo"):
        made.redo()


def test_undone_text_comes_back_from_the_same_seed_and_other_text_from_another(tmp_path: Path) -> None:
    made = written(durable(tmp_path / "s"), 53, temperature=2.0)
    before = made.text
    made.undo()
    assert written(made, 16, temperature=2.0).text == before
    made.undo()
    made.reseed(8)
    other = written(made, 16, temperature=2.0).text
    assert other != before
    made.undo(1)
    made.redo()
    assert made.text == other
    made.close()
    assert templora.resume(made.dir, base()).sampler.seed == 8


def test_rewind_goes_to_a_token_a_version_or_a_note_on_any_branch(tmp_path: Path) -> None:
    made = written(durable(tmp_path / "s"), 20)
    noted = made.note("the storm")
    there = state(made)
    written(made, 30)
    other = state(made)
    last = made.note("calm").name
    made.rewind(50)
    assert made.ids == other["ids"][:50]
    assert made.text == PROSE[:49]
    written(made, 20)
    made.rewind("the storm")
    assert state(made) == there
    made.rewind(last)
    assert state(made) == other
    made.rewind(noted.name)
    assert state(made) == there


@pytest.mark.parametrize("to", [-1, 10_000, "v99", "never noted"])
def test_a_moment_that_does_not_exist_is_refused(tmp_path: Path, to: int | str) -> None:
    made = durable(tmp_path / "s")
    before = state(made)
    with pytest.raises(NoSuchMoment):
        made.rewind(to)
    assert state(made) == before


def test_a_fork_goes_its_own_way_and_shares_what_does_not_change(tmp_path: Path) -> None:
    made = written(durable(tmp_path / "s"), 50)
    other = made.fork(tmp_path / "f")
    assert state(other) == state(made)
    weights = [next((s.dir / "versions").glob("v*/state.pt")) for s in (made, other)]
    assert weights[0].samefile(weights[1])
    other.reseed(99)
    written(other, 20, temperature=1.5)
    assert other.text != written(made.fork(tmp_path / "g"), 20, temperature=1.5).text
    assert state(written(made, 40)) == state(written(in_memory(), 90))
    with pytest.raises(NotASession, match="holds a session already"):
        made.fork(tmp_path / "f")


@pytest.mark.parametrize(
    ("start", "end", "new"), [(4, 14, "cathedral"), (0, 0, "Once. "), (30, 75, ""), (75, 75, " And then?")]
)
def test_an_edit_changes_the_text_and_what_follows_is_learned_anew(
    tmp_path: Path, start: int, end: int, new: str
) -> None:
    made = written(durable(tmp_path / "s"), 40)
    expected = made.text[:start] + new + made.text[end:]
    reading = made.edit(start, end, new)
    assert made.text == expected
    assert reading.tokens == len(made.ids)
    assert made.chunk == (len(made.ids) - 1) // 16
    after = state(made)
    assert state(templora.resume(killed(made), base())) == after


def test_an_edit_in_given_text_is_as_if_it_had_been_given_so(tmp_path: Path) -> None:
    made = durable(tmp_path / "s")
    made.edit(4, 14, "cathedral")
    plain = BASE.session("default", seed=7, **SIZES)
    plain.read(PROSE[:4] + "cathedral" + PROSE[14:])
    assert state(made) == state(plain)


def test_another_seed_outlives_an_edit_before_it(tmp_path: Path) -> None:
    session = written(durable(tmp_path / "s"), 20)
    session.reseed(9)
    session.edit(4, 14, "beacon")
    assert session.sampler.seed == 9
    with templora.resume(killed(session), BASE) as again:
        assert again.sampler.seed == 9


def test_what_a_journal_cannot_hold_is_refused(tmp_path: Path) -> None:
    session, other = durable(tmp_path / "s"), in_memory()
    with pytest.raises(TemploraError, match="keeps its own state"):
        session.load_state(other.state())
    with pytest.raises(TemploraError, match="keeps a text"):
        session.translate([], "de", "en")


def test_an_edit_outside_the_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NoSuchMoment, match="characters 3 to 999 cannot be edited: the text has 75"):
        durable(tmp_path / "s").edit(3, 999, "x")


def test_letters_of_several_tokens_are_never_cut(tmp_path: Path) -> None:
    made = BASE.session("default", dir=tmp_path / "s", **SIZES)
    made.read("naïve café, „größer“ – 東京 " * 3)
    for tokens in range(1, len(made.ids)):
        history = History(Plan(40, 16, 40), 0)
        line = made.store.history.runs(0)
        for _, ids, text, sizes in line:
            history.give(ids, text, sizes)
        history.cut(tokens)
        assert made.text.startswith(history.text.getvalue())
        whole = BASE.decode(made.ids[:tokens]).rstrip("\ufffd")
        assert history.text.getvalue() == whole
    made.edit(2, 3, "ï")
    assert made.text == "naïve café, „größer“ – 東京 " * 3


def test_reading_that_was_stopped_is_finished_in_the_same_way(tmp_path: Path) -> None:
    made = BASE.session("default", seed=7, dir=tmp_path / "s", **SIZES)
    for event in made.reading(PROSE, score_base=True):
        if isinstance(event, ChunkLearned) and event.chunk == 1:
            break
    resumed = templora.resume(killed(made), base())
    assert resumed.text == PROSE
    assert resumed.chunk == 2
    plain = BASE.session("default", seed=7, **SIZES)
    plain.read(PROSE, score_base=True)
    assert state(written(resumed, 30)) == state(written(plain, 30))
    assert all(chunk.base for chunk in resumed.store.history.learned)


def test_an_end_of_text_that_was_drawn_and_not_kept_is_remembered(tmp_path: Path) -> None:
    wishes = {"stop_at_eos": True, "temperature": 30.0, "repetition_penalty": 1.0, "top_p": 1.0}
    made, plain = durable(tmp_path / "s"), in_memory()
    for session in (made, plain):
        for _ in range(6):
            written(session, 100, **wishes)
    assert made.store.history.marks
    resumed = templora.resume(killed(made), base())
    assert state(resumed) == state(made) == state(plain)
    assert state(written(resumed, 40)) == state(written(plain, 40))


def test_scoring_the_rest_of_a_text_is_remembered_too(tmp_path: Path) -> None:
    made, plain = durable(tmp_path / "s"), in_memory()
    for session in (made, plain):
        written(session, 5)
        list(session.score_rest())
    assert state(written(templora.resume(killed(made), base()), 40)) == state(written(plain, 40))


def test_any_version_is_an_adapter_that_peft_loads(tmp_path: Path) -> None:
    made = written(durable(tmp_path / "s"), 60)
    version = made.note("here")
    ids = torch.arange(1, 30).unsqueeze(0)
    model = tiny_llama(initializer_range=0.2)
    loaded = PeftModel.from_pretrained(model, str(made.store.versions.path(version.number)))
    with torch.no_grad(), made.adapter.attached():
        expected = BASE.model(ids).logits
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, expected)


def test_discarding_keeps_the_text_unless_asked(tmp_path: Path) -> None:
    made = written(durable(tmp_path / "s"), 20)
    text = made.text
    made.discard()
    assert made.text == text
    assert not (made.dir / "versions").exists()
    with pytest.raises(SessionClosed, match="templora sessions export"):
        templora.resume(made.dir, BASE)
    gone = durable(tmp_path / "gone")
    gone.discard(keep_text=False)
    assert not gone.dir.exists()


def test_a_closed_session_says_how_to_go_on(tmp_path: Path) -> None:
    with durable(tmp_path / "s") as made:
        written(made, 3)
    made.close()
    for use in (lambda: made.write(3), made.undo, lambda: made.read("x"), lambda: made.note("x")):
        with pytest.raises(SessionClosed, match=r"templora\.resume"):
            use()


def test_another_or_a_changed_base_is_refused_and_the_difference_named(tmp_path: Path) -> None:
    folder = killed(durable(tmp_path / "s"))
    with pytest.raises(WrongBase, match=r"it had weights \w+…, not \w+…; use the base"):
        templora.resume(folder, base(seed=1))
    half = templora.load(model=tiny_llama(initializer_range=0.2).bfloat16(), tokenizer=ByteTokenizer())
    with pytest.raises(WrongBase, match="dtype float32, not bfloat16"):
        templora.resume(folder, half)
    with pytest.raises(WrongBase, match=r"parameters \d+, not \d+"):
        templora.resume(folder, base(num_hidden_layers=1))
    changed = base()
    with torch.no_grad():
        next(changed.model.parameters())[0, 0] += 1e-3
    with pytest.raises(WrongBase, match="had weights"):
        templora.resume(folder, changed)
    tokenizer = ByteTokenizer()
    tokenizer.add_tokens(["lighthouse"])
    other = templora.load(model=tiny_llama(initializer_range=0.2), tokenizer=tokenizer)
    with pytest.raises(WrongBase, match="tokenizer"):
        templora.resume(folder, other)
    assert templora.resume(folder, base()).text == PROSE


def test_the_base_is_loaded_by_the_name_that_the_session_remembers(tmp_path: Path) -> None:
    BASE.model.save_pretrained(tmp_path / "model")
    ByteTokenizer().save_pretrained(tmp_path / "model")
    loaded = templora.load(str(tmp_path / "model"), dtype="float32")
    made = loaded.session("default", seed=7, dir=tmp_path / "s", **SIZES)
    made.read(PROSE)
    before = state(written(made, 20))
    assert state(templora.resume(killed(made))) == before
    (tmp_path / "model").rename(tmp_path / "moved")
    with pytest.raises(templora.TemploraError, match="no folder"):
        templora.resume(made.dir)
    assert state(templora.resume(made.dir, name=str(tmp_path / "moved"))) == before


def test_a_base_from_memory_must_be_given_again(tmp_path: Path) -> None:
    folder = killed(durable(tmp_path / "s"))
    with pytest.raises(WrongBase, match=r"base=…"):
        templora.resume(folder)


def test_one_session_at_a_time(tmp_path: Path) -> None:
    made = durable(tmp_path / "s")
    with pytest.raises(SessionLocked, match=r"is open in process \d+ on .*; close it there first"):
        templora.resume(made.dir, BASE)
    made.close()
    templora.resume(made.dir, BASE).close()


def test_a_session_cannot_begin_where_something_is(tmp_path: Path) -> None:
    durable(tmp_path / "s").close()
    with pytest.raises(NotASession, match=r"holds a session already; resume it with templora\.resume"):
        durable(tmp_path / "s")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "diary.txt").write_text("mine")
    with pytest.raises(NotASession, match="is not empty"):
        durable(tmp_path / "full")
    (tmp_path / "empty").mkdir()
    durable(tmp_path / "empty").close()
    with pytest.raises(NotASession, match="holds no session"):
        templora.resume(tmp_path / "nowhere", BASE)


@pytest.mark.parametrize("name", ON_DISK)
def test_in_memory_what_needs_a_folder_says_so(name: str) -> None:
    session = in_memory()
    assert not hasattr(session, name)
    with pytest.raises(NeedsFolder, match=rf"{name} needs a session on disk; make it with base.session\(dir"):
        getattr(session, name)


def test_every_method_that_only_a_session_on_disk_has_is_listed() -> None:
    from templora.durable import DurableSession

    own = {n for n in vars(DurableSession) if not n.startswith("_")} - set(vars(Session))
    assert own - {"dir"} == set(ON_DISK)


def test_sizes_that_were_fitted_stay_as_they_were_and_are_announced_once(tmp_path: Path) -> None:
    made = BASE.session("default", dir=tmp_path / "s")
    warned = [e for e in made.reading(PROSE) if isinstance(e, Warned)]
    assert [w.code for w in warned] == ["fitted"]
    resumed = templora.resume(killed(made), base())
    assert resumed.plan.window == made.plan.window
    assert not [e for e in written_events(resumed) if isinstance(e, Warned)]


def written_events(session: Session) -> list[Any]:
    return list(session.write(3))


def test_a_machine_that_computes_differently_is_noticed(tmp_path: Path) -> None:
    made = written(durable(tmp_path / "s", save_every=1000), 40)
    folder = killed(made)
    # Another machine: the same weights, but sums in another order and so other last bits.
    other = base()
    for layer in other.model.model.layers:
        layer.mlp.down_proj = Reordered(layer.mlp.down_proj)
    (tmp_path / "w").mkdir()
    resumed = templora.resume(folder, other)
    warned = [e for e in resumed.write(1) if isinstance(e, Warned)]
    assert [w.code for w in warned] == ["inexact"]
    assert resumed.text.startswith(made.text)


class Reordered(torch.nn.Linear):
    """A linear layer that sums from the other end."""

    def __init__(self, layer: torch.nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False)
        self.weight = layer.weight

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(input.flip(-1), self.weight.flip(-1))


def test_a_session_stays_where_it_is_when_the_program_goes_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "a")
    made = durable(Path("story"))
    monkeypatch.chdir(tmp_path / "b")
    (tmp_path / "b" / "story").mkdir()
    (tmp_path / "b" / "story" / "novel.txt").write_text("Another's.", "utf-8")
    made.note("here")
    written(made, 40).rewind("here")
    made.discard(keep_text=False)
    assert (tmp_path / "b" / "story" / "novel.txt").exists()
    assert not (tmp_path / "a" / "story").exists()


def test_text_that_makes_no_token_is_cut_with_the_token_before_it() -> None:
    history = History(Plan(40, 16, 40), 0)
    history.give([], " ", [])
    history.give([5, 6], "ab", [1, 1])
    history.give([], "\n\n", [])
    history.own(7, "c", 1)
    ends = [history.end(tokens) for tokens in range(4)]
    assert ends == [0, 2, 5, 6]
    history.cut(2)
    assert history.text.getvalue() == " ab\n\n"


def test_ids_that_are_not_the_texts_own_are_cut_with_all_of_it(tmp_path: Path) -> None:
    made = BASE.session(seed=7, dir=tmp_path / "s", **SIZES)
    made.extend([84, 104], "The lamp.")
    after = written(made, 20).text
    there = len(made.ids)
    written(made, 20).rewind(there)
    assert made.text == after


def test_a_loop_that_was_open_during_a_rewind_goes_on_from_there(tmp_path: Path) -> None:
    made = durable(tmp_path / "s")
    made.note("here")
    wishes: dict[str, Any] = {"temperature": 0.0, "repetition_penalty": 5.0}
    events = made.write(60, **wishes)
    for _ in range(20):
        next(events)
    made.rewind(0)
    assert next(events).kind == "token", "the text begins again, with what the base puts before it"
    texts: list[list[int]] = []
    for loop in (events, None):
        made.rewind("here")
        start = len(made.ids)
        for _ in loop or made.write(len(texts[0]), **wishes):
            pass
        texts.append(made.ids[start:])
    assert len(texts[0]) > 30
    assert texts[0] == texts[1]


def test_a_padding_or_cutting_call_of_the_tokenizer_makes_no_other_base(tmp_path: Path) -> None:
    own = templora.load("novelist")
    clean = own.describe()
    own.tokenizer(["a", "bbb"], padding=True, truncation=True, max_length=4)
    then = own.describe()
    assert then["tokenizer"] == clean["tokenizer"] != then["tokenizer_then"]
    header.check_base({"base": clean}, then, tmp_path)
    # One that was begun when those were part of the sum.
    header.check_base({"base": clean | {"tokenizer": then["tokenizer_then"]}}, then, tmp_path)


def test_a_session_is_opened_while_another_thread_uses_the_base(tmp_path: Path) -> None:
    killed(durable(tmp_path / "a"))
    busy, stop = in_memory(), threading.Event()

    def others() -> None:
        while not stop.is_set():
            busy.read(PROSE)

    thread = threading.Thread(target=others)
    thread.start()
    try:
        for _ in range(20):
            templora.resume(tmp_path / "a", BASE).close()
    finally:
        stop.set()
        thread.join()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_does_not_write_into_the_session(tmp_path: Path) -> None:
    session = durable(tmp_path / "a")
    if (child := os.fork()) == 0:
        refused = False
        try:
            session.store.give([1], "x", [1])
        except OutputError as error:
            refused = "forked" in str(error)
        finally:  # never on into the other tests
            os._exit(7 if refused else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    session.read(" On.")
    session.close()
    assert templora.resume(tmp_path / "a", BASE).text == PROSE + " On."


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files")
def test_a_session_that_is_dropped_leaves_no_open_file(tmp_path: Path) -> None:
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for name in "abc":
        durable(tmp_path / name)
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("name", ["12", "v1"])
def test_a_note_does_not_hide_another_moment(name: str, tmp_path: Path) -> None:
    with durable(tmp_path / "a") as session, pytest.raises(InvalidText, match="choose another name"):
        session.note(name)


def test_a_folder_called_like_the_embedded_base_is_not_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "novelist").mkdir()
    assert templora.load("novelist").describe()["name"] == "novelist"


def test_a_budget_below_zero_is_refused_before_there_is_a_folder(tmp_path: Path) -> None:
    with pytest.raises(InvalidRecipe, match="budget -1"):
        BASE.session(dir=tmp_path / "s", budget=-1)
    assert not (tmp_path / "s").exists()
