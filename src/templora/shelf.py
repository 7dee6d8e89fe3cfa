"""Sessions as folders, closed: begin one, find them, look into one, copy one, mend one."""

import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from templora import header, journal
from templora.errors import NotASession, OutputError, SessionDamaged
from templora.history import History, replayed
from templora.lock import Lock
from templora.metrics import Tally
from templora.versions import Version, Versions, sync

JOURNAL, VERSIONS, LOCK = "journal.jsonl", "versions", "lock"


def exists(folder: Path) -> bool:
    """Whether there is a session or translation, in whatever state."""
    return (folder / header.NAME).exists() or (folder / JOURNAL).exists()


def begin(folder: Path, head: header.Header) -> None:
    """Make the folder of a new session or translation.

    Raises:
        NotASession: there is something in it. OutputError: it cannot be written.
    """
    line, _ = journal.sealed({"op": "begin", "header": head}, 0)
    with appearing(folder) as part:
        (part / JOURNAL).write_bytes(line)
        sync(part / JOURNAL)
        (part / VERSIONS).mkdir()
        header.write(part, head)


def find(folder: Path) -> list[Path]:
    """Sessions in a folder, and the folder itself if it is one; not deeper."""
    candidates = [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]
    return [path for path in candidates if os.access(path, os.X_OK) and exists(path)]


def header_of(folder: Path) -> tuple[header.Header, str]:
    """A session's header, from the journal where its own file is damaged, and then what is wrong with that.

    Raises:
        NotASession: there is none, or one of a newer templora. SessionDamaged: both are damaged.
    """
    problem = ""
    try:
        found = header.read(folder)
    except (SessionDamaged, NotASession):
        if not (folder / JOURNAL).exists():
            raise
        lines = journal.good(folder / JOURNAL).lines
        if not lines or lines[0]["op"] != "begin":
            raise
        found, problem = lines[0]["header"], f"{folder / header.NAME} is damaged or missing"
    header.check_format(found, folder)
    return found, problem


def look(folder: Path) -> tuple[header.Header, History]:
    """A session's header and history, without opening it: nothing is locked, mended or written."""
    found, _ = header_of(folder)
    if found["format"] != header.FORMAT:
        raise NotASession(
            f"{folder} is of an older format; open it once with: templora write --session {folder}"
        )
    if "translation" in found:
        raise NotASession(f"{folder} holds a translation; go on with templora translate")
    return found, replayed(contents(folder).lines, header.plan_of(found), found["seed"])[0]


def contents(folder: Path) -> journal.Contents:
    """A session's journal.

    Raises:
        SessionDamaged: it is not whole, nothing is left of it, or its end is missing.
    """
    path, versions = folder / JOURNAL, Versions(folder / VERSIONS).all()  # before it: both may be growing
    found = journal.read(path)
    if not found.lines:
        raise SessionDamaged(f"{path} is empty; restore it from a copy")
    if any(version.line > len(found.lines) for version in versions):
        raise SessionDamaged(
            f"the end of {path} is missing; restore a copy, or keep what is there with: templora "
            f"sessions repair {folder}"
        )
    return found


def summary(folder: Path) -> tuple[header.Header, int, int, Tally]:
    """Of a session or translation: its header, tokens, chunks or passages, and what the adapter scored."""
    (head, _), adapted = header_of(folder), Tally()
    if "translation" not in head:
        head, history = look(folder)
        return head, len(history.ids), len(history.learned), scores(history)[1]
    lines = journal.good(folder / JOURNAL).lines
    passages = [line for line in lines if line["op"] == "passage"]
    for line in passages:
        adapted.add(line["adapted_nll"], line["tokens"])
    return head, adapted.tokens, len(passages), adapted


def scores(history: History) -> tuple[Tally, Tally]:
    """Base and adapted NLL of all learned chunks."""
    base, adapted = Tally(), Tally()
    for chunk in history.learned:
        adapted.add(chunk.adapted_nll, chunk.tokens)
        base.add(chunk.base_nll, chunk.tokens)
    return base, adapted


