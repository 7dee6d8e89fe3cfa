"""Translating passage by passage: what is learned, what is checked, what survives."""

import copy
import json
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

import templora
from templora.base import Base
from templora.cli import app
from templora.errors import InvalidTemplate, InvalidText
from templora.events import ChunkLearned, ChunkScored, ChunkSkipped, Event, PassageTranslated, Warned
from templora.formats import bilingual
from templora.formats.bilingual import Segment
from templora.journal import sealed
from templora.tasks.checks import MEANS, problem
from templora.tasks.passages import assembled, blocks
from templora.tasks.translate import Passage, Translated, Translator
from templora.template import load
from templora.testing import ByteTokenizer, ScriptedModel, tiny_llama
from tests import plain_loop

SIZES = {"window": 64, "context": 64, "chunk": 48}
PAIRS = [
    ("Suo Mian kam.", "Su Mian came."),
    ("Suo Mian sah das Meer.", "Su Mian saw the sea."),
    ("Er sah Suo Mian.", "He saw Su Mian."),
    ("Das Meer war still.", "The sea was calm."),
    ("Suo Mian ging.", "Su Mian left."),
]


def tiny_base(**changes: Any) -> Base:
    return templora.load(model=tiny_llama(initializer_range=0.2, **changes), tokenizer=ByteTokenizer())


def translator(base: Base, recipe: str = "default", **wishes: Any) -> Translator:
    sizes = {key: wishes.pop(key) for key in list(wishes) if key in templora.Recipe.model_fields}
    session = base.session(recipe, seed=3, **(SIZES | sizes))
    return Translator(session, load("auto", base, "de", "en"), **wishes)


def references(pairs: list[tuple[str, str]] = PAIRS) -> list[Passage]:
    return [Passage(source, target) for source, target in pairs]


def of(kind: type[Any], events: list[Event]) -> list[Any]:
    return [event for event in events if isinstance(event, kind)]


def test_the_paper_recipe_gives_the_nll_of_a_plain_loop(tmp_path: Path) -> None:
    """Teacher-forced, K = 1, dropout 0: prompts and labels are built here anew, from the paper's words."""
    base = tiny_base(max_position_embeddings=512)
    bare = copy.deepcopy(base.model)
    ours = translator(base, "paper", dropout=0.0, window=256, context=256, chunk=64)
    ours.session.adapter.save(tmp_path)
    start = load_file(tmp_path / "adapter_model.safetensors")
    events = list(ours.run(references(PAIRS * 3)))
    rows: list[plain_loop.Row] = []
    before = ""
    for source, target in PAIRS * 3:
        asked = f"German:\n{source}\nEnglish:\n"
        prompt = [256, *base.encode(before + asked)]
        rows.append((prompt + base.encode(f"{target}\n\n"), len(prompt)))
        before = f"{asked}{target}\n\n"
    theirs = plain_loop.run(bare, rows, seed=3, adapter_from=start)
    scored = of(ChunkScored, events)
    assert [e.adapted_nll / e.tokens for e in scored] == pytest.approx(
        [nll / (len(ids) - start) for nll, (ids, start) in zip(theirs, rows, strict=True)], abs=1e-4
    )
    moved = [abs(e.adapted_nll - (e.base_nll or 0.0)) / e.tokens for e in scored]
    assert max(moved) > 1e-3, "the adapter must matter, or any loop would match"


def test_the_base_is_untouched_and_events_follow_each_other() -> None:
    base = tiny_base()
    before = base.fingerprint()
    made = translator(base)
    events = list(made.run(references()))
    assert base.fingerprint() == before
    kinds = [event.kind for event in events if event.kind != "warning"]
    assert kinds == ["passage_translated", "chunk_scored", "chunk_learned"] * len(PAIRS)
    starts = [event.start for event in of(ChunkScored, events)]
    sizes = [event.tokens for event in of(ChunkScored, events)]
    assert starts == [sum(sizes[:i]) for i in range(len(sizes))]
    assert [e.origin for e in of(PassageTranslated, events)] == ["reference"] * len(PAIRS)


def test_a_session_translates_by_itself() -> None:
    base = tiny_base()
    events = list(base.session(seed=3, **SIZES).translate(references(), "de", "en"))
    assert [e.kind for e in events] == [e.kind for e in translator(base).run(references())]
    assert len(of(ChunkLearned, events)) == len(PAIRS)


def test_a_name_that_is_always_corrected_becomes_likely() -> None:
    """A person writes "Zhu Wen" wherever the model wrote something else; soon the adapter expects it."""
    base = templora.load("novelist")

    def corrects(source: str, draft: str) -> str:
        return source.replace("朱雯", "Zhu Wen")

    made = translator(
        base, window=256, context=256, chunk=32, pairs=0, review=corrects, sampling=None, learning_rate=1e-3
    )
    sources = [
        f"朱雯 {verb} the {thing}." for verb in ("saw", "left", "kept", "knew") for thing in ("sea", "lamp")
    ]
    likely: list[float] = []
    origins: list[str] = []
    for source in sources:
        name = base.encode("Zhu Wen")
        prompt = made.template.ids(base, [], source, {})
        with torch.no_grad(), made.session.adapter.attached():
            likely.append(float(base.nll((prompt + name)[:-1], name).sum()))
        (done,) = of(PassageTranslated, made.translate(Passage(source)))
        origins.append(done.origin)
    assert origins[0] == "correction"
    # In nats: less is likelier.
    assert all(after < likely[0] for after in likely[1:])
    assert likely[-1] < likely[0] - 5


def scripted(text: str) -> Base:
    """A base that writes that text after a line feed, letter by letter, and then ends."""
    ids = ByteTokenizer().encode(text)
    assert len(set(ids)) == len(ids), "each letter once: the script is a function of the last one"
    successor = dict(zip(ByteTokenizer().encode("\n") + ids, [*ids, 256], strict=True))
    return templora.load(model=ScriptedModel(successor), tokenizer=ByteTokenizer())


