"""Several texts at once, each in a thread: each gets what it gets alone, and no thread is left behind."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import templora
from templora import crew as crews
from templora.base import Base
from templora.batch import Batch
from templora.cli import app
from templora.crew import Crew, Member
from templora.errors import InvalidRecipe, InvalidText, UnsupportedModel
from templora.events import Event
from templora.pen import Wishes
from templora.sampling import Sampling
from templora.tasks.batch import scoring, together, writing
from templora.tasks.score import score
from templora.testing import ScriptedModel

TEXT = " ".join((Path(__file__).parent.parent / "LICENSE").read_text("utf-8").split())
# Long, short, shorter than a chunk, empty, a full chunk exactly.
DOCUMENTS = [TEXT[:300], TEXT[300:560], TEXT[100:110], "", TEXT[40:88], TEXT[900:1110]]
PROMPTS = [TEXT[:300], TEXT[300:321], TEXT[900:1110], "x"]
SIZES: dict[str, Any] = {"window": 32, "chunk": 16, "context": 32}


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """As many of torch's as a larger machine has, and afterwards none of the crew's."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    assert torch.get_num_threads() == 4
    torch.set_num_threads(before)
    assert not [thread for thread in threading.enumerate() if thread.name == "templora"]


def chunks(scores: Any) -> list[dict[str, Any]]:
    """All that was said of them but the times."""
    return [{k: v for k, v in chunk.items() if k != "learn_seconds"} for chunk in scores.chunks]


