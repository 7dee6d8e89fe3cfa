"""Results on disk, which a run that was stopped goes on with."""

import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from templora.errors import OutputError


class Results:
    """Results on disk, one JSON list, written anew after each document so that a stop loses none.

    order: of the documents whose results are to come, in which they stand whatever comes first.
    """

    def __init__(self, path: Path | None, *, resume: bool, order: Sequence[str] = ()) -> None:
        self.path, self.resume, self.done = path, resume, list[dict[str, Any]]()
        self._places = {document: place for place, document in enumerate(order)}
        if path is None:
            return
        if not path.parent.is_dir():
            raise OutputError(f"no folder {path.parent}; make it, or choose another --json")
        _part(path, "").unlink()  # it can be written
        if path.exists():
            if not resume:
                raise OutputError(f"{path} exists; add --resume to continue it, or choose another --json")
            self.done = _entries(path)

    def has(self, document: str, check: Callable[[dict[str, Any]], None]) -> bool:
        """Whether that document is done. check: raises where its result may not stand beside new ones."""
        for entry in self.done:
            if entry["document"] == document:
                check(entry)
                return True
        return False

    def add(self, entry: dict[str, Any]) -> None:
        """Take in one more result and store them all, with those that another run has added."""
        known = {entry["document"], *(own["document"] for own in self.done)}
        theirs = _entries(self.path) if self.path is not None and self.path.exists() else []
        self.done += [*(other for other in theirs if other["document"] not in known), entry]
        self.done.sort(key=lambda own: self._places.get(own["document"], -1))
        if self.path is not None:
            put(self.path, json.dumps(self.done, indent=1))


def _entries(path: Path) -> list[dict[str, Any]]:
    try:
        entries = json.loads(path.read_text("utf-8"))
        if isinstance(entries, list) and all(_is_result(entry) for entry in cast(list[Any], entries)):
            return entries
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        pass
    raise OutputError(f"{path} does not hold results of scoring; choose another file for them")


def _is_result(entry: Any) -> bool:
    """Whether it has what is looked at when scoring goes on, and in tables and pictures."""
    kinds = {
        "document": str,
        "tokens": int,
        "chunks": list,
        "learn_seconds": (int, float),
        "config": dict,
        "seed": int,
    }
    whole = all(isinstance(entry.get(name), kind) for name, kind in kinds.items())
    return whole and "model" in entry["config"] and isinstance(entry["config"].get("recipe"), dict)


def put(path: Path, text: str) -> None:
    """Write a file of results in place of the one before: all of it, or nothing.

    Raises:
        OutputError: it cannot be written.
    """
    temporary = _part(path, text)
    try:
        temporary.replace(path.resolve())
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise _cannot_write(path, error) from error


def _part(path: Path, text: str) -> Path:
    """That text in a file of this process's own, which is to take that name."""
    place = path.resolve()  # a link stays one
    temporary = place.with_name(f".{place.name}.{os.getpid()}.part")
    try:
        temporary.write_text(text, "utf-8")
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise _cannot_write(path, error) from error
    return temporary


def _cannot_write(path: Path, error: OSError) -> OutputError:
    return OutputError(f"cannot write {path}: {error.strerror}; choose another place for it")
