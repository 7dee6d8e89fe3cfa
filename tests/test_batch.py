"""Several texts in lockstep: each gets what it gets alone, whatever happens to the others."""

import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import templora
from templora.adapter import Adapter
from templora.base import Base
from templora.batch import Batch
from templora.cli import app
from templora.errors import InvalidRecipe, InvalidText, UnsupportedModel
from templora.events import ChunkScored, ChunkSkipped, ChunkWritten, End, Event, Token
from templora.recipe import load as load_recipe
from templora.sampling import Sampling
from templora.stacked import Stack
from templora.tasks import batch as batch_tasks
from templora.tasks.score import Scores, score
from templora.testing import ByteTokenizer, ScriptedModel, tiny_llama
from tests.architectures import ARCHITECTURES, MORE, Architecture

TEXT = " ".join((Path(__file__).parent.parent / "LICENSE").read_text("utf-8").split())
# Long, short, shorter than a chunk, empty, a full chunk exactly.
DOCUMENTS = [TEXT[:300], TEXT[300:560], TEXT[100:110], "", TEXT[40:88], TEXT[900:1110]]
PROMPTS = [TEXT[:300], TEXT[300:321], TEXT[900:1110], "x"]
SIZES: dict[str, Any] = {"window": 32, "chunk": 16, "context": 32}
GREEDY = Sampling(temperature=0.0, repetition_penalty=None, top_p=None, dry_multiplier=None)
ROUNDING = 1e-4
score_batch = partial(templora.score_batch, lockstep=True)
write_batch = partial(templora.write_batch, lockstep=True)


def alike(batched: Scores, alone: Scores) -> None:
    """The same chunks with the same NLL, within rounding."""
    assert [(c["start"], c["tokens"]) for c in batched.chunks] == [
        (c["start"], c["tokens"]) for c in alone.chunks
    ]
    for key in ("adapted_nll", "base_nll"):
        found, expected = (
            {c["start"]: c[key] for c in s.chunks if c[key] is not None} for s in (batched, alone)
        )
        assert found == pytest.approx(expected, rel=ROUNDING)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"cache": "recompute"},
        {"epochs": 2},
        {"context": 16},
        {"head": 0.0, "first_block": 0.0},
        {"learning_rate": 0.0},
        {"window": 60, "chunk": 63, "context": 60},  # more tokens than the head takes at once
    ],
)
def test_texts_are_scored_as_each_is_alone(base: Base, changes: dict[str, Any]) -> None:
    sizes = SIZES | changes
    alone = [score(base, document, seed=1, **sizes) for document in DOCUMENTS]
    for size in (1, 2, 6):
        batched = score_batch(base, DOCUMENTS, size=size, seed=1, **sizes)
        for scores, own in zip(batched, alone, strict=True):
            alike(scores, own)


def test_without_the_bases_score_the_guard_keeps_what_it_asks_to_itself(base: Base) -> None:
    batched = score_batch(base, DOCUMENTS, seed=1, score_base=False, **SIZES)
    for document, scores in zip(DOCUMENTS, batched, strict=True):
        alike(scores, score(base, document, seed=1, score_base=False, **SIZES))
    assert all(c["base_nll"] is None for c in batched[0].chunks)


@pytest.mark.parametrize(
    "architecture",
    [*ARCHITECTURES, *(pytest.param(a, marks=pytest.mark.slow) for a in MORE)],
    ids=str,
)
def test_every_architecture_is_alike_or_refused(architecture: Architecture) -> None:
    base = templora.load(model=architecture.build(), tokenizer=ByteTokenizer())
    sizes = {"window": 24, "chunk": 16, "context": 24}
    if not base.runs_rows:
        with pytest.raises(UnsupportedModel, match="use batch 1"):
            Batch(base, size=2)
        return
    texts = [TEXT[:150], TEXT[300:390]]
    try:
        batched = score_batch(base, texts, seed=1, **sizes)
    except UnsupportedModel as error:
        assert "use batch 1" in str(error)  # noqa: PT017
        return
    for text, scores in zip(texts, batched, strict=True):
        alike(scores, score(base, text, seed=1, **sizes))


