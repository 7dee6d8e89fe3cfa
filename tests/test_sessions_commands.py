"""`templora sessions`, `read` and `write --session` as a person types them."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import templora
from templora.cli import app
from templora.formats import book
from templora.testing import ByteTokenizer, tiny_llama

pytestmark = pytest.mark.slow
PROMPT = "The lighthouse keeper climbed the stairs."
SIZES = ["--window", "40", "--chunk", "16", "--context", "40"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tiny model."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_llama(initializer_range=0.2).save_pretrained(folder)
    ByteTokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


def run(line: str, *more: str, answer: str | None = None) -> Result:
    """A command line that must work."""
    done = CliRunner().invoke(app, [*line.split(), *more], input=answer)
    assert done.exit_code == 0, done.stderr
    return done


def refused(line: str, *more: str) -> str:
    """What a command line that must not work says: one line, exit code 2."""
    done = CliRunner().invoke(app, [*line.split(), *more])
    assert done.exit_code == 2
    assert done.stderr.count("\n") == 1
    return done.stderr


def begin(tiny: str, tokens: int = 60) -> str:
    """A session `s` that begins with PROMPT; returns its text."""
    run(f"write --session s --tokens {tokens} --model {tiny}", *SIZES, PROMPT)
    return text_of("s")


def text_of(folder: str) -> str:
    return run(f"sessions export {folder}").stdout_bytes.decode()


def test_writing_goes_on_where_it_stopped_and_gives_one_text(tiny: str, here: Path) -> None:
    out = here / "whole.txt"
    run(f"write --tokens 100 --model {tiny} --out {out}", *SIZES, PROMPT)
    begun = begin(tiny)
    assert begun.startswith(PROMPT)
    done = run("write --session s --tokens 40")
    assert text_of("s") == begun + done.stdout_bytes.decode() == out.read_bytes().decode()


def test_the_same_command_again_goes_on_and_does_not_repeat_the_prompt(tiny: str, here: Path) -> None:
    begin(tiny, 30)
    run("write --session s --tokens 30", PROMPT)
    assert text_of("s").count(PROMPT) == 1
    run("write --session s --tokens 10", "A new chapter.")
    assert "A new chapter." in text_of("s")


def test_what_is_said_to_go_on_with_goes_on(tiny: str, here: Path) -> None:
    done = run(f"write --session s --tokens 20 --model {tiny}", *SIZES, PROMPT)
    *_, saved, go_on = done.stderr.splitlines()
    assert saved == "saved to s"
    assert go_on == "go on with: templora write --session s --tokens 20"
    run(go_on.removeprefix("go on with: templora "))


def test_a_session_keeps_what_it_was_begun_with(tiny: str, here: Path) -> None:
    begin(tiny)
    said = refused("write --session s --recipe paper --window 30")
    assert "s exists and keeps what it was begun with; leave out --recipe, --window" in said
    assert "differs" in refused(f"write --session s --model {other(here)}")


def other(folder: Path) -> Path:
    tiny_llama(seed=5, initializer_range=0.2).save_pretrained(folder / "other")
    ByteTokenizer().save_pretrained(folder / "other")
    return folder / "other"


def test_another_seed_after_an_undo_gives_another_text(tiny: str, here: Path) -> None:
    before = begin(tiny)
    run("sessions undo s")
    run("write --session s --tokens 5")
    assert text_of("s") == before
    run("sessions undo s")
    assert "from here on drawn from seed 3" in run("write --session s --tokens 5 --seed 3").stderr
    assert text_of("s") != before


def test_undo_redo_and_rewind(tiny: str, here: Path) -> None:
    before = begin(tiny)
    shown = run("sessions undo s --chunks 2").stderr
    assert re.match(r"s now has 81 tokens \(-21\) and ends '.*'", shown)
    assert before.startswith(text_of("s")) and text_of("s") != before
    run("sessions redo s")
    assert text_of("s") == before
    run("sessions note s whole")
    assert "choose another name" in refused("sessions note s v3")
    run("sessions rewind s 42")
    assert text_of("s") == PROMPT
    run("sessions rewind s whole")
    assert text_of("s") == before
    run("sessions rewind s 42")
    assert "nothing to redo" in refused("sessions redo s")
    assert "it has 3" in refused("sessions undo s --chunks 9")
    assert "has no version or note 'v99'" in refused("sessions rewind s v99")
    assert "has no version or note '²'" in refused("sessions rewind s ²")
    run("sessions rewind s v1")
    assert text_of("s") == before


def test_show_draws_the_tree_of_versions(tiny: str, here: Path) -> None:
    begin(tiny)
    run("sessions rewind s 42")
    run("write --session s --tokens 30 --seed 4")
    session = templora.resume(here / "s")
    session.note("the storm")
    session.close()
    shown = run("sessions show s").stdout.splitlines()
    assert shown[0].startswith("s: 72 tokens on ")
    assert re.search(r"├── v1, 102 tokens, 6 updates, perplexity [\d.]+ \(base [\d.]+\)", shown[1])
    assert any(re.search(r"v\d, 72 tokens, 4 updates, .*“the storm”", line) for line in shown)
    assert "now: 72 tokens" in shown[-1]
    listed = run("sessions ls").stdout.splitlines()
    assert re.search(r"^ s +72 +4 +[\d.]+ +\S+ +default", listed[1])


def test_a_fork_goes_its_own_way_and_shares_its_versions(tiny: str, here: Path) -> None:
    before = begin(tiny)
    run("sessions fork s t")
    assert os.path.samefile(*(f"{f}/versions/v000001/adapter_model.safetensors" for f in "st"))
    run("write --session t --tokens 10")
    assert text_of("s") == before != text_of("t")
    run("sessions fork s u --to 42")
    assert text_of("u") == PROMPT
    assert "holds a session already" in refused("sessions fork s t")
    run("sessions rm s --yes")
    run("write --session t --tokens 5")


def test_deleting_asks_first(tiny: str, here: Path) -> None:
    begin(tiny)
    done = CliRunner().invoke(app, ["sessions", "rm", "s"], input="n\n")
    assert (done.exit_code, Path("s").exists()) == (1, True)
    assert "nothing was deleted" in done.stderr
    assert "holds no session; nothing was deleted" in refused("sessions rm --yes s nowhere")
    assert Path("s").exists()
    run("sessions rm s", answer="y\n")
    assert not Path("s").exists()


def test_a_session_that_is_open_elsewhere_is_named(tiny: str, here: Path) -> None:
    begin(tiny)
    writing = [sys.executable, "-m", "templora", "write", "--session", "s", "--tokens", "100000", "--json"]
    quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(writing, **quiet) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline()
            said = refused("write --session s --tokens 5")
            assert f"s is open in process {process.pid} on {os.uname().nodename}; close it there" in said
            assert "is open in process" in refused("sessions undo s")
            assert "is open in process" in refused("sessions rm s --yes")
            run("sessions show s")
            process.send_signal(signal.SIGTERM)
            process.stdout.read()
        finally:
            process.kill()
    run("write --session s --tokens 5")


def test_reading_any_kind_of_book_and_writing_on(tiny: str, here: Path) -> None:
    from templora.formats import chapters, epub

    Path("a.txt").write_text("The lamp was lit. " * 5, "utf-8")
    Path("b.txt").write_bytes("Où était la lumière? À l'été, près de la forêt.".encode("cp1252"))
    epub.write(Path("c.epub"), "C", chapters.split("# One\n\nIt began.\n\n# Two\n\nIt ended."))
    done = run(f"read a.txt b.txt c.epub --session s --model {tiny} --base", *SIZES)
    assert "b.txt is not UTF-8; read as cp1252 (if that is wrong, say --encoding)" in done.stderr
    assert "a.txt: " in done.stderr and "perplexity base" in done.stderr
    assert "go on with: templora write --session s" in done.stderr
    text = text_of("s")
    assert text.startswith("The lamp was lit. ")
    assert "Où était la lumière? À l'été" in text
    assert "# One\n\nIt began." in text
    run("write --session s --tokens 20")
    assert len(text_of("s")) > len(text)
    assert "there is no encoding 'x'" in refused("read b.txt --session t --encoding x")
    assert "b.txt is not ascii" in refused("read b.txt --session t --encoding ascii")
    assert "cannot read nowhere.txt" in refused("read nowhere.txt --session t")
    assert not Path("t").exists()


def test_reading_that_was_stopped_goes_on_with_the_same_command(tiny: str, here: Path) -> None:
    Path("a.txt").write_text("The lamp was lit. " * 30, "utf-8")
    session = templora.load(tiny).session("default", dir="s", window=40, chunk=16, context=40)
    session.save_every = None
    events = session.reading(Path("a.txt").read_text("utf-8"), score_base=True)
    next(events)
    session.close()
    done = run("read a.txt --session s --base")
    assert "a.txt is in s already; learning what is left of it" in done.stderr
    assert text_of("s") == Path("a.txt").read_text("utf-8")


def test_several_books_are_each_read_once_however_often_it_is_asked(tiny: str, here: Path) -> None:
    books = {name: f"{name} was lit. " * 9 for name in ("a.txt", "b.txt", "c.txt")}
    for name, text in books.items():
        Path(name).write_text(text, "utf-8")
    line = f"read a.txt b.txt c.txt --session s --model {tiny} --set guard=false"
    run(line, *SIZES)
    said = run(line, *SIZES).stderr
    assert [name in said for name in books] == [True] * 3
    run("write --session s --tokens 5")
    run(line, *SIZES)
    assert [text_of("s").count(text) for text in books.values()] == [1] * 3
    assert "leave out --set" in refused(line.replace("guard=false", "guard=true"), *SIZES)


def test_what_a_command_did_not_come_to_is_offered(tiny: str, here: Path) -> None:
    from templora.commands.write import _Job

    Path("a.txt").write_text("The lamp was lit. ", "utf-8")
    base = templora.load(tiny)
    with base.session("default", dir="s", window=40, chunk=16, context=40) as session:
        given = {Path("a.txt"): "The lamp was lit. ", Path("b c.txt"): "It went out. "}
        job = _Job(
            session, Path("s"), "And then", "", given, 9, None, False, {"score_base": False}, " --top-k 5"
        )
        next(job.events())
        assert job.going_on == "templora write --read 'b c.txt' 'And then' --session s --tokens 9 --top-k 5"
        for _ in job.events():
            pass
        assert job.going_on == "templora write --session s --tokens 9 --top-k 5"
        assert session.text.startswith("The lamp was lit. It went out. And then")
    job = _Job(base.session(), None, "And then", "", given, 9, Path("o"), False, {}, "")
    assert job.going_on == "templora write --read a.txt --read 'b c.txt' --read o --out o --tokens 9"


def test_a_prompt_may_come_again_on_purpose(tiny: str, here: Path) -> None:
    before = begin(tiny)
    for _ in range(2):
        run("write --session s --tokens 5", "\n* * *\n")
    assert text_of("s").removeprefix(before).count("* * *") == 2
    run("write --session s --tokens 5 --window 40", PROMPT)
    assert text_of("s").count(PROMPT) == 1


def test_a_prompt_that_a_session_has_is_in_its_file_once(tiny: str, here: Path) -> None:
    begin(tiny)
    run("write --session s --tokens 5 --out o.txt", PROMPT)
    assert Path("o.txt").read_bytes().decode() == text_of("s")


@pytest.mark.parametrize("suffix", [".txt", ".md", ".epub"])
def test_export(suffix: str, tiny: str, here: Path) -> None:
    Path("novel.md").write_text("# One\n\nIt began & ended.\n\n# Two\n\nAgain.\n", "utf-8")
    run(f"read novel.md --session s --model {tiny}", *SIZES)
    run(f"sessions export s --out out{suffix} --title Novel")
    whole = Path(f"out{suffix}").read_bytes()
    if suffix == ".epub":
        assert book.read(Path("out.epub")).text == "# One\n\nIt began & ended.\n\n# Two\n\nAgain.\n"
    else:
        assert whole.decode() == Path("novel.md").read_text("utf-8")
    assert "is never overwritten" in refused(f"sessions export s --out out{suffix}")
    assert "choose .txt, .md or .epub" in refused("sessions export s --out out.pdf")
    assert Path(f"out{suffix}").read_bytes() == whole


def test_where_there_is_no_session_commands_say_so(here: Path) -> None:
    for line in ("show .", "undo .", "export .", "fork . x", "repair .", "rm --yes ."):
        assert "holds no session" in refused(f"sessions {line}")
    assert "no folder nowhere" in refused("sessions ls nowhere")
    assert "where you are" in refused("write --session .", "It was dark.")
    assert "the prompt is empty" in refused("write --session new")


def test_what_is_shown_is_as_it_is_whatever_it_holds(here: Path, tiny: str) -> None:
    run("write --tokens 1 --model", tiny, *SIZES, "--session", "[draft] x", "It was [/i] dark :smile: ")
    run("sessions note", "[draft] x", "[the end]")
    shown = run("sessions show", "[draft] x").stdout
    assert all(words in shown for words in ("[draft] x:", "“[the end]”", "[/i] dark :smile: "))
    run("sessions fork", "[draft] x", "caf\udce9")
    run("sessions fork", "caf\udce9", "t")
    listed = run("sessions ls").stdout
    assert " [draft] x " in listed and r" caf\udce9 " in listed
    assert "is no character" in refused("sessions note t", "caf\udce9")
    assert "has no version or note" in refused("sessions rewind t", "1" * 5000)


def test_a_session_whose_header_is_gone_is_read_from_its_journal(here: Path, tiny: str) -> None:
    text = begin(tiny)
    for spoil in (lambda path: path.write_text("{"), Path.unlink):
        spoil(Path("s/session.json"))
        assert text_of("s") == text
        assert "102 tokens" in run("sessions show s").stdout
        assert re.search(r"^ s +102 ", run("sessions ls").stdout, re.MULTILINE)
        said = run("write --session s --window 40 --tokens 1").stderr
        assert "session.json is damaged or missing; it was restored" in said
        run("sessions undo s")
        run("sessions redo s")
        run("sessions rewind s 102")


def test_a_copy_tells_what_was_mended_and_needs_no_versions(here: Path, tiny: str) -> None:
    text = begin(tiny)
    with Path("s/journal.jsonl").open("ab") as file:
        file.write(b'{"op":"own"')
    shutil.rmtree("s/versions")
    assert "11 bytes were dropped" in run("sessions fork s t").stderr
    assert text_of("t") == text


def test_nothing_is_begun_by_a_command_that_cannot_work(here: Path, tiny: str) -> None:
    Path("there").write_text("mine", "utf-8")
    for wrong in (["--out", "there"], ["--stop", ""], ["--top-p", "2"]):
        refused(f"write --session s --model {tiny}", *SIZES, *wrong, PROMPT)
        assert not Path("s").exists()
    assert "/ is not empty" in refused(f"write --session / --model {tiny}", *SIZES, PROMPT)
    run(f"write --session s --out s/novel.txt --tokens 1 --model {tiny}", *SIZES, PROMPT)


def test_what_the_disk_refuses_is_said_in_one_line(here: Path, tiny: str) -> None:
    long = "a" * 300
    for line in (f"write hi --model {tiny} --session", "sessions ls", "sessions rm --yes"):
        assert refused(line, long).startswith("error: ")
    run(f"write --session s --model {tiny} --tokens 20", "It was dark.", *SIZES)
    assert "no version or note" in refused("sessions fork s copy --to nowhere")
    assert not Path("copy").exists(), "a copy of no moment"
    Path("link").symlink_to("s")
    assert "symbolic link" in refused("sessions rm --yes link")


def test_halves_of_characters_are_refused_before_anything_is_written(here: Path, tiny: str) -> None:
    assert "the prompt is no character" in refused(f"write --model {tiny} --out x.txt", "caf\udce9")
    Path("p.jsonl").write_text('{"prompt": "\\ud83d dark"}\n', "utf-8")
    assert "line 1 of p.jsonl" in refused(f"write --prompts p.jsonl --out-dir d --model {tiny}")
    assert not Path("x.txt").exists() and not Path("d").exists()


@pytest.mark.parametrize("kept", [0, 0.3])
def test_a_journal_whose_end_is_gone_is_not_taken_for_a_whole_one(kept: float, here: Path, tiny: str) -> None:
    begin(tiny)
    journal = here / "s" / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[: int(kept * len(lines))]))
    for line in ("export s --out s.txt", "show s"):
        assert ("is missing; restore" if kept else "is empty; restore") in refused(f"sessions {line}")
    assert "cannot be opened" in run("sessions ls").stdout
    assert not (here / "s.txt").exists()


def test_a_book_with_line_ends_of_windows_is_read_once(here: Path, tiny: str) -> None:
    (here / "a.txt").write_bytes(b"It was dark.\r\nThe lamp was out.\r\n")
    run(f"read a.txt --session s --model {tiny}", *SIZES)
    run("write --session s --read a.txt --tokens 3")
    assert text_of("s").count("It was dark.") == 1


def test_a_text_goes_on_in_its_own_line_ends(here: Path, tiny: str) -> None:
    (here / "a.txt").write_bytes(b"It was dark.\r\nThe lamp was out.\r\n")
    run(f"write --read a.txt --out a.txt --tokens 400 --model {tiny}", *SIZES)
    data = (here / "a.txt").read_bytes()
    assert data.startswith(b"It was dark.\r\nThe lamp was out.\r\n")
    assert data.count(b"\n") > 2
    assert data.count(b"\n") == data.count(b"\r\n")


def test_a_string_to_stop_at_may_have_begun_before(here: Path, tiny: str) -> None:
    whole = begin(tiny, 60).removeprefix(PROMPT)
    for tokens in range(20, 50):
        shutil.rmtree("s")
        half = len(begin(tiny, tokens)) - len(PROMPT)
        wanted = whole[half - 2 : half + 2]
        # Half a character comes with the token that shows it to be none, so after a stop at it there is more.
        if "\ufffd" not in wanted and wanted not in whole[: half + 1]:
            break
    else:
        pytest.fail("no string that begins before and ends after")
    run("write --session s --tokens 30 --stop", wanted)
    assert text_of("s") == PROMPT + whole[: whole.index(wanted) + len(wanted)]