@pytest.mark.parametrize(
    "changes", [{}, {"cache": "recompute"}, {"cache": "base"}, {"context_from": "recompute"}, {"epochs": 2}]
)
def test_texts_are_scored_to_the_bit_as_each_is_alone(base: Base, changes: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    alone = [score(base, document, seed=1, **SIZES, **changes) for document in DOCUMENTS]
    torch.set_num_threads(4)
    for size in (2, 9):
        batched = templora.score_batch(base, DOCUMENTS, size=size, seed=1, **SIZES, **changes)
        assert [*map(chunks, batched)] == [*map(chunks, alone)]
        assert [s.adapted for s in batched] == [s.adapted for s in alone]


@pytest.mark.parametrize("sampling", [Sampling(temperature=0.0), Sampling()])
def test_texts_are_written_to_the_bit_as_each_is_alone(base: Base, sampling: Sampling) -> None:
    def untimed(event: Event) -> dict[str, Any]:
        return {name: told for name, told in event.as_dict().items() if "seconds" not in name}

    torch.set_num_threads(1)
    alone = list[list[dict[str, Any]]]()
    for prompt in PROMPTS:
        session = base.session(seed=3, **SIZES)
        events = *session.reading(prompt, score_base=True), *session.write(40, sampling=sampling)
        alone.append([*map(untimed, events)])
    torch.set_num_threads(4)
    found: list[list[dict[str, Any]]] = [[] for _ in PROMPTS]
    for number, event in templora.write_batch(base, PROMPTS, 40, seed=3, sampling=sampling, **SIZES):
        found[number].append(untimed(event))
    assert found == alone


def test_the_base_is_bare_at_every_event_and_bit_identical_afterwards(base: Base) -> None:
    before, modules = base.fingerprint(), [*base.model.modules()]
    for _ in templora.write_batch(base, PROMPTS, 20, seed=3, temperature=0, **SIZES):
        assert [*base.model.modules()] == modules
    assert base.fingerprint() == before


def test_a_hook_works_for_several_texts_as_for_one(base: Base) -> None:
    layer: Any = base.model.model.layers[1]  # pyright: ignore[reportAttributeAccessIssue, reportIndexIssue]
    plain = templora.score_batch(base, DOCUMENTS, seed=1, **SIZES)
    handle = layer.self_attn.v_proj.register_forward_hook(lambda _m, _i, output: 1.5 * output)
    steered = templora.score_batch(base, DOCUMENTS, seed=1, **SIZES)
    own = score(base, DOCUMENTS[0], seed=1, **SIZES)
    handle.remove()
    assert steered[0].adapted.nll == pytest.approx(own.adapted.nll, rel=1e-5)
    assert own.adapted.nll != pytest.approx(plain[0].adapted.nll, rel=1e-4)


def test_one_thread_runs_one_after_another_as_alone(base: Base) -> None:
    torch.set_num_threads(1)
    alone = [score(base, document, seed=1, **SIZES) for document in DOCUMENTS]
    batched = templora.score_batch(base, DOCUMENTS, size=3, seed=1, **SIZES)
    assert [*map(chunks, batched)] == [*map(chunks, alone)]
    torch.set_num_threads(4)


def test_layers_with_a_forward_of_their_own_run_in_lockstep_or_not_at_all(base: Base) -> None:
    attention: Any = base.model.model.layers[1].self_attn  # pyright: ignore[reportAttributeAccessIssue, reportIndexIssue]
    real = attention.forward
    attention.forward = lambda *words, **named: real(*words, **named)
    try:
        assert isinstance(together(base, size=2), Batch)
        with pytest.raises(UnsupportedModel, match=r"a forward of its own, .*; use batch 1"):
            templora.score_batch(base, DOCUMENTS, lockstep=False, **SIZES)
    finally:
        del attention.forward


def test_the_callers_random_numbers_are_its_own(base: Base) -> None:
    torch.manual_seed(7)
    alone = torch.rand(20_000)
    torch.manual_seed(7)
    drawn = list[torch.Tensor]()
    for _ in templora.write_batch(base, PROMPTS * 2, 8, size=2, seed=1, **SIZES):
        drawn += [torch.rand(1) for _ in range(20)]
    assert torch.equal(torch.cat(drawn), alone[: len(drawn)])


def test_what_is_left_of_a_run_goes_the_way_of_the_whole(base: Base) -> None:
    assert isinstance(together(base, size=2, texts=1), Crew)
    assert isinstance(together(base, size=1, texts=1), Batch)
    few = together(base, size=5, texts=2, lockstep=True)
    assert isinstance(few, Batch) and few.size == 2


def test_a_document_is_asked_for_when_a_thread_is_free(base: Base) -> None:
    asked = list[int]()

    def documents() -> Iterator[list[int]]:
        for number, text in enumerate(DOCUMENTS):
            asked.append(number)
            yield base.encode(text)

    done = 0
    for text, event in scoring(together(base, size=2, **SIZES), documents(), seed=1):
        assert len(asked) <= done + 2
        if event is None:
            done += 1
            text.discard()
    assert done == len(DOCUMENTS)


def test_a_text_that_is_done_goes_on_alone(base: Base) -> None:
    events = scoring(together(base, size=2, **SIZES), [base.encode(TEXT[:100]), base.encode(TEXT[:400])])
    first = next(text for text, event in events if event is None)
    before = first.adapter.snapshot()
    for _ in events:
        pass
    assert torch.equal(first.adapter.flat, before)
    assert [e.kind for e in first.write(20, temperature=0)].count("token") == 20


def test_a_loop_may_be_left_at_any_event(base: Base) -> None:
    for most in range(12):
        events = templora.write_batch(base, PROMPTS, 50, seed=3, **SIZES)
        for _, _ in zip(range(most), events, strict=False):
            pass
        events.close()  # pyright: ignore[reportAttributeAccessIssue]


def test_what_goes_wrong_in_a_thread_is_raised_where_the_caller_is(base: Base) -> None:
    def broken(text: Member) -> Iterator[Event]:
        text.extend(base.encode(TEXT[:100]), "")
        yield from text.learning()
        raise InvalidText("not this one")

    def long(text: Member) -> Iterator[Event]:
        text.extend(base.encode(TEXT), "")
        yield from text.learning()

    with pytest.raises(InvalidText, match="not this one"):
        for _ in Crew(base, size=3, **SIZES).run(enumerate([long, broken, long, long])):
            pass
    with pytest.raises(InvalidText, match="read no further"):
        for _ in scoring(Crew(base, size=3, **SIZES), unreadable(base)):
            pass


def unreadable(base: Base) -> Iterator[list[int]]:
    """Documents of which the second cannot be read."""
    yield base.encode(TEXT[:200])
    raise InvalidText("read no further")


def test_a_program_may_end_in_the_middle_of_a_loop() -> None:
    program = """
import torch, templora
from templora.testing import ByteTokenizer, tiny_llama
torch.set_num_threads(2)
base = templora.load(model=tiny_llama(), tokenizer=ByteTokenizer())
events = templora.write_batch(base, ["a", "b", "c"], 100000, window=32, chunk=16, context=32)
print(next(events)[0])
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True
    )
    assert ended.stdout.strip() in "01"


def test_an_insistent_interrupt_leaves_threads_to_end_by_themselves() -> None:
    program = """
import signal, threading, time, torch, templora
from templora.crew import Crew
from templora.events import Warned
from templora.testing import ByteTokenizer, tiny_llama
torch.set_num_threads(2)
base = templora.load(model=tiny_llama(), tokenizer=ByteTokenizer())
interrupted = threading.Event()
def slow(text):
    yield Warned("", "")
    interrupted.wait(60)
    for _ in range(50):
        time.sleep(0.005)
        torch.zeros(9).sum()
    print("ended\\n", end="")  # at once
    yield Warned("", "")
events = Crew(base, size=2).run(enumerate([slow, slow]))
next(events), next(events)
main = threading.main_thread().ident
try:
    threading.Timer(0.3, lambda: signal.pthread_kill(main, signal.SIGINT)).start()
    events.close()
except KeyboardInterrupt:
    print("interrupted", torch.get_num_threads())
    interrupted.set()
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split() == ["interrupted", "2", "ended", "ended"]


def test_a_large_base_and_a_wish_run_in_lockstep(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(together(base, size=2), Crew)
    assert isinstance(together(base, size=1), Batch), "of four threads it would leave three idle"
    assert isinstance(together(base, size=2, lockstep=True), Batch)
    monkeypatch.setattr(crews, "LARGE", 1)
    assert isinstance(together(base, size=2), Batch)
    assert isinstance(together(base, size=2, lockstep=False), Crew)


def test_models_that_run_one_text_at_a_time_may_have_a_thread_for_each() -> None:
    base = templora.load(model=ScriptedModel({1: 2}))
    texts = [[1, 1, 1], [1, 2, 1]]
    found = [text.number for text, event in scoring(together(base, size=2), texts) if event is None]
    assert sorted(found) == [0, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"dropout": 0.1}, "dropout 0.1 .* set dropout=0, or batch 1"), ({"size": 0}, "say 1 or more")],
)
def test_what_cannot_run_together_is_refused_with_the_cure(
    base: Base, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRecipe, match=message):
        Crew(base, **({"size": 2} | changes))


def test_an_empty_prompt_is_named(base: Base) -> None:
    wishes = Wishes(5, Sampling())
    with pytest.raises(InvalidText, match="prompt 2 is empty"):
        next(writing(together(base, size=2, **SIZES), ["a", ""], wishes))


def test_the_commands_results_stand_in_the_order_of_the_files(folder: Path, tmp_path: Path) -> None:
    files = [tmp_path / f"{n}.txt" for n in range(4)]
    for n, file in enumerate(files):
        file.write_text(TEXT[: 900 - 250 * n], "utf-8")
    results, sizes = tmp_path / "r.json", ["--window", "32", "--chunk", "16", "--context", "32"]
    words = ["score", *files, "--model", folder, "--json", results, "--batch", "4", *sizes]
    made = CliRunner().invoke(app, [*map(str, words)])
    assert made.exit_code == 0, made.output
    entries = json.loads(results.read_text("utf-8"))
    assert [entry["document"] for entry in entries] == [*map(str, files)]
