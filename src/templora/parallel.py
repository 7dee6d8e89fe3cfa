"""A session that writes on while it learns: the paper's parallel deployment, one chunk of staleness.

A chunk is learned in a thread of its own while the next one is written by the adapter as it was before. Who
sees what is fixed at the chunk's end, never by the clock: the same seed gives the same text. It knows one
text in memory; a session on disk learns in turn.
"""

import copy
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch

from templora.adapter import Adapter
from templora.base import Base
from templora.decoder import Decoder
from templora.errors import TemploraError, UnsupportedModel
from templora.events import ChunkWritten, Event, RolledBack
from templora.half import wanted
from templora.memory import fits_in_memory
from templora.recipe import Recipe
from templora.session import Session
from templora.study import Study
from templora.turns import one_thread
from templora.window import Plan, Span

if TYPE_CHECKING:
    from templora.tasks.translate import Passage


@dataclass(slots=True)
class _Job:
    """A full chunk that is to be learned. ids: the text up to its end. written: tokens of its own.

    future: None before it is begun, and again after it has failed.
    """

    ids: list[int]
    span: Span
    written: int
    score_base: bool
    future: Future[list[Event]] | None = None


@one_thread("settle", "state", "load_state", "discard")
class ParallelSession(Session):
    """A text of which one chunk is learned while the next one is written.

    Chunk n of the model's own text is written by the adapter that has learned all chunks up to n - 2; a chunk
    that was given is learned before anything is written after it. A chunk is scored by the adapter that has
    learned all chunks before it, as in any session. Make one with `Base.session(parallel=True)`.

    The writer has keys of its own, of the versions that it wrote with; of given text it makes them when it
    begins to write.

    adapter: what has been learned. In the middle of a loop it may be changing: `settle` first.
    Source: arXiv 2401.11504, "cascaded or parallel deployment".
    """

    def __init__(
        self, base: Base, recipe: str | Path | Recipe = "default", *, seed: int = 0, **overrides: Any
    ) -> None:
        # Two threads cannot swap layers in one model.
        self._twin = twin_of(base, "leave out parallel")
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="templora")
        self._job: _Job | None = None  # the only one that is not learned yet
        self._news: list[Event] = []  # not yielded yet
        self._stream: torch.cuda.Stream | None = None
        super().__init__(base, recipe, seed=seed, **overrides)

    def settle(self) -> None:
        """Wait until every chunk that is full has been learned.

        Raises:
            OutOfMemory, or whatever else stopped it: that chunk counts as not learned and is tried again
            where it is next waited for.
        """
        if (job := self._job) is None:
            return
        if job.future is None:
            self._begin(job)
        assert job.future is not None
        wait([job.future])  # if this is interrupted, the job goes on and is waited for again
        if (error := job.future.exception()) is not None:
            job.future = None
            raise error
        self._news += (events := job.future.result())
        self._went_back = self._went_back or any(isinstance(event, RolledBack) for event in events)
        self._job = None
        if not job.written:
            self._follow()

    def learning(self, *, score_base: bool = False) -> Iterator[Event]:
        """Score and learn every chunk that is full."""
        yield from super().learning(score_base=score_base)
        yield from self._outstanding()

    def score_rest(self, *, score_base: bool = False) -> Iterator[Event]:
        """As in any session; what is still being learned comes first."""
        yield from self._finish_full_chunks(score_base)
        yield from self._outstanding()
        yield from super().score_rest(score_base=score_base)

    def translate(
        self, passages: "Iterable[Passage]", source_language: str, target_language: str, **wishes: Any
    ) -> Iterator[Event]:
        """Refused: each passage is translated by an adapter that has learned the one before.

        Raises:
            TemploraError: always.
        """
        raise TemploraError("a translation learns in turn; leave out parallel=True")

    def state(self) -> dict[str, Any]:
        """As any session's, once all full chunks have been learned; also what the writer works with."""
        self._check_open()
        self.settle()
        writer = {
            "weights": self._writer.snapshot(),
            "version": self._writer.version,
            "decoder": self.decoder.state(),
            "went_back": self._went_back,
        }
        return super().state() | {"writer": writer}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from what `state` returned."""
        self._check_open()
        if "writer" not in state:
            raise TemploraError("that is the state of a session that learns in turn; leave out parallel=True")
        self._drop()
        super().load_state(state)
        writer = state["writer"]
        self._writer.restore(writer["weights"], writer["version"])
        self.decoder.load_state(writer["decoder"])
        self._went_back = writer.get("went_back", False)

    def discard(self) -> None:
        """Throw the adapter away, after the chunk that is being learned now."""
        self._drop()
        self._worker.shutdown()
        self._writer.discard()
        super().discard()

    def _start_afresh(self) -> None:
        super()._start_afresh()
        # What writes: on the base itself, which is bare between two events, and with keys of its own.
        self._writer = Adapter(self.base.model, self.recipe, self.seed, self.base.start)
        self.decoder = Decoder(
            self.base, self._writer, self.plan, self.recipe.cache, half=wanted(self.recipe.precision)
        )
        self._went_back = False  # and the writer still has the keys of what was taken back

    def _learns_on(self) -> Base:
        return self._twin

    def _finish_full_chunks(self, score_base: bool, clock: float | None = None) -> Iterator[Event]:
        clock = time.perf_counter() if clock is None else clock
        self._check_open()
        while True:
            if self._job is not None and not self._job.written:
                self.settle()
            yield from self._take_news()
            self._check_open()  # it may be discarded at any event
            if len(self.ids) < (span := self.plan.span(self.chunk)).stop:
                return
            written, seconds = self._written, time.perf_counter() - clock
            self.settle()
            self._follow()
            self._job = _Job(self.ids[: span.stop], span, written, score_base)
            self.chunk, self._written = self.chunk + 1, 0
            if written:
                self._news.append(ChunkWritten(span.chunk, span.start, span.tokens, written, seconds))
            self._begin(self._job)

    def _beside(self) -> AbstractContextManager[None]:
        """What runs inside does so beside whatever the device is given from now on; at its end it is done.

        On a GPU that takes a stream of its own: on the one that all threads have, a token would wait for all
        of the learning that is queued there.
        """
        device = self.base.device
        if device.type != "cuda":
            return nullcontext()
        # The same for all jobs: torch keeps freed memory for the stream that it was used on.
        self._stream = self._stream or torch.cuda.Stream(device)
        return _on(self._stream, torch.cuda.current_stream(device).record_event())

    def _outstanding(self) -> Iterator[Event]:
        self.settle()
        yield from self._take_news()

    def _take_news(self) -> list[Event]:
        news, self._news = self._news, []
        return news

    def _begin(self, job: _Job) -> None:
        job.future = self._worker.submit(_learn, self.study, self.plan, job, self._beside())
        if self.recipe.dropout > 0:
            # It draws from torch's own generator, which nobody else may use meanwhile: the caller waits.
            wait([job.future])

    def _follow(self) -> None:
        """The writer takes over what was learned."""
        self._writer.restore(self.adapter.flat, self.adapter.version)
        if self._went_back:
            self.decoder.forget()  # as the learner did
            self._went_back = False

    def _drop(self) -> None:
        """Let a chunk that is being learned finish, and forget it."""
        if self._job is not None and self._job.future is not None:
            wait([self._job.future])
        self._job, self._news = None, []


def twin_of(base: Base, cure: str) -> Base:
    """The same base once more: modules of its own, every parameter, buffer and hook shared.

    Raises:
        UnsupportedModel: its modules cannot be copied; the message ends in that cure.
    """
    model = base.model
    try:
        if any(isinstance(vars(module).get("forward"), FunctionType) for module in model.modules()):
            raise TypeError("a layer has a forward of its own, which runs the layers that it was made for")
        with base.turn:
            # A user's hooks as well: those to come, and whatever they belong to.
            hooks = (own for module in model.modules() for own in vars(module).items())
            kept = (value for name, value in hooks if name.endswith("_hooks") and isinstance(value, dict))
            shared: dict[int, Any] = {id(one): one for one in (*model.parameters(), *model.buffers(), *kept)}
            twin = copy.deepcopy(model, shared)
    except (TypeError, RuntimeError) as error:
        kind = type(model).__name__
        raise UnsupportedModel(f"{kind} cannot run in two threads ({error}); {cure}") from error
    made = Base(twin, base.tokenizer if base.has_tokenizer else None, base.name)
    made.halves, made.start = base.halves, base.start  # of the same weights
    return made


@contextmanager
def _on(stream: torch.cuda.Stream, after: Any) -> Generator[None]:
    stream.wait_event(after)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        stream.synchronize()


def _learn(study: Study, plan: Plan, job: _Job, place: AbstractContextManager[None]) -> list[Event]:
    """In the worker's thread, which has modes of its own: torch's are by thread."""
    ids: Sequence[int] = job.ids
    with torch.inference_mode(False), torch.enable_grad(), place, fits_in_memory(plan):
        return study.finish(ids, job.span, job.written, score_base=job.score_base)