def written_alone(base: Base, prompt: str, tokens: int, **wishes: Any) -> list[Event]:
    session = base.session(seed=3, **SIZES)
    return [*session.reading(prompt, score_base=True), *session.write(tokens, **wishes)]


def written_together(base: Base, tokens: int, size: int, **wishes: Any) -> list[list[Event]]:
    found: list[list[Event]] = [[] for _ in PROMPTS]
    for number, event in write_batch(base, PROMPTS, tokens, size=size, seed=3, **SIZES, **wishes):
        found[number].append(event)
    return found


def exact(events: list[Event]) -> list[tuple[Any, ...]]:
    """All that no rounding can change."""
    told: list[tuple[Any, ...]] = []
    for event in events:
        match event:
            case Token():
                told.append((event.index, event.id, event.text))
            case ChunkWritten():
                told.append((event.chunk, event.start, event.tokens, event.written))
            case End():
                told.append((event.reason, event.tokens, event.scored_tokens))
            case _:
                told.append((event.kind,))
    return told


@pytest.mark.parametrize(
    "wishes",
    [
        {"sampling": GREEDY},
        {"sampling": Sampling()},
        {"sampling": Sampling(), "stop": ["e"]},
        {"sampling": Sampling(temperature=5.0), "stop_at_eos": True},
    ],
)
def test_texts_are_written_as_each_is_alone(base: Base, wishes: dict[str, Any]) -> None:
    alone = [written_alone(base, prompt, 50, **wishes) for prompt in PROMPTS]
    for size in (1, 3, 4):
        for events, own in zip(written_together(base, 50, size, **wishes), alone, strict=True):
            assert exact(events) == exact(own)
            nll = [[e.adapted_nll for e in es if isinstance(e, ChunkScored)] for es in (events, own)]
            assert nll[0] == pytest.approx(nll[1], rel=ROUNDING)


def test_the_base_is_bare_at_every_event_and_bit_identical_afterwards(base: Base) -> None:
    before, modules = base.fingerprint(), [*base.model.modules()]
    for _ in write_batch(base, PROMPTS, 20, seed=3, sampling=GREEDY, **SIZES):
        assert [*base.model.modules()] == modules
    assert base.fingerprint() == before


def test_the_guard_skips_one_text_and_the_others_do_not_notice(base: Base) -> None:
    texts = [TEXT[:400], "ab" * 200, TEXT[400:800]]
    batch, kinds = Batch(base, size=3, **SIZES), [set[type[Event]]() for _ in texts]
    scores = [Scores() for _ in texts]
    for text, event in batch_tasks.scoring(batch, [base.encode(text) for text in texts], seed=1):
        if event is not None:
            kinds[text.number].add(type(event))
            scores[text.number].take(event)
    assert [ChunkSkipped in kind for kind in kinds] == [False, True, False]
    for text, own in zip(texts, scores, strict=True):
        alike(own, score(base, text, seed=1, **SIZES))


def test_a_hook_works_for_several_texts_as_for_one(base: Base) -> None:
    layer: Any = base.model.model.layers[1]  # pyright: ignore[reportAttributeAccessIssue, reportIndexIssue]
    texts = [TEXT[:400], TEXT[400:800]]
    plain = score_batch(base, texts, seed=1, **SIZES)
    handle = layer.self_attn.v_proj.register_forward_hook(lambda _m, _i, output: 1.5 * output)
    steered = score_batch(base, texts, seed=1, **SIZES)
    for text, own, other in zip(texts, steered, plain, strict=True):
        alike(own, score(base, text, seed=1, **SIZES))
        assert own.adapted.nll != pytest.approx(other.adapted.nll, rel=1e-4)
    handle.remove()


def test_one_text_does_not_depend_on_another(base: Base) -> None:
    one = score_batch(base, [TEXT[:400], TEXT[400:800]], seed=1, **SIZES)[0]
    other = score_batch(base, [TEXT[:400], TEXT[::-1][:800]], seed=1, **SIZES)[0]
    alike(one, other)


