"""Sessions of yesterday open today: tests/sessions-of-old has one of each format, as written then."""

import os
import shutil
from pathlib import Path

import pytest

import templora
from templora import header, migrations, shelf
from templora.errors import NotASession, SessionDamaged
from tests.sessions import BASE, PROSE, base, durable, in_memory, killed, state, written

OLD = Path(__file__).parent / "sessions-of-old"


@pytest.mark.parametrize("number", range(1, header.FORMAT + 1))
def test_one_of_each_format_opens_and_goes_on(number: int, tmp_path: Path) -> None:
    folder = shutil.copytree(OLD / f"format-{number}", tmp_path / "s")
    text = (OLD / f"format-{number}.txt").read_bytes().decode("utf-8", "surrogatepass")
    bare = templora.load(str(OLD / "model"), dtype="float32")
    with templora.resume(folder, bare) as resumed:
        assert resumed.text == text
        assert resumed.store.warnings == []
        resumed.rewind("the storm")
        assert text.startswith(resumed.text)
        assert written(resumed, 20).text.startswith(PROSE)
    assert header.read(folder)["format"] == header.FORMAT


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A session of today, seen from a tomorrow whose headers have one more key."""
    folder = killed(written(durable(tmp_path / "s"), 40))

    def step(folder: Path, found: header.Header) -> header.Header:
        new = {**found, "format": 2, "bytes": int(found["budget"])}
        (folder / "journal.new").write_bytes((folder / "journal.jsonl").read_bytes())
        os.replace(folder / "journal.new", folder / "journal.jsonl")
        header.write(folder, new)
        return new

    monkeypatch.setattr(header, "FORMAT", 2)
    monkeypatch.setitem(migrations.STEPS, 1, step)
    return folder


def test_it_is_brought_up_to_date_and_goes_on(old: Path) -> None:
    resumed = templora.resume(old, base())
    assert header.read(old)["format"] == 2
    assert "bytes" in header.read(old)
    assert state(written(resumed, 50)) == state(written(in_memory(), 90))


@pytest.mark.parametrize("survivors", range(2))
def test_cut_short_at_any_file_it_is_done_again(
    survivors: int, old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, done = os.replace, 0

    def dies(source: Path, target: Path) -> None:
        nonlocal done
        if done == survivors:
            raise KeyboardInterrupt
        done += 1
        replace(source, target)

    monkeypatch.setattr(os, "replace", dies)
    with pytest.raises(KeyboardInterrupt):
        templora.resume(old, BASE)
    monkeypatch.setattr(os, "replace", replace)
    assert header.read(old)["format"] == 1
    assert state(written(templora.resume(old, base()), 50)) == state(written(in_memory(), 90))


def test_one_that_is_not_what_its_format_says_is_refused(old: Path) -> None:
    found = header.read(old)
    del found["budget"]
    header.write(old, found)
    with pytest.raises(SessionDamaged, match="is of format 1 and damaged; restore a copy"):
        templora.resume(old, BASE)


def test_looking_at_an_old_one_changes_nothing(old: Path) -> None:
    before = {path.name: path.read_bytes() for path in old.iterdir() if path.is_file()}
    with pytest.raises(NotASession, match="is of an older format; open it once"):
        shelf.look(old)
    assert {path.name: path.read_bytes() for path in old.iterdir() if path.is_file()} == before