def test_own_output_is_learned_when_nothing_is_wrong_with_it() -> None:
    events = translator(scripted("A dog")).translate(Passage("Ein Hund lief."))
    (done,) = of(PassageTranslated, events)
    assert (done.draft, done.target, done.origin, done.problem) == ("A dog", "A dog", "own", None)
    assert len(of(ChunkLearned, events)) == 1


@pytest.mark.parametrize(
    ("writes", "source", "reason"),
    [
        ("", "Ein Hund lief.", "empty"),
        ("A dog", "Ein Hund\nlief weg.", "lines"),
        ("Kätzchens", "Kätzchens Lauf", None),
    ],
)
def test_what_fails_its_check_is_kept_and_not_learned(writes: str, source: str, reason: str | None) -> None:
    events = translator(scripted(writes)).translate(Passage(source))
    (done,) = of(PassageTranslated, events)
    assert (done.target, done.problem) == (writes, reason)
    learned = len(of(ChunkLearned, events))
    assert learned == (reason is None)
    says = (
        [f"passage 0: the translation {MEANS[reason]}; it is kept for you to mend, not learned"]
        if reason
        else []
    )
    assert [e.message for e in of(Warned, events)] == says
    assert [e.reason for e in of(ChunkSkipped, events)] == (["check"] if reason and writes else [])


@pytest.mark.parametrize(("shown", "reason"), [(False, None), (True, "runaway")])
def test_without_an_example_a_translation_ends_with_as_many_lines_as_its_source(
    shown: bool, reason: str | None
) -> None:
    line = ByteTokenizer().encode("\nA dog")
    endless = dict(zip(line, [*line[1:], line[0]], strict=True))
    made = translator(templora.load(model=ScriptedModel(endless), tokenizer=ByteTokenizer()))
    pairs = (("Eins.", "One."),) if shown else ()
    (done,) = of(PassageTranslated, made.translate(Passage("Ein Hund lief.", context=pairs)))
    assert done.problem == reason
    assert (done.target == "A dog") is not shown


def test_a_translation_that_failed_is_no_example_for_the_next() -> None:
    base = tiny_base(max_position_embeddings=512)
    made = translator(base, pairs=1, window=256, context=256)
    good = Translated("Suo Mian kam.", "Su Mian came.", "own", base=True, learned=True)
    made.take_up([good, replace(good, source="Er ging.", target="Er ging.", learned=False)])
    prompt = base.decode(made._prompt(Passage("Das Meer war still."))[0])
    assert "English:\nSu Mian came.\n\nGerman:\nDas Meer" in prompt
    assert "Er ging." not in prompt


@pytest.mark.parametrize(
    ("source", "target", "ended", "expected"),
    [
        ("Ein Hund lief.", "A dog.", True, None),
        ("Ein Hund lief.", " \n", True, "empty"),
        ("Ein Hund lief.", "A dog.", False, "runaway"),
        ("Ein Hund lief.", "ha " * 100, True, "runaway"),
        (
            "苏绵来了，她看见了大海和天空里的云。",
            "Su Mian came and saw the sea and the clouds.",
            True,
            None,
        ),
        ("Ein Hund lief über die Wiese.", "Ein Hund lief über die Wiese.", True, "untranslated"),
        (
            "苏绵来了，她看见了大海和天空里的云。",
            "苏绵来了，她看见了大海和天空里的云。",
            True,
            "untranslated",
        ),
        ("S.O.S.", "S.O.S.", True, None),
        ("Eins.\nZwei.", "One. Two.", True, "lines"),
    ],
)
def test_the_checks(source: str, target: str, ended: bool, expected: str | None) -> None:
    assert problem(source, target, ended=ended) == expected
    assert expected is None or expected in MEANS


def test_a_prompt_that_is_too_long_is_cut_from_its_old_end_and_said_once() -> None:
    base = tiny_base()
    made = translator(base, pairs=4)
    events = list(made.run(references()))
    assert [w.code for w in of(Warned, events)].count("cut") == 1
    prompt, _ = made._prompt(Passage("Suo Mian kam."))
    assert len(prompt) == SIZES["window"]
    assert base.decode(prompt).endswith("German:\nSuo Mian kam.\nEnglish:\n")
    assert prompt[0] == 256


def test_terms_stand_in_the_prompt_only_where_the_source_has_them() -> None:
    base = tiny_base()
    template = load("plain", base, "zh", "en")
    terms = {"苏绵": "Su Mian", "魏峰": "Wei Feng"}
    asked = base.decode(template.ids(base, [("a", "b")], "苏绵来了", terms))
    assert (
        asked
        == "Chinese → English: 苏绵 = Su Mian\n\nChinese:\na\nEnglish:\nb\n\nChinese:\n苏绵来了\nEnglish:\n"
    )


def test_a_chat_model_is_asked_through_its_own_template() -> None:
    base = tiny_base()
    base.tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    template = load("auto", base, "zh", "English")
    ids = template.ids(base, [("a", "b")], "c", {})
    text = base.tokenizer.decode(ids)
    assert text.startswith("<system>You translate a book from Chinese to English")
    assert text.endswith("<user>a<|end|><assistant>b<|end|><user>c<|end|><assistant>")
    assert ids.count(256) == 4
    assert template.end_ids(base) == [256]


def test_a_chat_model_does_not_think_aloud_and_ends_as_its_template_does() -> None:
    base = tiny_base()
    base.tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }};\n{% endfor %}"
        "{% if add_generation_prompt and enable_thinking is not defined %}<think>{% endif %}"
    )
    template = load("chat", base, "zh", "en")
    assert base.decode(template.ids(base, [], "a", {})).endswith("user: a;\n")
    (semicolon,) = base.encode(";")
    base.model.generation_config.eos_token_id = [256, semicolon]
    assert template.end_ids(base) == [semicolon]


