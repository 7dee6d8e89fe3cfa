"""What a model writes, token by token: how it is drawn, what text it makes, when it ends. No tensors here."""

import time
from collections.abc import Sequence
from dataclasses import InitVar, dataclass, field

from transformers import LogitsProcessorList, SuppressTokensLogitsProcessor

from templora.base import Base
from templora.detokenizer import TAIL, UNFINISHED, Detokenizer, owed, word_starts
from templora.errors import InvalidText
from templora.events import End, Event
from templora.metrics import Tally, count
from templora.sampling import Sampling


@dataclass(frozen=True, slots=True)
class Wishes:
    """What `Session.write` is asked for; see there.

    Raises:
        InvalidText: a number below 0, or nothing to stop at.
    """

    tokens: int
    sampling: Sampling
    processors: LogitsProcessorList | None = None
    stop: str | Sequence[str] = ()
    stop_at_eos: bool = False
    score_base: bool = True

    def __post_init__(self) -> None:
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stops)  # it is frozen from here on
        if self.tokens < 0:
            raise InvalidText(f"cannot write {self.tokens} tokens; give a number of 0 or more")
        if "" in stops:
            raise InvalidText("a string to stop at is empty, and would end every text; leave it out")


@dataclass(slots=True)
class Pen:
    """One call of `write` on one text.

    ids, text: so far. own_from: where in it the end begins that the model wrote, in characters. reason: why
    it ended, "tokens" until it did.
    """

    base: Base
    wishes: Wishes
    ids: Sequence[int]
    text: InitVar[str]
    own_from: InitVar[int]
    written: int = 0
    reason: str = "tokens"
    _processors: LogitsProcessorList = field(init=False)
    _detokenizer: Detokenizer | None = field(init=False)
    _eos: list[int] = field(init=False)
    _tail: str = ""
    _owed: str = ""
    _opening: SuppressTokensLogitsProcessor | None = None  # while the next token must bring what is owed
    _longest: int = 0
    _started: float = field(default_factory=time.perf_counter)
    _scored: tuple[Tally, Tally] = field(default_factory=lambda: (Tally(), Tally()))

    def __post_init__(self, text: str, own_from: int) -> None:
        base, wishes = self.base, self.wishes
        self._eos = base.eos_ids
        banned = [] if wishes.stop_at_eos else self._eos
        self._processors = (
            wishes.sampling.processors(banned, str(base.device))
            if wishes.processors is None
            else wishes.processors
        )
        self._longest = max(map(len, wishes.stop), default=0)
        self.follow(self.ids, text, own_from)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.wishes.sampling.temperature == 0

    @property
    def processors(self) -> LogitsProcessorList:
        """What is done to the logits of the next token."""
        return LogitsProcessorList([self._opening, *self._processors]) if self._opening else self._processors

    def follow(self, ids: Sequence[int], text: str, own_from: int) -> None:
        """The text has become another one, as by an undo: go on after this one."""
        self.ids, self._owed = ids, owed(self.base, ids, text)
        self._tail = text[max(own_from, len(text) - self._longest) :]  # a string to stop at may have begun
        self._opening = self._word() if self._owed and self.wishes.processors is None else None
        self._detokenizer = Detokenizer(self.base.tokenizer, ids) if self.base.has_tokenizer else None

    def _word(self) -> SuppressTokensLogitsProcessor | None:
        """Leaves nothing but the beginning of a word; None inside a character."""
        words = word_starts(self.base.tokenizer) | set(self._eos)
        if words <= set(self._eos) or self.base.decode(self.ids[-TAIL:]).endswith(UNFINISHED):
            return None
        others = [token for token in range(self.base.vocabulary) if token not in words]
        return SuppressTokensLogitsProcessor(others, device=str(self.base.device))

    def shown(self, visible: int) -> Sequence[int]:
        """The ids that processors are given, of which those from that index on are visible.

        A caller's own get the whole text, as in transformers: some count its tokens (min_length, forced EOS).
        """
        return self.ids[visible:] if self.wishes.processors is None else self.ids

    @property
    def done(self) -> bool:
        """Whether there is nothing more to write."""
        return self.written >= self.wishes.tokens or self.reason != "tokens"

    def take(self, token: int) -> str | None:
        """The text that a token completes; None if it ends the text and is no part of it."""
        if self.wishes.stop_at_eos and token in self._eos:
            self.reason = "eos"
            return None
        piece = self._detokenizer.step(token) if self._detokenizer else ""
        self._opening = None
        if piece:  # the space that it brings may stand in the text already
            piece, self._owed = piece.removeprefix(self._owed), ""
        self.written += 1
        before, text = len(self._tail), self._tail + piece
        if any(text.find(wanted, max(0, before + 1 - len(wanted))) >= 0 for wanted in self.wishes.stop):
            self.reason = "stop"
        self._tail = text[max(0, len(text) - self._longest) :]
        return piece

    def count(self, event: Event) -> None:
        """Note what was scored."""
        count(event, *self._scored)

    def end(self) -> End:
        """What it came to."""
        base, adapted = self._scored
        seconds = time.perf_counter() - self._started
        return End(self.reason, self.written, seconds, adapted.tokens, base.perplexity, adapted.perplexity)
