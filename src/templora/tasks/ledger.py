"""A translation on disk: a journal of its passages, and versions of the adapter that only spare time.

What the adapter knows is a function of the passages, in order. So whatever changes one, such as a correction
weeks later, only moves the place from which passages are learned again.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from templora import header, journal, shelf, snapshot
from templora.errors import NotASession, OutputError, WrongBase
from templora.events import ChunkScored, Event, Warned
from templora.journal import Journal
from templora.lock import Lock
from templora.metrics import Tally
from templora.recipe import Recipe
from templora.sampling import Sampler
from templora.tasks.translate import Passage, Translated, Translator
from templora.versions import Pace, Version, Versions, checksum


class Ledger:
    """The folder of one translation, open for writing.

    records: its passages, in order; draws: of the sampler, after each.

    Raises:
        NotASession, SessionLocked, SessionDamaged, OutputError: it cannot be opened.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not shelf.exists(folder):
            raise NotASession(f"{folder} holds no translation; begin one with templora translate")
        self._lock = Lock(folder / shelf.LOCK)
        try:
            self.header, problem = shelf.header_of(folder)
            if "translation" not in self.header:
                raise NotASession(f"{folder} holds a session, no translation; choose another --session")
            if problem:
                header.write(folder, self.header)
            self._mended = f"{problem}; it was restored from the journal" if problem else ""
            contents = journal.read(folder / shelf.JOURNAL)
            self._journal = Journal(folder / shelf.JOURNAL, contents)
            self._versions = Versions(folder / shelf.VERSIONS)
            self._versions.clean()
        except BaseException:
            self._lock.release()
            raise
        self.records: list[Translated] = []
        self.draws: list[int] = []
        self._outs: dict[str, set[str]] = {}  # name: checksums of what was written there
        self._pace = Pace()
        self._adapted, self._base = Tally(), Tally()
        for line in contents.lines:
            self._apply(line)

    @classmethod
    def create(cls, folder: Path, head: header.Header, settings: dict[str, Any]) -> "Ledger":
        """Begin one. settings: languages, template, pairs; they stay as they are.

        Raises:
            NotASession: there is something in the folder. OutputError: it cannot be written.
        """
        shelf.begin(folder, {**head, "translation": settings})
        return cls(folder)

    def check(self, base: dict[str, Any], settings: dict[str, Any], recipe: Recipe, seed: int) -> None:
        """Refuse another base, or other settings than it was begun with.

        Raises:
            WrongBase: the message says what differs.
        """
        header.check_base(self.header, base, self.folder)
        # Translations of old do not say all of them.
        was: dict[str, Any] = {**settings, **self.header["recipe"], **self.header["translation"]}
        was["seed"] = self.header["seed"]
        settings = {**recipe.model_dump(mode="json"), **settings, "seed": seed}
        keys = [key for key in settings if settings[key] != was.get(key)]
        if keys:
            differences = ", ".join(f"{key} {was.get(key)!r}, not {settings[key]!r}" for key in keys)
            raise WrongBase(f"{self.folder} was begun with {differences}; leave that, or begin another")

    def writes_to(self, out: Path) -> None:
        """From now on that file is this translation's.

        Raises:
            OutputError: it exists, and is another's, or somebody has changed it.
        """
        known = self._outs.get(self._name(out))
        try:
            found = checksum(out) if out.exists() else ""
        except OSError as error:
            raise OutputError(f"cannot read {out}: {error.strerror}; choose another --out") from error
        # Sessions of old do not say where they wrote, or not what.
        if found and known is None and (self._outs or not self.records):
            raise OutputError(f"{out} exists and is never overwritten; choose another --out")
        if found and known and found not in known:
            raise OutputError(
                f"{out} was changed since it was written; move it away, or put the changes into --corrections"
            )
        if not known:
            self._note(out, found)

    def writes(self, out: Path, part: Path) -> None:
        """That file is about to take the place of `out`. Said before, so that a kill in between does no harm.

        Raises:
            OutputError: as `writes_to`; it may have changed while passages were translated.
        """
        self.writes_to(out)
        if (digest := checksum(part)) not in self._outs[self._name(out)]:
            self._note(out, digest)

    def _name(self, out: Path) -> str:
        """From the folder, so that both may move."""
        return os.path.relpath(out.absolute(), self.folder.absolute())

    def _note(self, out: Path, digest: str) -> None:
        self._journal.append({"op": "out", "name": self._name(out), "digest": digest}, self._apply)

    def correct(self, passage: int, target: str) -> None:
        """A person has changed a translation."""
        line = {"op": "correct", "passage": passage, "target": target}
        self._journal.append(line, self._apply)

    def restore(self, translator: Translator) -> Iterator[Event]:
        """Bring a fresh translator to the end of the records, learning again what no version holds."""
        study, done = translator.session.study, 0
        if self._mended:
            yield Warned("mended", self._mended)
        for version in reversed(self._versions.all()):
            if version.chunk <= len(self.records) and version.digest == self._digest(version.chunk):
                if not self._versions.is_whole(version):
                    message = f"version {version.name} of {self.folder} is damaged; an earlier one is used"
                    yield Warned("damaged", message)
                    continue
                snapshot.read(self._versions.path(version.number), study, version.adapter)
                done = version.chunk
                break
        translator.take_up(self.records[:done])
        for record in self.records[done:]:
            yield from translator.learn_again(record)
        session = translator.session
        session.sampler = Sampler(session.seed, self.draws[-1] if self.draws else 0)

    def translate(self, translator: Translator, passage: Passage) -> list[Event]:
        """One more passage; it is on the disk before this returns."""
        events = translator.translate(passage)
        scored = next((event for event in events if isinstance(event, ChunkScored)), None)
        line = {
            "op": "passage",
            **asdict(translator.done[-1]),
            "draws": translator.session.sampler.draws,
            "tokens": scored.tokens if scored else 0,
            "adapted_nll": scored.adapted_nll if scored else 0.0,
            "base_nll": scored.base_nll if scored else None,
        }
        self._journal.append(line, self._apply)
        if self._pace.due:
            events += self.save(translator)
        return events

    def save(self, translator: Translator) -> list[Event]:
        """Make a version of the adapter as it is now; or warn: it would only have spared time."""
        done = len(self.records)
        version = Version(
            number=self._versions.next_number(),
            ancestors=[v.number for v in self._versions.all()],
            line=self._journal.lines,
            chunk=done,
            tokens=self._adapted.tokens,
            digest=self._digest(done),
            adapter=translator.session.adapter.version,
            scored=self._adapted.tokens,
            adapted_nll=self._adapted.nll,
            base_scored=self._base.tokens,
            base_nll=self._base.nll,
        )
        try:
            with self._pace.saving():
                study = translator.session.study
                self._versions.save(version, lambda folder: snapshot.write(folder, study, done))
            self._versions.thin((), self.header["budget"])
        except (OSError, SafetensorError, OutputError) as error:
            cause = getattr(error, "strerror", None) or str(error).partition(";")[0]
            cure = "free some space (the translations themselves are safe)"
            return [Warned("not_saved", f"cannot save a version in {self.folder}: {cause}; {cure}")]
        return []

    def close(self) -> None:
        """Let other processes in."""
        self._journal.close()
        self._lock.release()

    def _apply(self, line: dict[str, Any]) -> None:
        if line["op"] == "passage":
            context = line["context"]
            self.records.append(
                Translated(
                    line["source"],
                    line["target"],
                    line["origin"],
                    line["base"],
                    line["learned"],
                    None if context is None else tuple((a, b) for a, b in context),
                )
            )
            self.draws.append(line["draws"])
            self._adapted.add(line["adapted_nll"], line["tokens"])
            self._base.add(line["base_nll"], line["tokens"])
        elif line["op"] == "out":
            known = self._outs.setdefault(line["name"], set())
            if "digest" in line:
                known.add(line["digest"])
        elif line["op"] == "correct":
            old = self.records[line["passage"]]
            new = replace(old, target=line["target"], origin="correction", learned=True)
            self.records[line["passage"]] = new

    def _digest(self, passages: int) -> str:
        """Names the adapter after so many passages."""
        data = json.dumps([asdict(record) for record in self.records[:passages]], sort_keys=True)
        return hashlib.sha256(data.encode("utf-8", "surrogatepass")).hexdigest()
