"""Where a person comes in while a book is translated: asked about a passage, or editing files beside it."""

import csv
import signal
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click
import typer

from templora.commands.running import make_folder, say
from templora.errors import InvalidText, OutputError

if TYPE_CHECKING:
    from templora.tasks.passages import Block
    from templora.tasks.translate import Translated


def ask(source: str, draft: str) -> str:
    """The draft as a person accepted or edited it, in $EDITOR.

    Raises:
        typer.Abort: the person has had enough.
    """
    say(f"\n{source}\n")
    say(draft)
    while True:
        with _stopping():
            answer = typer.prompt("[a]ccept, [e]dit", default="a", err=True).strip().lower()
        if answer in ("a", "accept"):
            return draft
        if answer in ("e", "edit"):
            try:
                edited = click.edit(f"{draft}\n")
            except (click.ClickException, UnicodeDecodeError) as error:
                say(f"{error}; edit it again, accept the draft, or stop and set EDITOR to another editor")
                continue
            if edited is not None:  # nothing saved, or an editor that does not wait: that accepts nothing
                return edited.strip()


@contextmanager
def _stopping() -> Generator[None]:
    """A signal ends a prompt: to note it for later, as elsewhere, would leave the person waiting."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, signal.default_int_handler) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


class Folder:
    """A folder of translations, a file a passage, that a person may edit at any time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        make_folder(path, "--corrections")

    def changed(self, records: "Sequence[Translated]") -> Iterator[tuple[int, str]]:
        """Passages whose file says something else than what was learned."""
        for number, record in enumerate(records):
            target = _read(self._target(number)).strip()
            if target and target != record.target.strip():
                yield number, target

    def check(self, parts: "Sequence[Block]", *, begun: bool) -> None:
        """See that what is there belongs to these passages, before any is translated.

        begun: some of them are. Of those, a person may have thrown away the sources.

        Raises:
            OutputError: it is another translation's.
        """
        for number, part in enumerate(parts):
            there = _read(self._target(number)).strip() and (not begun or self._source(number).exists())
            if there and not self._is_of(number, part):
                raise OutputError(
                    f"{self._target(number)} is no passage of this translation; choose another --corrections"
                )

    def given(self, number: int, part: "Block") -> str | None:
        """What is there for a passage before it is translated: from a session that is gone, say."""
        return (_read(self._target(number)).strip() or None) if self._is_of(number, part) else None

    def complete(self, records: "Sequence[Translated]") -> None:
        """Files for passages that have none: from runs without this folder, or that were killed."""
        for number, record in enumerate(records):
            self.store(number, record)

    def store(self, number: int, record: "Translated") -> None:
        """The translation to edit, and its source to look at. What a person may have written stays."""
        if _read(self._target(number)).strip():
            return
        try:
            # The source first: where the translation is there, both are.
            self._source(number).write_text(record.source + "\n", "utf-8")
            self._target(number).write_text(record.target + "\n", "utf-8")
        except OSError as error:
            raise OutputError(f"cannot write in {self.path}: {error.strerror}; free some space") from error

    def _is_of(self, number: int, part: "Block") -> bool:
        return _read(self._source(number)).strip() == part.source.strip()

    def _source(self, number: int) -> Path:
        return self.path / f"{number:05}.source.txt"

    def _target(self, number: int) -> Path:
        return self.path / f"{number:05}.txt"


def _read(path: Path) -> str:
    """A file's text, "" where there is no file."""
    try:
        return path.read_text("utf-8-sig")  # Windows' editors put a mark before it
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidText(f"cannot read {path}: {error}; save it in UTF-8") from error


def terms_of(path: Path) -> dict[str, str]:
    """A glossary: two columns, source term and target term."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = [row for row in csv.reader(file) if any(cell.strip() for cell in row)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InvalidText(f"cannot read {path}: {error}; give a CSV file in UTF-8") from error
    if any(len(row) < 2 for row in rows):
        raise InvalidText(f"{path} is no glossary; each line needs two columns: source term, target term")
    return {row[0].strip(): row[1].strip() for row in rows}
