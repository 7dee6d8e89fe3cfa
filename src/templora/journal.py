"""An append-only file of JSON lines, each sealed with a checksum over itself and all before it.

A line that was cut short, changed, removed or moved is recognised. It knows nothing of what lines mean.
"""

import json
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from templora.errors import OutputError, SessionDamaged

SEAL = len(b',"crc":"01234567"}')


@dataclass(frozen=True, slots=True)
class Contents:
    """What a journal holds: its good lines, seals included. size: their bytes. crc: of the last of them.

    torn: bytes after them that are not a good line; 0 in a whole journal.
    """

    lines: list[dict[str, Any]]
    size: int
    crc: int
    torn: int


class Journal:
    """The end of a journal, to append to. Opening it cuts off a torn last line."""

    def __init__(self, path: Path, contents: Contents) -> None:
        self.path, self.lines = path, len(contents.lines)
        self._crc = contents.crc
        self._broken = False
        self._process = os.getpid()
        self._file = -1
        try:
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
            if contents.torn:
                os.ftruncate(self._file, contents.size)
            os.lseek(self._file, contents.size, os.SEEK_SET)
        except OSError as error:
            raise _cannot_write(path, error) from error

    def append(
        self, line: dict[str, Any], then: Callable[[dict[str, Any]], None], *, sync: bool = True
    ) -> None:
        """Hand a line to the operating system, so that it outlives this process.

        Args:
            then: makes it true here as well. sync: to the disk, too, so that it outlives a power failure.

        Raises:
            OutputError: the disk is full or gone. From then on nothing more is taken, as after an interrupt
                half-way, when nobody knows how much of the line is there.
        """
        if self._broken:
            raise OutputError(f"an earlier write to {self.path} failed; close this session and resume it")
        if self._process != os.getpid():
            # Both would write to one place, each with a checksum of its own.
            raise OutputError(
                f"{self.path} is open in the process that this one was forked from; open another"
            )
        data, crc = sealed(line, self._crc)
        self._broken = True
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(self._file, view) :]
            if sync:
                os.fsync(self._file)
        except OSError as error:
            raise _cannot_write(self.path, error) from error
        self._crc, self.lines = crc, self.lines + 1
        then(line)
        self._broken = False

    def sync(self) -> None:
        """Bring to the disk what only outlives this process so far."""
        try:
            os.fsync(self._file)
        except OSError as error:
            raise _cannot_write(self.path, error) from error

    def close(self) -> None:
        """Let go of the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __del__(self) -> None:
        if getattr(self, "_file", -1) >= 0:
            os.close(self._file)


def sealed(line: dict[str, Any], crc: int) -> tuple[bytes, int]:
    """A line as bytes, and its checksum. crc: of the line before it, 0 for the first."""
    body = json.dumps(line, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")
    crc = zlib.crc32(body, crc)
    return body[:-1] + b',"crc":"%08x"}\n' % crc, crc


def read(path: Path) -> Contents:
    """All good lines.

    Raises:
        SessionDamaged: a line before the last one is damaged, so that what follows cannot be trusted.
    """
    contents = good(path)
    with _readable(path) as file:
        file.seek(contents.size)
        rest = file.read(contents.torn)
    # A write that was cut short leaves one line without an end; anything else is damage.
    if b"\n" in rest[:-1]:
        raise SessionDamaged(
            f"line {len(contents.lines) + 1} of {path} is damaged and others follow it; restore a copy, or "
            f"keep what comes before it with: templora sessions repair {path.parent}"
        )
    return contents


def good(path: Path) -> Contents:
    """The lines before the first that is damaged."""
    with _readable(path) as file:
        data = file.read()
    size = crc = 0
    for raw in data.split(b"\n"):
        found = zlib.crc32(b"}", zlib.crc32(raw[:-SEAL], crc))
        if size + len(raw) == len(data) or raw[-SEAL:] != b',"crc":"%08x"}' % found:
            break
        size, crc = size + len(raw) + 1, found
    # All at once: a novel has a hundred thousand lines.
    whole = data[:size].decode("utf-8", "surrogatepass").removesuffix("\n").replace("\n", ",")
    return Contents(json.loads(f"[{whole}]"), size, crc, len(data) - size)


def _readable(path: Path) -> Any:
    try:
        return path.open("rb")
    except OSError as error:
        raise SessionDamaged(f"cannot read {path}: {error.strerror}; restore it from a copy") from error


def _cannot_write(path: Path, error: OSError) -> OutputError:
    return OutputError(
        f"cannot write to {path}: {error.strerror}; free some space or make it writable, then go on: all "
        "that was written before is safe"
    )