def names(folder: Path) -> dict[int, list[str]]:
    """The notes of each version, by its number."""
    found: dict[int, list[str]] = {}
    for line in journal.good(folder / JOURNAL).lines:
        if line["op"] == "note":
            found.setdefault(line["version"], []).append(line["name"])
    return found


def leads_to(version: Version, history: History) -> bool:
    """Whether a version lies on the way to the end of a history."""
    within = version.chunk <= len(history.learned) and version.tokens <= len(history.ids)
    return within and history.digest(version.chunk, version.tokens).hex() == version.digest


def copy(source: Path, target: Path, head: header.Header) -> None:
    """A copy of a session that shares the files of its versions; it appears whole or not at all.

    Raises:
        NotASession: there is something at `target`. OutputError: it cannot be written.
    """
    with appearing(target) as part:
        # The journal grows, so it must be a file of its own; versions never change.
        shutil.copyfile(source / JOURNAL, part / JOURNAL)
        if (source / VERSIONS).exists():  # they only spare time
            shutil.copytree(source / VERSIONS, part / VERSIONS, copy_function=_link, ignore=_partial)
        header.write(part, {**head, "forked_from": str(source)})


@contextmanager
def appearing(folder: Path) -> Generator[Path]:
    """A folder to fill that takes its name when it is full, and is gone if that fails.

    Raises:
        NotASession: there is something at `folder`. OutputError: it cannot be written.
    """
    # Of this process: two that begin one session at once must not clear away each other's.
    part = folder.absolute().parent / f".{folder.absolute().name}.{os.getpid()}.part"  # "/" has no name
    try:
        if folder.exists() and (any(folder.iterdir()) or folder.samefile(Path.cwd())):
            raise NotASession(occupied(folder))
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        yield part
        if folder.exists():
            folder.rmdir()
        os.replace(part, folder)
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        if isinstance(error, OSError):
            raise OutputError(f"cannot write {folder}: {error.strerror}; choose another folder") from error
        raise


def repair(folder: Path) -> tuple[int, Path | None]:
    """Keep the good beginning of a damaged journal; the whole of it stays beside it.

    Returns:
        How many lines are left, and where the damaged file is; None where nothing is damaged.
    """
    path = folder / JOURNAL
    if not path.exists():
        raise NotASession(f"{folder} holds no session; there is nothing to repair")
    lock = Lock(folder / LOCK)
    try:
        contents = journal.good(path)
        if not contents.lines:
            raise SessionDamaged(f"not one line of {path} is good; restore a copy")
        whole = None
        if contents.torn:
            # Never over an earlier one: what that holds may be all that there is of a text.
            places = (folder / f"journal.damaged{end}" for end in ("", *(f".{n}" for n in range(2, 1000))))
            whole = next(place for place in places if not place.exists())
            shutil.copyfile(path, whole)
            os.truncate(path, contents.size)
        versions = Versions(folder / VERSIONS)
        for version in versions.all():
            if version.line > len(contents.lines):
                versions.remove(version.number)
        return len(contents.lines), whole
    except OSError as error:
        raise OutputError(f"cannot repair {folder}: {error.strerror}; make it writable") from error
    finally:
        lock.release()


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one that cannot
        try:
            shutil.copyfile(source, target)
        except OSError as error:  # copytree would gather these, and forget why
            raise OutputError(f"cannot write {target}: {error.strerror}; choose another folder") from error


def _partial(_: str, names: list[str]) -> list[str]:
    return [name for name in names if name.startswith(".")]


def occupied(folder: Path) -> str:
    """Why no session can begin there."""
    if (folder / header.NAME).exists():
        return f"{folder} holds a session already; resume it with templora.resume({str(folder)!r})"
    what = "is where you are" if folder.samefile(Path.cwd()) else "is not empty"
    return f"{folder} {what}; choose a folder that does not exist yet"
