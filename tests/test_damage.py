"""Damaged, read-only and full: a clear error or the last good version with a warning, never another text."""

import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import templora
from templora import durable as durable_module
from templora import header, journal, shelf, versions
from templora.cli import app
from templora.durable import DurableSession
from templora.errors import (
    NotASession,
    OutputError,
    SessionDamaged,
    SessionLocked,
)
from templora.events import Event, Token, Warned
from templora.lock import Lock
from tests.sessions import BASE, base, durable, in_memory, killed, state, written

pytestmark = pytest.mark.slow
CUTS = ["emptied", "halved", "short", "long", "removed"]
FLIPS = [f"flip {n}" for n in range(6)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A session with three versions and an unfinished chunk."""
    return killed(written(durable(tmp_path_factory.mktemp("whole") / "s"), 90))


@pytest.fixture(scope="module")
def later() -> dict[str, Any]:
    """What it is 40 tokens later."""
    return state(written(in_memory(), 130))


def harm(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    match how:
        case "emptied":
            data.clear()
        case "halved":
            del data[len(data) // 2 :]
        case "short":
            del data[-1:]
        case "long":
            data += b"\x00garbage\n\x00"
        case "removed":
            path.unlink()
            return
        case _:
            bit = random.Random(how + path.name).randrange(8 * len(data))
            data[bit // 8] ^= 1 << bit % 8
    # Versions may be hard links: what is harmed here must not be harmed elsewhere.
    path.unlink()
    path.write_bytes(data)


def files(folder: Path) -> list[str]:
    newest = max(folder.glob("versions/v*"))
    inside = sorted(str(p.relative_to(folder)) for p in newest.iterdir())
    return ["session.json", "journal.jsonl", *inside]


def warnings(events: list[Event]) -> list[str]:
    return [event.code for event in events if isinstance(event, Warned)]


@pytest.mark.parametrize("how", CUTS + FLIPS)
def test_each_file_in_turn(how: str, whole: Path, tmp_path: Path, later: dict[str, Any]) -> None:
    for name in files(whole):
        folder = tmp_path / "s"
        shutil.copytree(whole, folder)
        harm(folder / name, how)
        if (resumed := opened(folder, may_fail=name == "journal.jsonl")) is not None:
            missing = 130 - resumed.store.history.own_in(0, len(resumed.ids))
            events = list(resumed.write(missing))
            assert state(resumed) == later
            # Without its last byte, a line feed, session.json says the same.
            harmless = (name, how) == ("session.json", "short")
            assert warnings(events) in ([[]] if harmless else [["mended"], ["damaged"]]), name
            resumed.close()
        shutil.rmtree(folder)


def opened(folder: Path, *, may_fail: bool) -> DurableSession | None:
    """Only what nothing can replace may be an error; it names the place and a cure."""
    try:
        return templora.resume(folder, base())
    except SessionDamaged as error:
        if may_fail and str(folder) in str(error) and "restore" in str(error):
            return None
        raise


def test_the_last_line_may_be_torn_but_no_version_may_know_of_more(whole: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "s")
    lines = (folder / "journal.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "journal.jsonl").write_bytes(b"".join(lines[: len(lines) // 4]))
    for opens in (lambda: templora.resume(folder, BASE), lambda: templora.shelf.look(folder)):
        with pytest.raises(SessionDamaged, match=r"the end of .* is missing; restore a copy, or keep"):
            opens()
    result = CliRunner().invoke(app, ["sessions", "repair", str(folder)])
    assert result.exit_code == 0
    text = templora.shelf.look(folder)[1].text.getvalue()
    assert f"{len(lines) // 4:,} lines are good" in result.stderr
    resumed = templora.resume(folder, base())
    assert resumed.text == text
    expected = written(in_memory(), resumed.store.history.own_in(0, len(resumed.ids)))
    assert state(written(resumed, 40)) == state(written(expected, 40))


def test_a_line_in_the_middle_is_damaged(whole: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "s")
    path = folder / "journal.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[30] = lines[30].replace(b'"op"', b'"pp"')
    path.write_bytes(b"".join(lines))
    damaged = path.read_bytes()
    with pytest.raises(SessionDamaged, match=r"line 31 of .* is damaged and others follow it; .*repair"):
        templora.resume(folder, BASE)
    assert path.read_bytes() == damaged
    assert CliRunner().invoke(app, ["sessions", "repair", str(folder)]).exit_code == 0
    again = CliRunner().invoke(app, ["sessions", "repair", str(folder)])
    assert "all 30 lines are good" in again.stderr
    assert (folder / "journal.damaged").read_bytes() == damaged, "the only whole copy stays"
    assert len(journal.read(path).lines) == 30
    assert written(in_memory(), 90).text.startswith(templora.resume(folder, base()).text)


def test_a_line_that_was_exchanged_for_another_good_one_is_noticed(whole: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "s")
    path = folder / "journal.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[20], lines[21] = lines[21], lines[20]
    path.write_bytes(b"".join(lines))
    with pytest.raises(SessionDamaged):
        templora.resume(folder, BASE)


def test_a_session_of_a_newer_templora_is_refused(whole: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "s")
    found = header.read(folder)
    header.write(folder, {**found, "format": header.FORMAT + 1})
    with pytest.raises(NotASession, match="install a newer templora"):
        templora.resume(folder, BASE)


@contextmanager
def largest_file(bytes_: int) -> Iterator[None]:
    """The operating system refuses to let any file grow beyond that, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_no_room_for_a_version_is_a_warning_and_the_text_goes_on(tmp_path: Path) -> None:
    made = durable(tmp_path / "s")
    size = (made.dir / "journal.jsonl").stat().st_size
    with largest_file(size + 20_000):
        events = list(made.write(60))
    assert warnings(events) == ["not_saved"]
    assert state(made) == state(written(in_memory(), 60))
    assert not list(made.dir.glob("versions/.partial*"))
    assert state(templora.resume(killed(made), base())) == state(made)


def test_no_room_for_a_token_stops_with_all_that_was_reported(tmp_path: Path) -> None:
    made = durable(tmp_path / "s")
    size = (made.dir / "journal.jsonl").stat().st_size
    reported = made.text
    events: list[Event] = []
    with largest_file(size + 2_000), pytest.raises(OutputError, match="free some space"):
        events.extend(made.write(90))
    reported += "".join(event.text for event in events if isinstance(event, Token))
    with pytest.raises(OutputError, match=r"an earlier write .* failed; close this session and resume it"):
        list(made.write(1))
    made.close()
    resumed = templora.resume(made.dir, base())
    assert resumed.text == reported
    assert resumed.store.warnings[0].startswith("the last line of")
    own = resumed.store.history.own_in(0, len(resumed.ids))
    assert state(written(resumed, 90 - own)) == state(written(in_memory(), 90))


def test_without_room_it_is_not_tried_again_at_each_chunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = durable(tmp_path / "s", save_every=None)
    monkeypatch.setattr(durable_module, "LEAST", 1)
    made._pace._ended -= 1000  # time for a version
    with largest_file((made.dir / "journal.jsonl").stat().st_size + 20_000):
        assert warnings(list(made.write(100))) == ["not_saved"]


def test_no_room_for_a_lock_or_a_copy_is_one_line(whole: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "s")
    with largest_file(0), pytest.raises(OutputError, match=r"cannot write in .*: File too large; free some"):
        Lock(folder / "lock")

    def no_link(*_: Any) -> None:  # as between two disks
        raise OSError(errno.EXDEV, "")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "link", no_link)
        with (
            largest_file(20_000),
            pytest.raises(OutputError, match=r"cannot write .*: File too large; choose"),
        ):
            shelf.copy(folder, tmp_path / "t", header.read(folder))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte, where the machine lets us make one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True)
    if done.returncode:
        pytest.skip("mounting a tmpfs needs rights that we do not have")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.skipif(shutil.which("mount") is None, reason="needs mount")