def test_an_adapter_that_is_broken_spoils_no_other(base: Base) -> None:
    batch = Batch(base, size=2, cache="recompute", **SIZES)
    texts = [batch.text(base.encode(TEXT[n : n + 160]), seed=1, number=n) for n in (0, 160)]
    for text in texts:
        batch.join(text)
    texts[0].adapter.flat.fill_(torch.nan)
    batch.finish_chunks(score_base=True)
    assert [text.adapter.version for text in texts] == [0, 1]
    for _ in range(3):
        batch.finish_chunks(score_base=True)
    assert texts[0].adapter.version > 0, "the guard puts back what it was, and it learns"
    assert texts[1].adapter.version == 4
    assert all(bool(text.adapter.flat.isfinite().all()) for text in texts)


def test_a_text_that_has_left_goes_on_alone(base: Base) -> None:
    batch = Batch(base, size=2, **SIZES)
    events = batch_tasks.scoring(batch, [base.encode(TEXT[:100]), base.encode(TEXT[:400])], seed=1)
    first = next(text for text, event in events if event is None)
    before = first.adapter.snapshot()
    for _ in events:
        pass
    assert torch.equal(first.adapter.flat, before)
    assert [e.kind for e in first.write(20, sampling=GREEDY)].count("token") == 20
    assert first.adapter.version > 0


def test_rows_of_a_stack_compute_and_learn_as_their_adapters_do_alone() -> None:
    model, recipe = tiny_llama(), load_recipe("default")
    adapters = [Adapter(model, recipe, seed) for seed in range(3)]
    ids = torch.arange(30).view(3, 10)
    logits, gradients = [], []
    for adapter, own in zip(adapters, ids, strict=True):
        with torch.no_grad():
            adapter.b.normal_(0, 0.05)
        with adapter.attached():
            made = model(own.unsqueeze(0)).logits
            made.logsumexp(-1).sum().backward()
        logits.append(made[0].detach())
        gradients.append(adapter.gradient.clone())
        adapter.gradient.zero_()
    stack = Stack(adapters[0], 4)
    for adapter in adapters:
        stack.join(adapter)
    stack.leave(0)  # the last one takes its row
    with stack.attached(10):
        made = model(ids[[2, 1]]).logits
        made.logsumexp(-1).sum().backward()
    for row, which in enumerate((2, 1)):
        torch.testing.assert_close(made[row], logits[which])
        torch.testing.assert_close(adapters[which].gradient, gradients[which])
    with adapters[0].attached():
        torch.testing.assert_close(model(ids[:1]).logits[0], logits[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dropout": 0.1}, "dropout 0.1 .* set dropout=0, or batch 1"),
        ({"context_from": "recompute"}, "set context_from=cache, or batch 1"),
        ({"cache": "base"}, "set cache=reuse or recompute, or batch 1"),
        ({"size": 0}, "say 1 or more"),
    ],
)
def test_what_cannot_run_together_is_refused_with_the_cure(
    base: Base, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRecipe, match=message):
        Batch(base, **({"size": 2} | changes))


def test_a_model_whose_logits_are_more_than_its_head_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="use batch 1"):
        Batch(templora.load(model=ScriptedModel({1: 2})), size=2)


def test_one_string_is_not_taken_for_its_letters(base: Base) -> None:
    with pytest.raises(InvalidText, match="put it into a list"):
        score_batch(base, TEXT[:40], **SIZES)
    with pytest.raises(InvalidText, match="put it into a list"):
        write_batch(base, TEXT[:40], 3, **SIZES)


def test_how_to_draw_is_said_as_to_a_session(base: Base) -> None:
    fields = {"temperature": 0, "repetition_penalty": 1.3}
    drawn = [written_together(base, 20, 2, **how) for how in (fields, {"sampling": Sampling(**fields)})]
    assert [*map(exact, drawn[0])] == [*map(exact, drawn[1])]
    assert [*map(exact, drawn[0])] != [*map(exact, written_together(base, 20, 2))]
    with pytest.raises(InvalidRecipe, match="sampling and temperature were both given"):
        write_batch(base, PROMPTS, 5, sampling=GREEDY, temperature=0.5)
    with pytest.raises(InvalidRecipe, match="unknown recipe key 'temprature'"):
        write_batch(base, PROMPTS, 5, temprature=0.5)