@pytest.mark.parametrize("text", ["prompt: [", "end: x", "prompt: '{nonsense}'\nend: x", "prompt: x\nodd: y"])
def test_a_template_that_cannot_work_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text(text)
    with pytest.raises(InvalidTemplate):
        load(tmp_path / "t.yaml", tiny_base(), "zh", "en")
    with pytest.raises(InvalidTemplate, match="this base is none; say plain"):
        load("chat", tiny_base(), "zh", "en")


def test_one_long_line_is_cut_without_being_counted_as_a_whole() -> None:
    counted: list[int] = []

    def count(text: str) -> int:
        counted.append(len(text))
        return len(text)

    line = "ab cd " * 5_000
    made = blocks([line], "en", count, 100)
    assert "".join(block.source for block in made).replace(" ", "") == line.replace(" ", "")
    assert sum(size > 1_000 for size in counted) < 10


WORDS = st.text("ab 苏绵。.!?\t", max_size=60)


@given(st.lists(WORDS, max_size=12), st.integers(4, 40), st.sampled_from(["zh", "en"]))
def test_no_word_is_lost_between_segments_and_passages(
    segments: list[str], budget: int, language: str
) -> None:
    parts = blocks(segments, language, lambda text: len(text.encode()), budget)
    assert all(len(p.source.encode()) <= budget + 2 for p in parts)
    again = assembled(parts, [p.source for p in parts], len(segments), language)
    assert ["".join(s.split()) for s in again] == ["".join(s.split()) for s in segments]


def test_a_translation_with_too_few_or_too_many_lines_loses_nothing() -> None:
    parts = blocks(["a", "", "b", "c"], "en", len, 100)
    assert assembled(parts, ["A\nB"], 4, "en") == ["A", "", "B", ""]
    assert assembled(parts, ["A\nB\nC\nD"], 4, "en") == ["A", "", "B", "C D"]
    assert assembled(parts, ["A\n\nB\n \nC"], 4, "en") == ["A", "", "B", "C"]


def test_spaces_that_mean_something_stay() -> None:
    parts = blocks(["a", "b"], "en", len, 100)
    assert assembled(parts, ["Quoi\u202f! \u2028«\xa0Ça\xa0»\n\u3000え？\u3000何"], 2, "fr") == [
        "Quoi\u202f! «\xa0Ça\xa0»",
        "\u3000え？\u3000何",
    ]


@pytest.mark.parametrize("language", ["zh", "zh-Hans", "zh_CN", "ZH"])
def test_pieces_are_joined_as_the_language_is_written(language: str) -> None:
    parts = blocks(["苏绵来了。她走了。"], language, len, 6)
    assert assembled(parts, [part.source for part in parts], 1, language) == ["苏绵来了。她走了。"]


# The command.


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_llama(initializer_range=0.2).save_pretrained(folder)
    ByteTokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("de.txt").write_text("".join(f"{source}\n" for source, _ in PAIRS), "utf-8")
    Path("en.txt").write_text("".join(f"{target}\n" for _, target in PAIRS), "utf-8")
    return tmp_path


def run(line: str, *more: str, answers: str | None = None) -> Result:
    done = CliRunner().invoke(app, ["translate", *line.split(), *more], input=answers)
    assert done.exit_code == 0, done.output + done.stderr
    return done


def arguments(tiny: str) -> str:
    return (
        f"de.txt --from de --to en --out out.txt --model {tiny} --passage 30 --window 64 --chunk 24 --quiet"
    )


def test_references_come_out_as_they_went_in_and_are_learned(tiny: str, here: Path) -> None:
    done = run(f"{arguments(tiny)} --references en.txt")
    assert Path("out.txt").read_text("utf-8") == Path("en.txt").read_text("utf-8")
    assert "perplexity base" in done.stderr
    assert "5 of 5 passages are in out.txt" in done.stderr


TSV = "".join(f"{source}\t{target}\n" for source, target in PAIRS)


def lacking(number: int) -> str:
    return TSV.replace(f"\t{PAIRS[number][1]}\n", "\t\n")


def origins() -> list[str]:
    return [line["origin"] for line in journal() if line["op"] == "passage"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("part.tsv", lacking(1)),
        ("part.tsv", TSV.replace(f"\t{PAIRS[1][1]}\n", "\n")),  # no second column at all
        ("part.txt", "Su Mian came.\n \nHe.\nIt.\nShe.\n"),
    ],
)
def test_a_passage_without_a_reference_is_drafted(name: str, text: str, tiny: str, here: Path) -> None:
    Path(name).write_text(text, "utf-8")
    run(f"{arguments(tiny)} --references {name}")
    assert origins() == ["reference", "own", "reference", "reference", "reference"]
    lines = Path("out.txt").read_text("utf-8").splitlines()
    assert lines[0] == "Su Mian came."
    assert lines[1] not in ("", PAIRS[1][0])


def test_references_lack_where_a_bilingual_file_has_none(tiny: str, here: Path) -> None:
    """A file of units, where None stands for a translation that is not there."""
    pairs = [Segment(s, None if n == 2 else t) for n, (s, t) in enumerate(PAIRS)]
    bilingual.write(Path("part.xlf"), bilingual.Document(pairs, ("de", "en")), Path("de.txt"))
    run(f"{arguments(tiny)} --references part.xlf")
    assert origins() == ["reference", "reference", "own", "reference", "reference"]


def test_of_a_file_of_many_languages_the_asked_ones_are_taken(tiny: str, here: Path) -> None:
    def unit(*texts: str) -> str:
        named = zip(("fr", "en", "de"), texts, strict=True)
        return "<tu>" + "".join(f'<tuv xml:lang="{n}"><seg>{t}</seg></tuv>' for n, t in named) + "</tu>"

    units = "".join(unit(f"Phrase {n}.", target, source) for n, (source, target) in enumerate(PAIRS))
    header = '<header creationtool="t" creationtoolversion="1" segtype="sentence" o-tmf="t" adminlang="en"'
    Path("all.tmx").write_text(
        f'<tmx version="1.4">{header} srclang="en" datatype="plaintext"/><body>{units}</body></tmx>', "utf-8"
    )
    line = arguments(tiny).replace("de.txt", "all.tmx").replace("out.txt", "out.tmx")
    run(f"{line} --references all.tmx")
    assert [record["source"] for record in journal("out.tmx.session") if record["op"] == "passage"] == [
        source for source, _ in PAIRS
    ]
    asked = bilingual.read(Path("out.tmx"), ("de", "en")).segments
    assert [(s.source, s.target) for s in asked] == list(PAIRS)
    assert "Phrase 0." in Path("out.tmx").read_text("utf-8")


