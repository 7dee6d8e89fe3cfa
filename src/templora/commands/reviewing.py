"""Where a person comes in while a book is translated: asked about a passage, or editing files beside it."""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
import typer

from templora.commands.running import make_folder, say
from templora.errors import InvalidText, OutputError

if TYPE_CHECKING:
    from templora.tasks.translate import Translated


def ask(source: str, draft: str) -> str:
    """The draft as a person accepted or edited it, in $EDITOR."""
    say(f"\n{source}\n")
    say(draft)
    while True:
        answer = typer.prompt("[a]ccept, [e]dit", default="a", err=True).strip().lower()
        if answer in ("a", "accept"):
            return draft
        if answer in ("e", "edit"):
            edited = click.edit(f"{draft}\n")
            return draft if edited is None else edited.strip()


class Folder:
    """A folder of translations, a file a passage, that a person may edit at any time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        make_folder(path, "--corrections")

    def changed(self, records: "Sequence[Translated]") -> Iterator[tuple[int, str]]:
        """Passages whose file says something else than what was learned."""
        for number, record in enumerate(records):
            path = self._target(number)
            if path.exists():
                target = _read(path).strip()
                if target and target != record.target.strip():
                    yield number, target

    def complete(self, records: "Sequence[Translated]") -> None:
        """Files for passages that have none: from runs without this folder, or that were killed."""
        for number, record in enumerate(records):
            if not self._target(number).exists():
                self.store(number, record)

    def store(self, number: int, record: "Translated") -> None:
        """The translation to edit, and its source to look at."""
        try:
            # The source first: where the translation is there, both are.
            (self.path / f"{number:05}.source.txt").write_text(record.source + "\n", "utf-8")
            self._target(number).write_text(record.target + "\n", "utf-8")
        except OSError as error:
            raise OutputError(f"cannot write in {self.path}: {error.strerror}; free some space") from error

    def _target(self, number: int) -> Path:
        return self.path / f"{number:05}.txt"


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")  # Windows' editors put a mark before it
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