def test_a_full_disk(small_disk: Path) -> None:
    made = durable(small_disk / "s")
    before = made.text
    (small_disk / "ballast").write_bytes(b"x" * (shutil.disk_usage(small_disk).free - 8192))
    events: list[Event] = []
    with pytest.raises(OutputError, match="No space left on device; free some space"):
        events.extend(made.write(500))
    reported = before + "".join(event.text for event in events if isinstance(event, Token))
    assert "not_saved" in warnings(events)
    made.close()
    (small_disk / "ballast").unlink()
    resumed = templora.resume(made.dir, base())
    assert resumed.text == reported
    own = resumed.store.history.own_in(0, len(resumed.ids))
    assert state(written(resumed, 40)) == state(written(in_memory(), own + 40))
    resumed.close()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_version_that_could_not_be_written_does_not_exist(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = written(durable(tmp_path / "s"), 60)
    before = [version.name for version in made.versions]

    def full(path: Path) -> str:
        raise OSError(code, os.strerror(code), str(path))

    with monkeypatch.context() as patched:
        patched.setattr(versions, "checksum", full)
        with pytest.raises(OutputError, match=f"cannot save a version in .*: {os.strerror(code)}"):
            made.note("now")
    assert [version.name for version in made.versions] == before
    assert not made.store.notes


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """A folder nobody may write to; as root one may write anywhere, so the file system must refuse."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        yield
    finally:
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(whole: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "s")
    with read_only(folder), pytest.raises(OutputError, match="make it writable, or copy"):
        templora.resume(folder, BASE)


def test_a_folder_that_refuses_to_be_written(whole: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "s")
    (folder / "lock").unlink()
    (folder / "lock").mkdir()  # what is opened for writing cannot be: true for root as well
    with pytest.raises(OutputError, match=r"cannot write in .*; free some space or make it writable"):
        templora.resume(folder, BASE)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="choose another folder"):
        durable(tmp_path / "file" / "s")


def test_a_lock_left_by_a_dead_process_is_stale_and_one_of_another_machine_is_not(
    whole: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(whole, tmp_path / "s")
    (folder / "lock").write_text(json.dumps({"pid": 2**22 + 1, "host": os.uname().nodename}))
    templora.resume(folder, base()).close()
    (folder / "lock").write_text(json.dumps({"pid": 1, "host": "elsewhere"}))
    with pytest.raises(SessionLocked, match=r"opened by process 1 on elsewhere .*remove"):
        templora.resume(folder, BASE)
    (folder / "lock").write_bytes(b"\xff not json")
    templora.resume(folder, base()).close()


def test_a_text_that_is_not_whole_is_never_exported_as_if_it_were(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "s"
    shutil.copytree(whole, folder)
    lines = (folder / "journal.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "journal.jsonl").write_bytes(b"".join([*lines[:9], b"x" + lines[9][1:], *lines[10:]]))
    done = CliRunner().invoke(app, ["sessions", "export", str(folder)])
    assert (done.exit_code, done.stdout) == (2, "")
    assert "templora sessions repair" in done.stderr
    (folder / "journal.jsonl").write_bytes(b"")
    for version in (folder / "versions").iterdir():
        shutil.rmtree(version)
    done = CliRunner().invoke(app, ["sessions", "undo", str(folder)])
    assert done.exit_code == 2 and "is empty; restore it from a copy" in done.stderr