def test_a_file_of_one_column_is_the_translation(tiny: str, here: Path) -> None:
    Path("one.tsv").write_text(Path("en.txt").read_text("utf-8"), "utf-8")
    run(f"{arguments(tiny)} --references one.tsv")
    assert Path("out.txt").read_text("utf-8") == Path("en.txt").read_text("utf-8")


@pytest.mark.parametrize(("number", "warned"), [(1, 1), (None, 0)])
def test_a_passage_is_never_half_a_reference(number: int | None, warned: int, tiny: str, here: Path) -> None:
    """All five lines are one passage."""
    Path("part.tsv").write_text(TSV if number is None else lacking(number), "utf-8")
    line = arguments(tiny).replace("--passage 30", "--passage 200")
    done = run(f"{line} --references part.tsv")
    assert origins() == ["reference" if number is None else "own"]
    assert done.stderr.count("1 of its 5 segments have no reference; the model translates all") == warned


@pytest.mark.parametrize("suffix", [".tsv", ".tmx"])
def test_translations_that_the_source_has_are_learned_and_stay(suffix: str, tiny: str, here: Path) -> None:
    """The last is as its source, which is none."""
    rows = [(source, target if n in (1, 2) else None) for n, (source, target) in enumerate(PAIRS)]
    rows[-1] = (PAIRS[-1][0], PAIRS[-1][0])
    segments = [bilingual.Segment(*row) for row in rows]
    bilingual.write(Path(f"half{suffix}"), bilingual.Document(segments, ("de", "en")), Path("de.txt"))
    line = arguments(tiny).replace("de.txt", f"half{suffix}").replace("out.txt", f"out{suffix}")
    done = run(line.replace("--passage 30", "--passage 200"))
    assert "2 of its 5 segments have a translation: learned as they are, and kept" in done.stderr
    passages = [record for record in journal(f"out{suffix}.session") if record["op"] == "passage"]
    assert [record["origin"] for record in passages] == ["own", "reference", "own"]
    assert passages[1]["target"] == "\n".join(target for _, target in PAIRS[1:3])
    made = bilingual.read(Path(f"out{suffix}"), ("de", "en")).segments
    assert [(s.source, s.target) for s in made[1:3]] == list(PAIRS[1:3])
    assert made[0].target != PAIRS[0][1]
    assert made[0].target


def test_blank_references_of_a_passage_are_none(tiny: str, here: Path) -> None:
    text = TSV
    for number in range(4):
        text = text.replace(f"\t{PAIRS[number][1]}\n", "\t \n")
    Path("part.tsv").write_text(text, "utf-8")
    run(f"{arguments(tiny).replace('--passage 30', '--passage 50')} --references part.tsv")
    assert [place for place, origin in enumerate(origins()) if origin == "reference"] == [len(origins()) - 1]
    assert len(origins()) < len(PAIRS), "some passage has several lines"


def test_a_line_break_in_a_reference_moves_no_other_line(tiny: str, here: Path) -> None:
    Path("part.tsv").write_text(TSV.replace("Su Mian came.", "Su Mian\\n came."), "utf-8")
    line = arguments(tiny).replace("--passage 30", "--passage 200")
    run(f"{line} --references part.tsv")
    assert Path("out.txt").read_text("utf-8") == Path("en.txt").read_text("utf-8")


def journal(folder: str = "out.txt.session") -> list[dict[str, Any]]:
    lines = map(json.loads, Path(folder, "journal.jsonl").read_text("utf-8").splitlines())
    return [{k: v for k, v in line.items() if k != "crc"} for line in lines][1:]


def command(line: str) -> list[str]:
    return [sys.executable, "-m", "templora", "translate", *line.split()]


@pytest.mark.slow
def test_killed_at_any_passage_it_goes_on_as_if_it_had_not_been(tiny: str, here: Path) -> None:
    Path("de.txt").write_text("".join(f"{source}\n" for source, _ in PAIRS * 4), "utf-8")
    run(f"{arguments(tiny)} --session whole")
    whole, text = journal("whole"), Path("out.txt").read_bytes()
    Path("out.txt").unlink()
    shows = arguments(tiny).replace(" --quiet", "")
    for _ in range(4):
        with subprocess.Popen(
            command(shows),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        ) as process:
            assert process.stdout is not None
            process.stdout.readline()
            process.send_signal(signal.SIGKILL)
    assert 0 < len(journal()) < len(whole)
    run(arguments(tiny))
    assert journal() == whole
    assert Path("out.txt").read_bytes() == text


def test_a_correction_made_later_is_learned_with_all_that_follows(tiny: str, here: Path) -> None:
    line = f"{arguments(tiny)} --corrections fixes"
    run(f"{line} --references en.txt")
    assert Path("fixes/00001.source.txt").read_text("utf-8") == PAIRS[1][0] + "\n"
    Path("fixes/00001.txt").write_text("Su Mian beheld the sea.\n", "utf-8")
    done = run(f"{line} --references en.txt")
    assert "passage 1 was corrected" in done.stderr
    assert Path("out.txt").read_text("utf-8").splitlines()[1] == "Su Mian beheld the sea."
    session = templora.load(tiny).session(window=64, context=64, chunk=24, seed=0)
    straight = Translator(session, load("plain", session.base, "de", "en"))
    pairs = [PAIRS[0], (PAIRS[1][0], "Su Mian beheld the sea."), *PAIRS[2:]]
    list(straight.run(references(pairs)))
    newest = max(Path("out.txt.session/versions").iterdir())
    learned = load_file(newest / "adapter_model.safetensors")
    session.adapter.save(here / "straight")
    expected = load_file(here / "straight" / "adapter_model.safetensors")
    assert all(torch.equal(learned[name], expected[name]) for name in expected)


