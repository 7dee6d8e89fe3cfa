"""A session on disk: whatever happens to its text is in the journal before it is true here.

Any earlier moment can be computed again, bit for bit: load the nearest saved version and go through what
came after it in the same way, pass by pass, with the tokens that were drawn then.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from templora import header, snapshot
from templora.base import Base, load
from templora.errors import InvalidRecipe, InvalidText, OutputError, SessionClosed, TemploraError, WrongBase
from templora.events import ChunkScored, Event, Warned
from templora.metrics import Reading, counted
from templora.recipe import Recipe
from templora.replay import Replay
from templora.sampling import Sampler
from templora.session import Session
from templora.sizes import sizes, spliced
from templora.store import BUDGET, Store
from templora.turns import one_thread
from templora.versions import Pace, Version
from templora.window import Span

LEAST = 256  # tokens between two versions, at least


@one_thread("note", "reseed", "close", "discard", "_move", "_check_open")
class DurableSession(Session):
    """A session in a folder. Make one with `Base.session(dir=…)`, continue it with `templora.resume`.

    save_every: chunks between two versions; None: as often as costs no more than half a percent of the time.
    """

    def __init__(self, base: Base, store: Store, announced: Sequence[Event] = ()) -> None:
        self.store = store
        self._moving = True  # to the moment that the history says, and not there yet
        super().__init__(base, header.recipe_of(store.header), seed=store.header["seed"])
        self.save_every: int | None = None
        self._pace, self._fresh, self._saved = Pace(), True, (0, 0)  # chunks and tokens of the newest version
        self._to_announce = [*announced, *(Warned("mended", warning) for warning in store.warnings)]
        self._restore()

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def dir(self) -> Path:
        """Its folder."""
        return self.store.folder

    @property
    def versions(self) -> list[Version]:
        """All saved versions, oldest first; `rewind` can go back to any."""
        return self.store.versions.all()

    def undo(self, chunks: int = 1) -> None:
        """Take back the last chunks, an unfinished one counting as one, and what was learned from them.

        Raises:
            NoSuchMoment: there are not so many.
        """
        self._move(lambda: self.store.undo(chunks))

    def redo(self) -> None:
        """Take back the last `undo`: text, adapter and random state are what they were, bit for bit.

        Raises:
            NoSuchMoment: nothing was undone, or something was written since.
        """
        self._move(self.store.redo)

    def rewind(self, to: int | str) -> None:
        """Go back to a number of tokens, or to a version ("v12") or a note, on whatever branch it is.

        Raises:
            NoSuchMoment: there is none.
        """
        self._move(lambda: self.store.rewind(to))

    def fork(self, dir: str | Path) -> "DurableSession":
        """The same session once more, in another folder; from here on each goes its own way.

        Raises:
            NotASession: there is something at `dir` already.
        """
        self._check_open()
        self.store.fork(Path(dir))
        return DurableSession(self.base, Store(Path(dir)))

    def edit(self, start: int, end: int, text: str, *, score_base: bool = False) -> Reading:
        """Replace the characters [start, end) of the text; what comes after is learned anew.

        Raises:
            NoSuchMoment: the text has no such characters.
        """
        base, adapted = counted(self.editing(start, end, text, score_base=score_base))
        return Reading(len(self.ids), adapted.tokens, base.perplexity, adapted.perplexity)

    def editing(self, start: int, end: int, text: str, *, score_base: bool = False) -> Iterator[Event]:
        """`edit`, as a generator of events, as `reading`."""
        self._check_open()
        if not self.ids:
            self._give(self.base.prefix_ids, "")
        encoded = lambda *new: spliced(self.base, self.store.history, *new)  # noqa: E731
        self._move(
            lambda: self.store.edit(start, end, text, encoded=encoded, least=len(self.base.prefix_ids))
        )
        yield from self.learning(score_base=score_base)

    def note(self, name: str) -> Version:
        """Name this moment, so that `rewind` finds it; its version is never thinned.

        Raises:
            OutputError: it could not be saved. InvalidText: it means a number of tokens or a version.
        """
        self._check_open()
        InvalidText.check_note(name)
        version = self._save()
        self.store.note(name, version.number)
        return version

    def reseed(self, seed: int) -> None:
        """Draw from another seed from here on: after an undo, to get another text."""
        self._check_open()
        self.store.mark("seed", seed)
        self.sampler = Sampler(seed)

    def translate(self, *_: Any, **__: Any) -> Iterator[Event]:
        """Refused: a journal of a text has no place for translations."""
        raise TemploraError(f"{self.dir} keeps a text; translate in a session without dir=…")

    def load_state(self, state: dict[str, Any]) -> None:
        """Refused: text and adapter are what the folder says."""
        raise TemploraError(f"{self.dir} keeps its own state; load this into a session without dir=…")

    def close(self) -> None:
        """Save the present state, so that it opens at once, and let other processes in."""
        if self._closed:
            return
        try:
            # What was learned and could not be written down is no part of the session.
            written_down = self.chunk == len(self.store.history.learned) and not self._moving
            if written_down and (self.chunk, len(self.ids)) != self._saved:
                self._save()
        except OutputError:
            pass  # the journal holds everything; a version only spares time
        finally:
            self._let_go()

    def discard(self, *, keep_text: bool = True) -> None:
        """Throw the adapter and all saved states away; keep_text False: the whole folder."""
        if self._closed:
            return
        self.store.discard(keep_text=keep_text)
        self._let_go()

    def learning(self, *, score_base: bool = False) -> Iterator[Event]:
        """Score and learn every chunk that is full."""
        self._check_open()
        if len(self.ids) >= self.plan.span(self.chunk).stop:
            # If this is interrupted, what is left will be done in the same way.
            self.store.mark("wish", int(score_base))
        yield from super().learning(score_base=score_base)

    # What a session in memory does, with the journal before it.

    def _start_afresh(self) -> None:
        super()._start_afresh()
        self.adapter.folder = self.dir

    def _give(self, ids: Sequence[int], text: str) -> None:
        self._check_open()
        self.store.give(ids, text, sizes(self.base, ids, text))

    def _append(self, token: int, piece: str) -> None:
        self.store.own(token, piece, self.sampler.draws)

    def _own_from(self) -> int:
        return self.store.history.own_from

    def _looked(self) -> None:
        self.store.look(self.sampler.draws)

    def _scores_base(self, span: Span, wish: bool) -> bool:
        asked = self.store.history.wish(span.stop)
        return wish if asked is None else asked

    def _own_tokens(self, span: Span) -> int:
        return self.store.history.own_in(span.start, span.stop)

    def _finished(self, span: Span, score_base: bool, events: list[Event]) -> list[Event]:
        scored = next(event for event in events if isinstance(event, ChunkScored))
        self.store.learn(span, score_base, scored, [event.as_dict() for event in events])
        try:
            if self._is_time_to_save(span):
                self._save()
        except OutputError as error:
            return [Warned("not_saved", f"{error}; the text is safe, going back will take longer")]
        return []

    def _is_time_to_save(self, span: Span) -> bool:
        if self.save_every is not None:
            return self.chunk % self.save_every == 0
        return abs(span.stop - self._saved[1]) >= LEAST and self._pace.due

    def _save(self) -> Version:
        # Given text beyond a full chunk waits to be learned: no state depends on it yet.
        tokens = min(len(self.ids), self.plan.span(self.chunk).stop)
        try:
            with self._pace.saving():
                version = self.store.save(self.chunk, tokens, self.adapter.version, self._fill)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise OutputError(f"cannot save a version in {self.dir}: {reason}; free some space") from error
        self._saved = (self.chunk, tokens)
        return version

    def _fill(self, folder: Path) -> None:
        snapshot.write(folder, self.study, self.chunk)

    # Computing an earlier moment again.

    def _move(self, there: Callable[[], None]) -> None:
        """Go to another moment. Interrupted, it is done again by whatever needs the session next."""
        self._check_open()
        self._moving = True
        try:
            there()
        except TemploraError:  # refused; what had been moved by then is followed
            self._moving = self.store.history.ids is not self.ids
            raise
        self._restore()

    def _restore(self) -> None:
        """Make everything what it was at this point of the history."""
        history = self.store.history
        self.ids, self._text = history.ids, history.text
        if not self._fresh:
            self._start_afresh()
        self._fresh = False
        version = self._load_newest()
        start = version.tokens if version else 0
        self._saved = (self.chunk, start)
        self.chunk, exact = Replay(history, self.plan, self.study).run(start, self.chunk)
        self.sampler = Sampler(history.seed, history.drawn)
        if not exact:
            wrote = f"{self.dir}{header.changes(self.store.header)}"
            message = (
                f"this machine or version does not compute bit for bit what wrote {wrote}; the text is whole"
            )
            self._to_announce.append(Warned("inexact", f"{message}, but may go on otherwise"))
        self._moving, self._moves = False, self._moves + 1

    def _load_newest(self) -> Version | None:
        """The newest version on the way to this moment, into adapter, optimiser, guard and caches."""
        for version in reversed(self.store.usable()):
            if not self.store.versions.is_whole(version):
                message = f"version {version.name} of {self.dir} is damaged; an earlier one took its place"
                self._to_announce.append(Warned("damaged", message))
                continue
            snapshot.read(self.store.versions.path(version.number), self.study, version.adapter)
            self.chunk = version.chunk
            return version
        return None

    def _check_open(self) -> None:
        if self._closed:
            raise SessionClosed(f"the session in {self.dir} was closed; go on with templora.resume")
        super()._check_open()
        if self._moving:
            self.store.reread()
            self._restore()

    def _let_go(self) -> None:
        super().discard()
        self.store.close()


def create(
    base: Base, dir: str | Path, recipe: str | Path | Recipe, seed: int, budget: int | None, **overrides: Any
) -> DurableSession:
    """Begin a session in a folder; see `Base.session`."""
    if budget is not None and budget < 0:
        raise InvalidRecipe(f"budget {budget} is no number of bytes; give 0 or more")
    plain = Session(base, recipe, seed=seed, **overrides)
    announced, fitted = list(plain.learning()), plain.recipe
    plain.discard()
    head = header.made(base.describe(), fitted, plain.seed, BUDGET if budget is None else budget)
    return DurableSession(base, Store.create(Path(dir), head), announced)


def resume(
    dir: str | Path, base: Base | None = None, *, device: str | None = None, name: str | None = None
) -> DurableSession:
    """Continue a session exactly where it was.

    Args:
        base: the base it was begun on; by default it is loaded by the name that the session remembers, or
            by `name` if it has moved. device: where to load it.

    Raises:
        NotASession, SessionLocked, SessionDamaged, SessionClosed: it cannot be opened.
        WrongBase: the base is not the one it was begun on. ModelNotFound: it cannot be loaded.
    """
    store = Store(Path(dir))
    try:
        wanted = store.header["base"]
        name = name or wanted["name"]
        if base is None and not name:
            raise WrongBase(f"{store.folder} was begun on a model in memory; give that with base=…")
        base = base or load(name, dtype=wanted.get("dtype"), device=device)
        header.check_base(store.header, base.describe(), store.folder)
        return DurableSession(base, store)
    except BaseException:
        store.close()
        raise
