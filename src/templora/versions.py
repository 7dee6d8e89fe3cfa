"""Saved states of a session: one folder each, complete or not there at all.

A version is written beside the others under a name that nobody reads, then renamed. Its manifest holds the
checksum of each file: one that a power failure kept from the disk is recognised, and computed again from the
journal, so nobody waits for the disk here. What the files mean is not known.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter

MANIFEST, ABOUT = "manifest.json", "version.json"
PARTIAL = ".partial"
LAST = 8  # versions that are all kept
SHARE = 0.005  # of the time may go into saving
FIRST = 0.05  # seconds that the first save is taken to cost: a text of a few seconds needs none but its last


@dataclass(frozen=True, slots=True)
class Version:
    """A saved state. ancestors: the versions before it on its path that were there when it was made.

    line: lines in the journal when it was made. chunk: chunks learned; tokens: of the text, of which all
    beyond those chunks wait to be learned. digest: of the history that leads to it, in hexadecimal.
    adapter: the adapter's own version. scored: tokens of which the NLLs are the sums, in nats; the base's
    are over base_scored tokens.
    """

    number: int
    ancestors: list[int]
    line: int
    chunk: int
    tokens: int
    digest: str
    adapter: int
    scored: int
    adapted_nll: float
    base_scored: int
    base_nll: float

    @property
    def name(self) -> str:
        """As a person calls it."""
        return f"v{self.number}"


class Versions:
    """All versions in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, number: int) -> Path:
        """Where that version lies; PEFT loads an adapter from there."""
        return self.folder / f"v{number:06d}"

    def all(self) -> list[Version]:
        """Every version whose description is whole, oldest first."""
        found = [self._read(path) for path in sorted(self.folder.glob("v*"))]
        return [version for version in found if version is not None]

    def unreadable(self) -> list[Path]:
        """Folders of versions whose description is damaged."""
        return [path for path in sorted(self.folder.glob("v*")) if self._read(path) is None]

    def next_number(self) -> int:
        """One more than any that is there, damaged or not."""
        return max((int(p.name[1:]) for p in self.folder.glob("v*") if p.name[1:].isdigit()), default=0) + 1

    def clean(self) -> None:
        """Remove what a process that died in the middle of saving left behind."""
        for path in self.folder.glob(f"{PARTIAL}*"):
            shutil.rmtree(path, ignore_errors=True)

    def save(self, version: Version, fill: Callable[[Path], None]) -> None:
        """Make a version whose files `fill` writes into the folder that it is given.

        Raises:
            OSError: it could not be written; nothing is left of it.
        """
        partial = self.folder / f"{PARTIAL}-{version.number}"
        try:
            partial.mkdir(parents=True)
            fill(partial)
            (partial / ABOUT).write_text(json.dumps(asdict(version)), "utf-8")
            files = sorted(path for path in partial.iterdir() if path.is_file())
            (partial / MANIFEST).write_text(json.dumps({p.name: checksum(p) for p in files}), "utf-8")
            partial.rename(self.path(version.number))
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise

    def is_whole(self, version: Version) -> bool:
        """Whether every file is what was written."""
        folder = self.path(version.number)
        try:
            return all(checksum(folder / name) == wanted for name, wanted in _manifest(folder).items())
        except (OSError, ValueError, AttributeError):
            return False

    def remove(self, number: int) -> None:
        """Delete a version. Its name goes first, so that no half of it is ever taken for a whole."""
        going = self.folder / f"{PARTIAL}-gone-{number}"
        self.path(number).rename(going)
        shutil.rmtree(going, ignore_errors=True)

    def bytes(self, number: int) -> int:
        """Size on disk."""
        return sum(path.stat().st_size for path in self.path(number).iterdir())

    def thin(self, pinned: Iterable[int], budget: int) -> None:
        """Remove versions that `kept` does not keep, then the oldest until they fit.

        pinned: never removed. budget: bytes that all versions together may take; the newest stays anyhow.
        """
        pinned = set(pinned)
        numbers = [version.number for version in self.all()]
        keep = kept(numbers, pinned)
        sizes = {number: self.bytes(number) for number in keep}
        for number in keep[:-1]:
            if sum(sizes.values()) > budget and number not in pinned:
                del sizes[number]
        for number in numbers:
            if number not in sizes:
                self.remove(number)

    def _read(self, path: Path) -> Version | None:
        try:
            if checksum(path / ABOUT) != _manifest(path)[ABOUT]:
                return None
            return Version(**json.loads((path / ABOUT).read_text("utf-8")))
        except (OSError, ValueError, TypeError, KeyError):
            return None


def _manifest(folder: Path) -> dict[str, str]:
    return json.loads((folder / MANIFEST).read_text("utf-8"))


class Pace:
    """When to make the next version: so rarely that saving takes at most SHARE of the time.

    So going back takes at most 1 / SHARE times as long as a save.
    """

    def __init__(self) -> None:
        self._ended, self._took = perf_counter(), FIRST

    @property
    def due(self) -> bool:
        """Whether enough time has passed since the last one."""
        return perf_counter() - self._ended >= self._took / SHARE

    @contextmanager
    def saving(self) -> Generator[None]:
        """What runs inside is a save."""
        started = perf_counter()
        try:
            yield
            self._took = perf_counter() - started
        finally:  # one that failed is not tried again at once
            self._ended = perf_counter()


def kept(numbers: list[int], pinned: set[int]) -> list[int]:
    """Which versions stay: the last 8, then ever fewer (multiples of 2, 4, 8, …), and the pinned ones.

    Of ages 8 to 15 every second stays, of 16 to 31 every fourth, and so on; what stays later stayed before.
    """
    newest = max(numbers, default=0)
    keep: list[int] = []
    for number in numbers:
        age = newest - number
        if age < LAST or number in pinned or number % (1 << (age // LAST).bit_length()) == 0:
            keep.append(number)
    return keep


def checksum(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Bring a file, or a folder's list of files, to the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open folders and needs no such call
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