def test_drafts_to_edit_are_there_whenever_they_are_asked_for(tiny: str, here: Path) -> None:
    run(f"{arguments(tiny)} --references en.txt")
    line = f"{arguments(tiny)} --references en.txt --corrections fixes"
    run(line)
    drafts = [Path(f"fixes/{number:05}.txt") for number in range(len(PAIRS))]
    assert [draft.read_text("utf-8").strip() for draft in drafts] == [target for _, target in PAIRS]
    drafts[2].write_text("He beheld Su Mian.\n", "utf-8")
    drafts[3].unlink()  # as after a kill before it was written
    Path("fixes/00003.source.txt").unlink()
    done = run(line)
    assert "passage 2 was corrected" in done.stderr
    assert done.stderr.count("was corrected") == 1
    assert drafts[2].read_text("utf-8") == "He beheld Su Mian.\n"
    assert drafts[3].read_text("utf-8").strip() == PAIRS[3][1]
    assert Path("fixes/00003.source.txt").read_text("utf-8").strip() == PAIRS[3][0]


def test_review_asks_about_each_passage(tiny: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    editor('echo "Su Mian came." > "$1"', monkeypatch)
    run(f"{arguments(tiny)} --review", answers="what\ne\na\na\na\na\n")
    assert origins() == ["correction"] + ["accepted"] * 4
    assert Path("out.txt").read_text("utf-8").splitlines()[0] == "Su Mian came."


def refused(line: str, *reasons: str) -> None:
    done = CliRunner().invoke(app, ["translate", *line.split()])
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1), done.output
    assert all(reason in done.stderr for reason in reasons), done.stderr


def begin_anew() -> None:
    Path("out.txt").unlink()
    shutil.rmtree("out.txt.session")


def test_corrections_outlive_their_session(tiny: str, here: Path) -> None:
    line = f"{arguments(tiny)} --corrections fixes"
    run(f"{line} --references en.txt")
    Path("fixes/00001.txt").write_text("Corrected by me.\n", "utf-8")
    Path("fixes/00002.txt").write_text("\n", "utf-8")
    Path("fixes/00003.txt").unlink()
    begin_anew()
    done = run(line)
    assert "fixes holds translations of passages to come" in done.stderr
    assert Path("fixes/00001.txt").read_text("utf-8") == "Corrected by me.\n"
    assert origins() == ["reference", "reference", "own", "own", "reference"]
    lines = Path("out.txt").read_text("utf-8").split("\n")  # a random model has odder breaks
    assert (lines[0], lines[1], lines[4]) == (PAIRS[0][1], "Corrected by me.", PAIRS[4][1])
    assert Path("fixes/00003.txt").read_text("utf-8").split() == lines[3].split()
    assert "passages to come" not in run(line).stderr


@pytest.mark.parametrize("sources", [True, False])
def test_files_of_another_translation_are_no_corrections(sources: bool, tiny: str, here: Path) -> None:
    line = f"{arguments(tiny)} --corrections fixes"
    run(f"{line} --references en.txt")
    if sources:
        Path("de.txt").write_text("Ein anderes Buch.\n", "utf-8")
    else:
        for path in Path("fixes").glob("*.source.txt"):
            path.unlink()
        run(line)  # of passages that are translated they may be gone
    begin_anew()
    refused(line, "fixes/00000.txt is no passage of this translation; choose another --corrections")
    assert Path("fixes/00000.txt").read_text("utf-8").strip() == PAIRS[0][1]
    assert not Path("out.txt.session").exists()


def test_a_translation_that_a_person_has_edited_is_not_overwritten(tiny: str, here: Path) -> None:
    run(arguments(tiny))
    written = Path("out.txt").read_bytes()
    run(arguments(tiny))
    Path("out.txt").write_text("MY EDIT\n", "utf-8")
    with Path("de.txt").open("a", encoding="utf-8") as file:
        file.write("Das war das Ende.\n")
    refused(arguments(tiny), "out.txt was changed since it was written; move it away, or ")
    assert Path("out.txt").read_text("utf-8") == "MY EDIT\n"
    Path("out.txt").rename("mine.txt")
    run(arguments(tiny))
    assert Path("out.txt").read_bytes().startswith(written)
    Path("out.txt").write_bytes(written)  # an earlier one is this translation's, too
    run(arguments(tiny))
    assert len(Path("out.txt").read_text("utf-8").splitlines()) == len(PAIRS) + 1