def test_an_empty_prompt_is_named(base: Base) -> None:
    with pytest.raises(InvalidText, match="prompt 2 is empty"):
        next(write_batch(base, ["a", ""], 5, **SIZES))


def run(*words: object) -> tuple[int, str, str]:
    options = ["--window", "32", "--chunk", "16", "--context", "32"]
    result = CliRunner().invoke(app, [*map(str, words), *options])
    return result.exit_code, result.stdout, result.stderr


def entries(path: Path) -> Iterator[dict[str, Any]]:
    yield from sorted(json.loads(path.read_text("utf-8")), key=lambda entry: entry["document"])


def test_the_command_scores_together_what_it_scores_alone(folder: Path, tmp_path: Path) -> None:
    files = [tmp_path / f"{n}.txt" for n in range(3)]
    for n, file in enumerate(files):
        file.write_text(TEXT[100 * n : 300 * n + 200], "utf-8")
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"\xff\xfe\x00")
    together, alone = tmp_path / "together.json", tmp_path / "alone.json"
    assert run("score", *files, "--model", folder, "--json", alone)[0] == 0
    code, _, errors = run("score", files[0], bad, "--model", folder, "--json", together, "--batch", "2")
    assert code == 2
    assert errors.count("error:") == 1
    resumed = run("score", *files, "--model", folder, "--json", together, "--batch", "2", "--resume")
    assert resumed[0] == 0
    assert str(files[0]) not in resumed[2]
    for one, other in zip(entries(together), entries(alone), strict=True):
        assert one.keys() == other.keys()
        assert one["document"] == other["document"]
        assert one["config"] == other["config"]
        assert one["adapted"] == pytest.approx(other["adapted"], rel=ROUNDING)
        assert one["base"] == pytest.approx(other["base"], rel=ROUNDING)


def test_the_command_writes_a_file_for_each_prompt(folder: Path, tmp_path: Path) -> None:
    prompts, out = tmp_path / "openings.jsonl", tmp_path / "novels"
    lines = [{"prompt": "It was dark.", "name": "dark"}, {"prompt": "The sea.\nThe\u2028lamp."}]
    prompts.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines), "utf-8")
    words = ["write", "--prompts", prompts, "--model", folder, "--out-dir", out, "--tokens", "20"]
    code, said, _ = run(*words, "--json", "--batch", "2")
    assert code == 0
    assert (out / "dark.txt").read_text("utf-8").startswith("It was dark.")
    assert (out / "2.txt").read_text("utf-8").startswith("The sea.\nThe\u2028lamp.")
    events = [json.loads(line) for line in said.splitlines()]
    assert {event["name"] for event in events} == {"dark", "2"}
    written = "".join(e["text"] for e in events if e["name"] == "dark" and e["event"] == "token")
    assert (out / "dark.txt").read_text("utf-8") == "It was dark." + written
    code, _, errors = run(*words)
    assert (code, "never overwritten" in errors) == (2, True)


@pytest.mark.parametrize(
    ("lines", "options", "message"),
    [
        ("a\nb", [], "needs --out-dir"),
        ("a\nb", ["--out-dir", "o", "--out", "x.txt"], "leave out --out"),
        ('{"promt": "a"}', ["--out-dir", "o"], "line 1 .* has no prompt"),
        ('{"prompt": "a", "name": "../x"}', ["--out-dir", "o"], "leave out slashes"),
        ('{"prompt": "a", "name": "x"}\n{"prompt": "b", "name": "x"}', ["--out-dir", "o"], "two prompts"),
        ("{", ["--out-dir", "o"], "is not JSON"),
    ],
)
def test_prompts_that_cannot_be_used_are_refused(
    lines: str, options: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / ("openings.jsonl" if lines.startswith("{") else "openings.txt")
    file.write_text(lines, "utf-8")
    code, _, errors = run("write", "--prompts", file, *options)
    assert code == 2
    assert errors.count("error:") == 1
    assert re.search(message, errors), errors
