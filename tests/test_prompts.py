"""Names of the files that `write --prompts` makes: each can be one, or is refused in a line."""

import json
import lzma
from pathlib import Path

import pytest
from typer.testing import CliRunner

from templora.cli import app
from templora.commands import prompts
from templora.commands.prompts import Prompt, prompts_of
from templora.errors import InvalidText


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
        prompts._Files(tmp_path, [Prompt("x" * 300, "It was dark.")])
