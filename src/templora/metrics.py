"""Sums of negative log-likelihood, carried to the end and divided once.

Source of the convention: perplexity = exp(sum of NLL / sum of tokens); bits per byte beside it.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from templora.events import ChunkScored, Event


@dataclass(slots=True)
class Tally:
    """A running sum. nll: nats. tokens: how many tokens it covers. bytes: UTF-8 bytes of their text."""

    nll: float = 0.0
    tokens: int = 0
    bytes: int = 0

    def add(self, nll: float | None, tokens: int) -> None:
        """Add one piece: nll in nats, summed over `tokens`; None where it was not measured adds nothing."""
        if nll is not None:
            self.nll += nll
            self.tokens += tokens

    @property
    def perplexity(self) -> float | None:
        """exp(mean NLL); None before the first token."""
        return perplexity(self.nll, self.tokens) if self.tokens else None

    @property
    def bits_per_byte(self) -> float | None:
        """Bits per UTF-8 byte; None where no bytes were counted."""
        return self.nll / math.log(2) / self.bytes if self.bytes else None


@dataclass(frozen=True, slots=True)
class Reading:
    """What reading a text came to. Perplexities are None where no chunk was full.

    tokens: of what was read; after an edit, of the whole text.
    """

    tokens: int
    scored_tokens: int
    base_perplexity: float | None
    adapted_perplexity: float | None


def perplexity(nll: float, tokens: int) -> float:
    """exp(nll / tokens), nll in nats and summed; infinite where it exceeds a float."""
    try:
        return math.exp(nll / tokens)
    except OverflowError:
        return math.inf


def count(event: Event, base: Tally, adapted: Tally) -> None:
    """Add a scored chunk to both sums; other events pass by."""
    if isinstance(event, ChunkScored):
        adapted.add(event.adapted_nll, event.tokens)
        base.add(event.base_nll, event.tokens)


def counted(events: Iterable[Event]) -> tuple[Tally, Tally]:
    """The sums of all chunks that are scored there: of the base, and of the adapter."""
    base, adapted = Tally(), Tally()
    for event in events:
        count(event, base, adapted)
    return base, adapted


def change(base: float | None, adapted: float | None) -> float | None:
    """A perplexity under the adapter against the base's, as a fraction: -0.2 is a fifth lower.

    None where one of them is not known.
    """
    return None if base is None or adapted is None else adapted / base - 1
