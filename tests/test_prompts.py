"""Names of the files that `write --prompts` makes: each can be one, or is refused in a line."""

import json
import lzma
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from templora.cli import app
from templora.commands import prompts
from templora.commands.prompts import Prompt, prompts_of
from templora.errors import InvalidText, OutputError
from templora.events import End, Event, Token
from templora.testing import ByteTokenizer, tiny_llama
from templora.text_file import TextFile


def given(tmp_path: Path, *names: object) -> Path:
    """A file of prompts with these names."""
    path = tmp_path / "openings.jsonl"
    path.write_text(
        "\n".join(json.dumps({"prompt": "It was dark.", "name": name}) for name in names), "utf-8"
    )
    return path


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("x" * 252, "is too long for a file's: 256 bytes with .txt; shorten it"),
        ("夜" * 84, "is too long for a file's: 256 bytes with .txt; shorten it"),
        ("", "cannot be a file's"),
        (["dark"], "cannot be a file's"),
        (True, "cannot be a file's"),
        ("a\0b", "leave out what no name may hold"),
        ("a\ud800b", "leave out what no name may hold"),
        ("a/b", "leave out slashes"),
    ],
)
def test_a_name_that_can_be_no_files_is_refused(name: object, reason: str, tmp_path: Path) -> None:
    path = given(tmp_path, "good", name)
    with pytest.raises(InvalidText, match=f"line 2 of .*{reason}"):
        prompts_of(path)
    line = ["write", "--prompts", str(path), "--out-dir", str(tmp_path / "o")]
    done = CliRunner().invoke(app, line)
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
    assert not (tmp_path / "o").exists()


def test_a_name_that_is_null_is_none(tmp_path: Path) -> None:
    names = [None, "x" * 251, 7, "夜"]
    assert [p.name for p in prompts_of(given(tmp_path, *names))] == ["1", "x" * 251, "7", "夜"]


def test_prompts_may_be_compressed_and_are_json_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "openings.jsonl.xz"
    path.write_bytes(lzma.compress(given(tmp_path, "dark").read_bytes()))
    assert [p.name for p in prompts_of(path)] == ["dark"]
    deep = tmp_path / "deep.jsonl"
    deep.write_text("[" * 100_000, "utf-8")
    with pytest.raises(InvalidText, match=r"line 1 of .* is not JSON"):
        prompts_of(deep)


def test_names_that_are_too_long_for_the_disk_are_one_line(tmp_path: Path) -> None:
    """Some disks take fewer bytes than most."""
    with pytest.raises(prompts.OutputError, match="File name too long; choose another --out-dir"):
        prompts._Files(tmp_path, [Prompt("x" * 300, "It was dark.")], resume=False)


def test_what_was_not_finished_is_written_by_the_same_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_llama(initializer_range=0.2).save_pretrained(tmp_path / "tiny")
    ByteTokenizer().save_pretrained(tmp_path / "tiny")
    (tmp_path / "p.txt").write_text("It was dark.\nThe sea.\nA lamp.", "utf-8")
    sizes = ["--window", "40", "--chunk", "16", "--context", "40", "--tokens", "20", "--batch", "2"]

    def run(out: str, *more: str) -> Result:
        words = ["write", "--prompts", "p.txt", "--model", "tiny", "--out-dir", out, *sizes, *more]
        return CliRunner().invoke(app, words)

    def texts(out: str) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (tmp_path / out).iterdir()}

    monkeypatch.chdir(tmp_path)
    assert run("whole").exit_code == 0
    assert sorted(texts("whole")) == ["1.txt", "2.txt", "3.txt"]

    real, ended = prompts._Files.take, list[Event]()

    def dies(files: Any, number: int, event: Event) -> None:
        real(files, number, event)
        ended.extend([event] if isinstance(event, End) else [])
        if len(ended) == 2 and isinstance(event, Token):  # in the middle of the third
            raise KeyboardInterrupt

    monkeypatch.setattr(prompts._Files, "take", dies)
    assert run("o").exit_code != 0
    monkeypatch.setattr(prompts._Files, "take", real)
    assert len([name for name in texts("o") if name.endswith(".tmp")]) == 1
    assert "add --resume" in run("o").stderr
    assert run("o", "--resume").exit_code == 0
    assert texts("o") == texts("whole")
    assert "all of these were written before" in run("o", "--resume").stderr
    (tmp_path / "o" / "2.txt").write_text("Another text.", "utf-8")
    assert "2.txt does not begin with its prompt" in run("o", "--resume").stderr
    assert "--resume goes with --prompts" in CliRunner().invoke(app, ["write", "a", "--resume"]).stderr


def test_two_do_not_write_to_one_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / "novel.txt"
    path.write_text("The sea was calm.")
    with TextFile(path, append=True) as first:
        with pytest.raises(OutputError, match="another process is writing"):
            TextFile(path, append=True)
        first.echo(" So.")
    with TextFile(path, append=True) as second:
        second.echo(" On.")
    assert path.read_text() == "The sea was calm. So. On."
