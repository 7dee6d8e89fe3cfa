"""What a loop yields: plain frozen values that printing, progress bars and JSON lines all read.

An event knows nothing of who looks at it. `nll` is always in nats, summed over the tokens named
beside it, so that sums can be carried to the end and divided once.
"""

from dataclasses import asdict, dataclass
from typing import Any, ClassVar


@dataclass(frozen=True, slots=True)
class Event:
    """Base of all events; `kind` is its name in JSON."""

    kind: ClassVar[str] = "event"

    def as_dict(self) -> dict[str, Any]:
        """The event as JSON-ready values, its name under "event"."""
        return {"event": self.kind, **asdict(self)}


@dataclass(frozen=True, slots=True)
class Token(Event):
    """One token was written.

    index: place in the session's text, in tokens. id: vocabulary id. text: the text that this token
    completes: empty while a character is unfinished, more than one character when several are done.
    """

    kind: ClassVar[str] = "token"
    index: int
    id: int
    text: str


@dataclass(frozen=True, slots=True)
class ChunkWritten(Event):
    """A chunk is full. written: how many of its tokens the model wrote itself."""

    kind: ClassVar[str] = "chunk_written"
    chunk: int
    start: int
    tokens: int
    written: int
    seconds: float


@dataclass(frozen=True, slots=True)
class ChunkScored(Event):
    """A chunk was scored before anything was learned from it.

    adapted_nll: under the adapter that wrote it, or that met it first. base_nll: under the bare base
    with the same window; None where it was not asked for. Both in nats, summed over `tokens`.
    """

    kind: ClassVar[str] = "chunk_scored"
    chunk: int
    start: int
    tokens: int
    adapted_nll: float
    base_nll: float | None


@dataclass(frozen=True, slots=True)
class ChunkLearned(Event):
    """One update of the adapter. version: that of the new adapter. gradient_norm: before clipping.

    share: how much of the update the guard kept, 1 for all of it.
    """

    kind: ClassVar[str] = "chunk_learned"
    chunk: int
    start: int
    tokens: int
    version: int
    learning_rate: float
    gradient_norm: float
    share: float
    seconds: float


@dataclass(frozen=True, slots=True)
class ChunkSkipped(Event):
    """A chunk was left unlearned: by the guard, for "repetition", "noise" or "drift", or a translation, where
    something is wrong with it, for "check"."""

    kind: ClassVar[str] = "chunk_skipped"
    chunk: int
    start: int
    tokens: int
    reason: str


@dataclass(frozen=True, slots=True)
class RolledBack(Event):
    """The guard went back to the adapter's last good version, or to the base where that was none for this
    text any more, and learns more slowly from here on.

    version: the adapter's now. rate: what learning rates are multiplied by from now on.
    """

    kind: ClassVar[str] = "rolled_back"
    chunk: int
    version: int
    rate: float


@dataclass(frozen=True, slots=True)
class PassageTranslated(Event):
    """A passage has its translation; it is scored and learned next.

    draft: what the model wrote, None where a reference was given and none was asked for. origin: whose
    `target` is: "own", "reference", "accepted" (a draft that a person accepted) or "correction". problem:
    what is wrong with the draft as far as can be told, None if nothing is.
    """

    kind: ClassVar[str] = "passage_translated"
    passage: int
    source: str
    draft: str | None
    target: str
    origin: str
    problem: str | None
    seconds: float


@dataclass(frozen=True, slots=True)
class Warned(Event):
    """Something the user should know; the text goes on. code: a stable name for programs."""

    kind: ClassVar[str] = "warning"
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class End(Event):
    """The loop is over. reason: "tokens", "eos" or "stop". tokens: written in this call.

    base_perplexity and adapted_perplexity cover the chunks that this call scored; None if none was.
    """

    kind: ClassVar[str] = "end"
    reason: str
    tokens: int
    seconds: float
    scored_tokens: int
    base_perplexity: float | None
    adapted_perplexity: float | None


EVENTS: tuple[type[Event], ...] = (
    Token,
    ChunkWritten,
    ChunkScored,
    ChunkLearned,
    ChunkSkipped,
    RolledBack,
    PassageTranslated,
    Warned,
    End,
)
