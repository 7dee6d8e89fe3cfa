"""The folder of one session: header, journal, versions, lock. Everything but the computing.

Undoing, rewinding and forking only move the text back and forth in its history; whoever opens the session
next computes the adapter that belongs there. So all of it works without a base, at once.
"""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from templora import header, journal, migrations, shelf
from templora.errors import NoSuchMoment, NotASession, SessionClosed
from templora.events import ChunkScored
from templora.history import GIVEN, History, replayed
from templora.journal import Journal
from templora.lock import Lock
from templora.shelf import JOURNAL, LOCK, VERSIONS
from templora.versions import Version, Versions
from templora.window import Span

BUDGET = 1 << 30  # bytes that the versions of a session may take
Encoder = Callable[[str, int, int], tuple[list[int], list[int]]]


class Store:
    """A session's folder, open for writing. history: what the journal adds up to.

    warnings: what was found and mended when it was opened, one line each.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()  # the program may go to another directory
        if not shelf.exists(folder):
            free = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
            cure = f"begin one with: templora write --session {folder}"
            raise NotASession(f"{folder} holds no session; {cure if free else 'check the name'}")
        self.lock = Lock(folder / LOCK)
        try:
            self._open()
        except BaseException:
            self.lock.release()
            raise

    @classmethod
    def create(cls, folder: Path, head: header.Header) -> "Store":
        """Begin a session in a folder that does not exist or is empty.

        Raises:
            NotASession: there is something in it. OutputError: it cannot be written.
        """
        shelf.begin(folder, head)
        return cls(folder)

    def _open(self) -> None:
        self.warnings: list[str] = []
        self.header = self._read_header()
        self.path = self.folder / JOURNAL
        contents = shelf.contents(self.folder)
        self.versions = Versions(self.folder / VERSIONS)
        if contents.torn:
            self.warnings.append(
                f"the last line of {self.path} was cut short or damaged; {contents.torn} bytes were dropped"
            )
        self.history, self.redoable = self._replayed(contents.lines)
        self.notes = {line["name"]: n for n, line in enumerate(contents.lines, 1) if line["op"] == "note"}
        self.named = {line["version"] for line in contents.lines if line["op"] == "note"}
        if contents.lines[-1]["op"] == "discard":
            raise SessionClosed(
                f"{self.folder} was discarded; its text is there: templora sessions export {self.folder}"
            )
        self.warnings += [f"{path} is damaged and left aside" for path in self.versions.unreadable()]
        self.journal = Journal(self.path, contents)
        self.versions.clean()

    def _read_header(self) -> header.Header:
        found, problem = shelf.header_of(self.folder)
        if problem:
            header.write(self.folder, found)
            self.warnings.append(f"{problem}; it was restored from the journal")
        if "translation" in found:
            raise NotASession(f"{self.folder} holds a translation; go on with templora translate")
        return migrations.upgrade(self.folder, found)

    def close(self) -> None:
        """Let other processes in."""
        self.journal.close()
        self.lock.release()

    def reread(self) -> None:
        """Let the history be what the journal says, where an interrupt may have come between the two."""
        self.history, self.redoable = self._replayed(journal.good(self.path).lines)

    # What happens to the text. Each is on disk before it is true.

    def give(self, ids: Sequence[int], text: str, sizes: Sequence[int]) -> None:
        """Append given tokens; sizes: characters that each completes."""
        self._note({"op": "given", "ids": list(ids), "text": text, "sizes": list(sizes)})

    def own(self, token: int, piece: str, draws: int) -> None:
        """Append a token that the model wrote. It outlives this process, and a power failure from the next
        chunk on."""
        self._note({"op": "own", "id": token, "text": piece, "draws": draws}, sync=False)

    def look(self, draws: int) -> None:
        """A token was drawn and not kept."""
        self._note({"op": "look", "draws": draws})

    def mark(self, kind: str, value: int = 0) -> None:
        """Note one of `history.Mark`'s kinds at this moment."""
        self._note({"op": "mark", "kind": kind, "value": value})

    def learn(self, span: Span, base: bool, scored: ChunkScored, events: list[dict[str, Any]]) -> None:
        """A chunk was scored and learned; all of it reaches the disk."""
        sums = {"tokens": span.tokens, "adapted_nll": scored.adapted_nll, "base_nll": scored.base_nll}
        self._note({"op": "chunk", "chunk": span.chunk, "base": base, **sums, "events": events})

    def edit(self, start: int, end: int, text: str, *, encoded: Encoder, least: int) -> None:
        """Replace the characters [start, end) by `text`; tokens after them stay as they are.

        Args:
            encoded: makes ids and sizes of a text that takes the place of the tokens from one number up to
                another. least: tokens at the beginning that never change.

        Raises:
            NoSuchMoment: the text has no such characters.
        """
        history = self.history
        length = history.end(len(history.ids))
        if not 0 <= start <= end <= length:
            raise NoSuchMoment(
                f"characters {start} to {end} cannot be edited: the text has {length} characters"
            )
        keep = history.before(start, least)
        rest, whole = history.after(end, keep), history.text.getvalue()
        new = whole[history.end(keep) : start] + text + whole[end : history.end(rest)]
        runs = history.runs(rest)
        if new:
            ids, sizes = encoded(new, keep, rest)
            runs.insert(0, (GIVEN, ids, new, sizes))
        self._note({"op": "edit", "tokens": keep, "runs": runs})

    # Moving in history.

    def undo(self, chunks: int = 1) -> None:
        """Take the last chunks away, an unfinished one counting as one.

        Raises:
            NoSuchMoment: there are not so many.
        """
        pieces = self.history.pieces
        if not 1 <= chunks <= pieces:
            raise NoSuchMoment(f"cannot undo {chunks} chunks of {self.folder}: it has {pieces}")
        target = self.history.plan.span(pieces - chunks).start
        before = self.journal.lines
        self._note({"op": "cut", "tokens": target, "undo": True}, keep_redo=True)
        self.redoable.append(before)

    def redo(self) -> None:
        """Undo the last undo.

        Raises:
            NoSuchMoment: nothing was undone, or something was written since.
        """
        if not self.redoable:
            raise NoSuchMoment(f"there is nothing to redo in {self.folder}")
        self._go_to(self.redoable[-1], redo=True)
        self.redoable.pop()

    def rewind(self, to: int | str) -> None:
        """Go to a number of tokens of this text, or to a version ("v12") or note of any branch.

        Raises:
            NoSuchMoment: there is none.
        """
        if isinstance(to, int):
            if not 0 <= to <= len(self.history.ids):
                raise NoSuchMoment(
                    f"{self.folder} has {len(self.history.ids)} tokens; rewind to 0 up to that"
                )
            self._note({"op": "cut", "tokens": to})
        elif to in self.notes:
            self._go_to(self.notes[to])
        else:
            version = next((v for v in self.versions.all() if v.name == to), None)
            if version is None:
                known = ", ".join([*self.notes, *(v.name for v in self.versions.all())]) or "none"
                raise NoSuchMoment(f"{self.folder} has no version or note {to!r}; there are: {known}")
            self._go_to(version.line)
            if len(self.history.ids) > version.tokens:
                self._note({"op": "cut", "tokens": version.tokens})

    def note(self, name: str, version: int | None) -> None:
        """Give this moment a name; its version is never thinned."""
        self._note({"op": "note", "name": name, "version": version}, keep_redo=True)
        self.notes[name] = self.journal.lines
        if version is not None:
            self.named.add(version)

    def fork(self, folder: Path) -> None:
        """Copy the session; versions share their files with this one where the file system can.

        Raises:
            NotASession: there is something at `folder`. OutputError: it cannot be written.
        """
        shelf.copy(self.folder, folder, self.header)

    def discard(self, *, keep_text: bool) -> None:
        """Delete all versions, or the whole folder."""
        if keep_text:
            self._note({"op": "discard"})
            shutil.rmtree(self.versions.folder, ignore_errors=True)
            self.close()
        else:
            self.close()
            shutil.rmtree(self.folder)

    # Versions.

    def usable(self) -> list[Version]:
        """Versions that lie on the way to this moment, oldest first."""
        found = [version for version in self.versions.all() if shelf.leads_to(version, self.history)]
        return sorted(found, key=lambda v: (v.tokens, v.chunk, v.number))

    def save(self, chunk: int, tokens: int, adapter: int, fill: Callable[[Path], None]) -> Version:
        """Make a version of the state after those chunks and tokens; thin the others.

        Raises:
            OSError: it could not be written.
        """
        base, adapted = shelf.scores(self.history)
        version = Version(
            number=self.versions.next_number(),
            ancestors=[v.number for v in self.usable()],
            line=self.journal.lines,
            chunk=chunk,
            tokens=tokens,
            digest=self.history.digest(chunk, tokens).hex(),
            adapter=adapter,
            scored=adapted.tokens,
            adapted_nll=adapted.nll,
            base_scored=base.tokens,
            base_nll=base.nll,
        )
        self.journal.sync()  # a version must not know more than the journal after a power failure
        self.versions.save(version, fill)
        self.versions.thin(self.named, self.header["budget"])
        return version

    def _go_to(self, line: int, *, redo: bool = False) -> None:
        moved = {"op": "at", "line": line, "redo": redo}
        # First what it comes to: an interrupt must not leave journal and text at different moments.
        history, _ = self._replayed([*journal.good(self.path).lines, moved])
        self._note(moved, keep_redo=redo)
        self.history = history

    def _replayed(self, lines: list[dict[str, Any]]) -> tuple[History, list[int]]:
        return replayed(lines, header.plan_of(self.header), self.header["seed"])

    def _note(self, line: dict[str, Any], *, sync: bool = True, keep_redo: bool = False) -> None:
        self.journal.append(line, self.history.apply, sync=sync)
        if not keep_redo:
            self.redoable.clear()