def test_what_is_edited_while_others_are_translated_stays(
    tiny: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(arguments(tiny))
    with Path("de.txt").open("a", encoding="utf-8") as file:
        file.write("Das war das Ende.\n")
    editor("echo Done. > $1; echo MY EDIT > out.txt", monkeypatch)
    done = CliRunner().invoke(app, ["translate", *arguments(tiny).split(), "--review"], input="e\n")
    assert done.exit_code == 2 and "out.txt was changed since it was written" in done.stderr
    assert Path("out.txt").read_text("utf-8") == "MY EDIT\n"
    Path("out.txt").unlink()
    run(arguments(tiny))
    assert Path("out.txt").read_text("utf-8").splitlines()[-1] == "Done."


def test_a_session_of_old_does_not_say_what_it_wrote(tiny: str, here: Path) -> None:
    run(arguments(tiny))
    lines = [json.loads(line) for line in Path("out.txt.session/journal.jsonl").read_text().splitlines()]
    crc = 0
    with Path("out.txt.session/journal.jsonl").open("wb") as file:
        for line in lines[:-1]:  # the last one says what was written
            data, crc = sealed({k: v for k, v in line.items() if k not in ("crc", "digest")}, crc)
            file.write(data)
    assert [line for line in journal() if line["op"] == "out"] == [{"op": "out", "name": "../out.txt"}]
    run(arguments(tiny))
    Path("out.txt").write_text("MY EDIT\n", "utf-8")
    refused(arguments(tiny), "out.txt was changed since it was written")


def test_the_beginning_of_a_source_is_not_the_source(tiny: str, here: Path) -> None:
    run(arguments(tiny))
    whole, text = Path("out.txt").read_bytes(), Path("de.txt").read_bytes()
    Path("de.txt").write_bytes(b"".join(text.splitlines(keepends=True)[:3]))
    reason = "de.txt has 3 passages, out.txt.session has translated 5"
    refused(arguments(tiny), reason)
    assert Path("out.txt").read_bytes() == whole
    elsewhere = arguments(tiny).replace("--out out.txt", "--out new.txt --session out.txt.session")
    refused(elsewhere, reason)
    Path("de.txt").write_bytes(text)
    Path("new.txt").write_text("Dear diary", "utf-8")
    refused(elsewhere, "new.txt exists and is never overwritten")


def full(folder: Path) -> None:
    """No file is written beyond its first bytes, as on a disk without room."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, resource.RLIM_INFINITY))


def blocked(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("no room here")


@pytest.mark.parametrize("spoil", [full, blocked])
def test_a_version_that_cannot_be_saved_is_a_warning(
    spoil: Callable[[Path], None], tiny: str, here: Path
) -> None:
    run(arguments(tiny))
    with Path("de.txt").open("a", encoding="utf-8") as file:
        file.write("Das war das Ende.\n")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    spoil(Path("out.txt.session/versions"))
    try:
        done = run(arguments(tiny))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "warning: cannot save" in done.stderr and "the translations themselves are safe" in done.stderr
    assert len(Path("out.txt").read_text("utf-8").splitlines()) == len(PAIRS) + 1


def editor(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("editor.sh").write_text(f"#!/bin/sh\n{script}\n")
    Path("editor.sh").chmod(0o755)
    monkeypatch.setenv("EDITOR", "./editor.sh")
    monkeypatch.delenv("VISUAL", raising=False)


@pytest.mark.parametrize("script", ["exit 1", "rm editor.sh; exit 1", "printf '\\344' > $1"])
def test_a_failing_editor_costs_nothing(
    script: str, tiny: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    editor(script, monkeypatch)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    done = run(f"{arguments(tiny)} --review", answers="e\ne\na\na\na\na\na\n")
    assert done.stderr.count("edit it again, accept the draft, or stop") == 2
    assert origins() == ["accepted"] * 5
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_an_editor_that_saves_nothing_accepts_nothing(
    tiny: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    editor("true", monkeypatch)
    done = CliRunner().invoke(app, ["translate", *arguments(tiny).split(), "--review"], input="e\n")
    assert done.exit_code == 130 and done.stderr.count("[e]dit") == 2
    assert not Path("out.txt").exists()


def test_a_template_that_was_changed_is_another(tiny: str, here: Path) -> None:
    Path("mine.yaml").write_text("prompt: '{source}\n'\nend: '\n\n'\n")
    run(f"{arguments(tiny)} --prompt-template mine.yaml")
    run(f"{arguments(tiny)} --prompt-template mine.yaml")
    Path("mine.yaml").write_text("prompt: '{source} = '\nend: '\n\n'\n")
    refused(f"{arguments(tiny)} --prompt-template mine.yaml", "was begun with wording")


def test_one_signal_ends_the_learning_of_what_was_translated_before(
    tiny: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = f"{arguments(tiny)} --corrections fixes"
    run(line)
    Path("fixes/00000.txt").write_text("Su Mian came.\n", "utf-8")
    again: list[int] = []
    learn_again = Translator.learn_again

    def interrupted(made: Translator, record: Any) -> list[Event]:
        again.append(1)
        signal.raise_signal(signal.SIGINT)
        return learn_again(made, record)

    with monkeypatch.context() as patched:
        patched.setattr(Translator, "learn_again", interrupted)
        done = CliRunner().invoke(app, ["translate", *line.split()])
    assert (done.exit_code, again) == (130, [1])
    assert Path("out.txt").read_text("utf-8").startswith("Su Mian came.\n")
    run(line)


def test_who_stops_reviewing_keeps_what_is_done(tiny: str, here: Path) -> None:
    line = [*arguments(tiny).split(), "--review"]
    done = CliRunner().invoke(app, ["translate", *line], input="")
    assert done.exit_code == 130 and "go on with the same command" in done.stderr
    assert not Path("out.txt").exists()
    done = CliRunner().invoke(app, ["translate", *line], input="a\na\n")
    assert done.exit_code == 130 and "2 of 5 passages are in out.txt" in done.stderr
    lines = Path("out.txt").read_text("utf-8").splitlines()
    assert [bool(line) for line in lines] == [True, True, False, False, False]
    assert "5 of 5 passages are in out.txt" in run(f"{arguments(tiny)} --review", answers="a\na\na\n").stderr


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_ends_a_prompt(number: signal.Signals, tiny: str, here: Path) -> None:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    with subprocess.Popen(command(f"{arguments(tiny)} --review"), **pipes) as process:
        assert process.stdin is not None and process.stderr is not None
        process.stdin.write(b"a\n")
        process.stdin.flush()
        said = b""
        while said.count(b"[e]dit") < 2:
            said += process.stderr.read(1)
        process.send_signal(number)
        assert b"1 of 5 passages are in out.txt" in process.stderr.read()
    assert process.returncode == 130
    assert len(journal()) == 3, "out, the passage, what was written"


@pytest.mark.slow
def test_a_reader_that_has_gone_does_not_cost_the_file(tiny: str, here: Path) -> None:
    line = command(arguments(tiny).replace(" --quiet", ""))
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert b"Traceback" not in process.stderr.read()
    assert process.returncode == 1
    assert Path("out.txt").read_text("utf-8").splitlines()[0]


def test_an_error_on_the_way_does_not_cost_the_file(
    tiny: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    editor('rm -r fixes; echo Mine. > "$1"', monkeypatch)
    line = [*arguments(tiny).split(), "--corrections", "fixes", "--review"]
    done = CliRunner().invoke(app, ["translate", *line], input="a\ne\n")
    assert done.exit_code == 2 and "cannot write in fixes" in done.stderr
    assert Path("out.txt").read_text("utf-8").splitlines()[1:] == ["Mine.", "", "", ""]


@pytest.mark.parametrize(
    ("recipe", "options", "sizes"),
    [
        ("", "", (64, 64, 64)),  # of 128 positions
        ("", "--set window=40 --set chunk=30", (40, 30, 40)),
        ("", "--set context=20 --window 40", (40, 64, 20)),
        ("window: 50\n", "", (50, 64, 50)),
        ("window: 50\nchunk: 30\ncontext: 20\n", "", (50, 30, 20)),
        ("window: 50\nchunk: 30\n", "--window 40 --chunk 24", (40, 24, 40)),
        ("window: 50\n", "--set window=60", (60, 64, 60)),
    ],
)
def test_sizes_are_the_users_where_there_are_any(
    recipe: str, options: str, sizes: tuple[int, int, int], tiny: str, here: Path
) -> None:
    Path("mine.yaml").write_text(f"epochs: 2\n{recipe}", "utf-8")
    line = f"de.txt --from de --to en --out out.txt --model {tiny} -q --references en.txt --recipe mine.yaml"
    run(f"{line} {options}")
    found = json.loads(Path("out.txt.session/session.json").read_text("utf-8"))["recipe"]
    assert (found["window"], found["chunk"], found["context"]) == sizes


def test_drafts_beside_references_can_be_reviewed(tiny: str, here: Path) -> None:
    Path("part.tsv").write_text(lacking(1), "utf-8")
    run(f"{arguments(tiny)} --references part.tsv --review", answers="a\n")
    assert origins() == ["reference", "accepted", "reference", "reference", "reference"]


def test_a_translation_goes_into_a_folder_that_is_not_there_yet(tiny: str, here: Path) -> None:
    run(arguments(tiny).replace("--out out.txt", "--out new/out.txt --session s"))
    assert Path("new/out.txt").exists()


def test_a_guessed_encoding_is_said(tiny: str, here: Path) -> None:
    Path("de.txt").write_bytes("Als er aus unruhigen Träumen erwachte, regnete es.\n".encode("cp1252") * 9)
    Path("en.txt").write_bytes("The café was closed — “never mind,” she said.\n".encode("cp1252") * 9)
    done = run(arguments(tiny).replace("--passage 30", "--passage 60") + " --references en.txt")
    assert "de.txt is not UTF-8; read as cp125" in done.stderr
    assert "en.txt is not UTF-8; read as cp125" in done.stderr
    assert "café" in Path("out.txt").read_text("utf-8")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("nowhere.txt --from de --to en --out o.txt", "cannot read nowhere.txt"),
        ("empty.txt --from de --to en --out o.txt", "holds no text"),
        ("de.txt --from= --to en --out o.txt", "--from and --to name two languages"),
        ("de.txt --from de --to en --out en.txt", "en.txt exists and is never overwritten"),
        ("de.txt --from de --to en --out o.epub", "can be made of an EPUB only"),
        ("de.txt --from de --to en --out o.txt --references short.txt", "has 1 segments, the source 5"),
        ("de.txt --from de --to en --out o.txt --glossary en.txt", "is no glossary"),
        ("de.txt --from de --to en --out o.txt --prompt-template x", "no template 'x'"),
        ("three.tsv --from de --to en --out o.txt", "a TSV file has source and target"),
        ("de.txt --from de --to en --out o.txt --references blank.tsv", "blank.tsv holds no translations"),
        ("de.txt --from de --to en --out o.docx", "o.docx cannot be made; choose .txt, "),
        ("de.txt --from de --to en --out o.txt.xz", "o.txt.xz cannot be made; choose .txt, "),
        ("de.txt --from de --to en --out de.txt/o.txt --session o.txt.session", "cannot make de.txt: "),
        (f"de.txt --from de --to en --out {'o' * 252} --session o.txt.session", "cannot write ooo"),
        ("de.txt --from de --to en --out o.txt --window 0", "recipe key window: "),
        ("de.txt --from de --to en --out o.txt --chunk 0", "recipe key chunk: "),
        ("de.txt --from de --to en --out o.txt --references en.txt --review", "leaves no draft to review"),
        ("de.txt --from de --to en --out o.txt --session o.txt", "o.txt cannot be a folder as well"),
        ("de.txt --from de --to en --out o.txt --corrections o.txt", "o.txt cannot be a folder as well"),
    ],
)
def test_what_cannot_work_is_one_line(line: str, reason: str, tiny: str, here: Path) -> None:
    Path("empty.txt").write_text("\n \n")
    Path("short.txt").write_text("one\n")
    Path("blank.tsv").write_text("a\t\n" * 5)
    Path("three.tsv").write_text("a\tb\tc\n")
    done = CliRunner().invoke(app, ["translate", *line.split(), "--model", tiny])
    assert done.exit_code == 2, done.output
    assert done.stderr.count("\n") == 1
    assert reason in done.stderr
    assert not Path("o.txt.session").exists()


def test_a_session_keeps_its_source_and_settings(tiny: str, here: Path) -> None:
    run(f"{arguments(tiny)} --references en.txt")
    for line, reason in (
        (arguments(tiny).replace("--to en", "--to fr"), "was begun with to 'en', not 'fr'"),
        (arguments(tiny) + " --recipe paper", "was begun with name 'default', not 'paper'"),
        (arguments(tiny) + " --model novelist", "this base differs"),
    ):
        done = CliRunner().invoke(app, ["translate", *line.split()])
        assert (done.exit_code, reason in done.stderr) == (2, True), done.stderr
    Path("de.txt").write_text("Etwas anderes.\n")
    done = CliRunner().invoke(app, ["translate", *arguments(tiny).split()])
    assert "passage 0 of de.txt is not what out.txt.session has translated" in done.stderr
    done = CliRunner().invoke(app, ["write", "--session", "out.txt.session", "--tokens", "5"])
    assert "holds a translation; go on with templora translate" in done.stderr
    for verb in ("show", "export", "undo"):
        done = CliRunner().invoke(app, ["sessions", verb, "out.txt.session"])
        assert done.exit_code == 2
        assert "holds a translation; go on with templora translate" in done.stderr


@pytest.mark.parametrize("how", ["lost", "damaged"])
def test_a_lost_header_is_restored_from_the_journal(tiny: str, here: Path, how: str) -> None:
    run(f"{arguments(tiny)} --references en.txt")
    head, text = Path("out.txt.session/session.json"), Path("out.txt").read_text("utf-8")
    before = head.read_text("utf-8")
    head.unlink() if how == "lost" else head.write_text(before[:-40], "utf-8")
    done = run(f"{arguments(tiny)} --references en.txt")
    assert "session.json is damaged or missing; it was restored from the journal" in done.stderr
    assert (head.read_text("utf-8"), Path("out.txt").read_text("utf-8")) == (before, text)


def test_an_output_that_is_a_link_stays_one(tiny: str, here: Path) -> None:
    Path("elsewhere").mkdir()
    Path("out.txt").symlink_to("elsewhere/book.txt")
    run(f"{arguments(tiny)} --references en.txt")
    assert Path("out.txt").is_symlink()
    assert Path("elsewhere/book.txt").read_text("utf-8") == Path("en.txt").read_text("utf-8")


def test_no_other_file_is_overwritten(tiny: str, here: Path) -> None:
    run(arguments(tiny))
    Path("diary.txt").write_text("Dear diary", "utf-8")
    for out in ("diary.txt", "de.txt"):
        line = arguments(tiny).replace("--out out.txt", f"--out {out} --session out.txt.session")
        before = Path(out).read_bytes()
        done = CliRunner().invoke(app, ["translate", *line.split()])
        assert done.exit_code == 2 and f"{out} exists and is never overwritten" in done.stderr
        assert Path(out).read_bytes() == before
    for _ in range(2):  # a new place, and the same again
        run(arguments(tiny).replace("--out out.txt", "--out new.txt --session out.txt.session"))
    run(arguments(tiny))
    assert Path("new.txt").read_bytes() == Path("out.txt").read_bytes()


@pytest.mark.parametrize("name", ["ed.txt", "ed.epub", "nowhere/de.txt"])
def test_a_mistyped_source_is_one_line_also_when_there_is_a_session(name: str, tiny: str, here: Path) -> None:
    run(arguments(tiny))
    before = Path("out.txt").read_bytes()
    done = CliRunner().invoke(app, ["translate", *arguments(tiny).replace("de.txt", name).split()])
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
    assert f"cannot read {name}" in done.stderr
    assert Path("out.txt").read_bytes() == before


def test_a_correction_is_utf_8(tiny: str, here: Path) -> None:
    line = f"{arguments(tiny)} --corrections fixes"
    run(line)
    Path("fixes/00001.txt").write_bytes("\ufeffSu Mian ging.".encode())
    run(line)
    assert "\ufeff" not in Path("out.txt").read_text("utf-8")
    assert "Su Mian ging." in Path("out.txt").read_text("utf-8")
    Path("fixes/00001.txt").write_bytes("Gerät".encode("cp1252"))
    done = CliRunner().invoke(app, ["translate", *line.split()])
    assert done.exit_code == 2 and "fixes/00001.txt" in done.stderr and "UTF-8" in done.stderr


def test_a_translation_stands_among_sessions(tiny: str, here: Path) -> None:
    run(arguments(tiny))
    passages = [line for line in journal() if line["op"] == "passage"]
    tokens = sum(line["tokens"] for line in passages)
    (row,) = CliRunner().invoke(app, ["sessions", "ls"]).stdout.splitlines()[1:]
    assert row.split()[:3] == ["out.txt.session", f"{tokens:,}", str(len(passages))]


@pytest.mark.parametrize(
    "text",
    [
        "a\x00b",
        "a\x08\x1b[31mb\n\nс русским и 中文 \u05e2\u05d1",
        "x" * 50_000,
        "。" * 3000,
        "\ufeffb\r\nc\rd",
    ],
    ids=["nul", "control", "one long line", "no sentence", "line ends"],
)
def test_odd_sources_are_translated_or_refused(text: str, tiny: str, here: Path) -> None:
    Path("de.txt").write_bytes(text.encode())
    parts = blocks(text.split("\n"), "de", lambda t: len(t.encode()), 400)
    assert "".join("".join(p.source.split()) for p in parts) == "".join(text.split())
    if len(text) > 1000:
        return  # as passages it is like any other, only long
    done = CliRunner().invoke(app, ["translate", *arguments(tiny).split()])
    if "\0" in text:
        assert (done.exit_code, "binary data" in done.stderr) == (2, True)
    else:
        assert done.exit_code == 0, done.output
        assert len(Path("out.txt").read_text("utf-8").splitlines()) == len(text.splitlines())


@pytest.mark.slow
def test_a_thousand_passages_run_in_flat_memory(tiny: str) -> None:
    made = translator(templora.load(tiny))
    peaks: list[int] = []
    for number, passage in enumerate(references(PAIRS * 200)):
        made.translate(passage)
        if number in (199, 999):
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    assert peaks[1] - peaks[0] < 20_000, "kilobytes"


def test_a_passage_without_text_is_refused() -> None:
    with pytest.raises(InvalidText, match="passage 0 holds no text"):
        translator(tiny_base()).translate(Passage(" "))
