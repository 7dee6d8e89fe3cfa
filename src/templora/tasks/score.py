"""Score a given text: each token by an adapter that has seen only earlier tokens.

A task knows sessions and events; files, plots and tables are for others.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from templora.base import Base
from templora.errors import InvalidText
from templora.events import ChunkLearned, ChunkScored, ChunkSkipped, Event, RolledBack, Warned
from templora.metrics import Tally, change, count, perplexity
from templora.session import Session
from templora.study import Study
from templora.window import FIRST_TARGET


@dataclass(slots=True)
class Scores:
    """What scoring a text came to; filled by events.

    chunks: start and tokens as in the text, base_nll and adapted_nll in nats summed over the chunk (None
    where the base was not asked), learn_seconds, and where the guard stepped in what it did: `guard` is the
    reason why a chunk was not learned, or "rolled_back"; or "not_finite" where its update had to be dropped.
    Where asked for, adapted_token_nll and base_token_nll: lists of each token's.
    """

    base: Tally = field(default_factory=Tally)
    adapted: Tally = field(default_factory=Tally)
    chunks: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])

    @classmethod
    def of(cls, base: Base, ids: list[int]) -> "Scores":
        """Empty scores of a text, the bytes of what is scored of it counted."""
        scores = cls()
        unscored = "" if base.prefix_ids else base.decode(ids[:FIRST_TARGET])
        scores.base.bytes = scores.adapted.bytes = len(base.decode(ids).encode()) - len(unscored.encode())
        return scores

    def take(self, event: Event) -> None:
        """Add what the event tells."""
        if isinstance(event, ChunkScored):
            count(event, self.base, self.adapted)
            self.chunks.append(
                {
                    "start": event.start,
                    "tokens": event.tokens,
                    "base_nll": event.base_nll,
                    "adapted_nll": event.adapted_nll,
                    "learn_seconds": 0.0,
                }
            )
        elif isinstance(event, ChunkLearned):
            self.chunks[-1]["learn_seconds"] = event.seconds
        elif isinstance(event, ChunkSkipped):
            self.chunks[-1]["guard"] = event.reason
        elif isinstance(event, RolledBack):
            self.chunks[-1]["guard"] = event.kind
        elif isinstance(event, Warned) and event.code == "not_finite":
            self.chunks[-1]["guard"] = event.code

    def take_tokens(self, study: Study) -> None:
        """Add what each token of the chunk that was scored last came to."""
        for key, nll in (("adapted_token_nll", study.nll), ("base_token_nll", study.base_nll)):
            self.chunks[-1][key] = None if nll is None else nll.tolist()

    def restore(self, chunks: list[dict[str, Any]]) -> None:
        """Take over the chunks of a run that was stopped."""
        for chunk in chunks:
            self.adapted.add(chunk["adapted_nll"], chunk["tokens"])
            self.base.add(chunk["base_nll"], chunk["tokens"])
        self.chunks = list(chunks)

    @property
    def learn_seconds(self) -> float:
        """Seconds spent on updates alone."""
        return sum(chunk["learn_seconds"] for chunk in self.chunks)

    @property
    def guarded(self) -> dict[str, int]:
        """How many chunks the guard did what to."""
        return dict(Counter(chunk["guard"] for chunk in self.chunks if "guard" in chunk))

    @property
    def change(self) -> float | None:
        """Adapted perplexity against the base's, as a fraction: -0.2 is a fifth lower."""
        return change(self.base.perplexity, self.adapted.perplexity)

    def mean_chunk_perplexity(self, key: str) -> float | None:
        """The authors' statistic: the token-weighted mean of per-chunk perplexities.

        key: "base_nll" or "adapted_nll". It is not a perplexity of the text; kept for their tables.
        """
        chunks = [c for c in self.chunks if c[key] is not None]
        tokens = sum(c["tokens"] for c in chunks)
        if not tokens:
            return None
        return sum(perplexity(c[key], c["tokens"]) * c["tokens"] for c in chunks) / tokens


def scoring(session: Session, ids: list[int], *, score_base: bool = True) -> Iterator[Event]:
    """Score, then learn, each chunk of `ids`; a short last chunk is scored and not learned.

    A session that already holds this text, as one that was resumed does, goes on where it stood.

    Yields:
        `ChunkScored`, and `ChunkLearned`, `ChunkSkipped` or `RolledBack`, in the order of the text.
    """
    if not session.ids:
        session.extend(ids, "")
    yield from session.learning(score_base=score_base)
    yield from session.score_rest(score_base=score_base)


def part_of(ids: list[int], tokens: int | None, skip: int) -> list[int]:
    """So many of them, all by default, after skipping so many.

    Raises:
        InvalidText: a number below 0.
    """
    if skip < 0 or (tokens is not None and tokens < 0):
        raise InvalidText(f"cannot score {tokens} tokens after the first {skip}; give numbers of 0 or more")
    return ids[skip : None if tokens is None else skip + tokens]


def score(
    base: Base,
    text: str,
    recipe: Any = "default",
    *,
    seed: int = 0,
    tokens: int | None = None,
    skip: int = 0,
    score_base: bool = True,
    by_token: bool = False,
    **overrides: Any,
) -> Scores:
    """Score a text on a fresh session and throw the adapter away.

    Args:
        tokens, skip: score that many tokens after skipping so many; all by default.
        score_base: also score each chunk under the bare base with the same window.
        by_token: also say of each token, in `Scores.chunks`, what it came to.
        recipe, seed, overrides: as for `Base.session`.

    Raises:
        InvalidText: a number below 0.
    """
    session = base.session(recipe, seed=seed, **overrides)
    ids = part_of(base.encode(text), tokens, skip)
    scores = Scores.of(base, ids)
    try:
        for event in scoring(session, ids, score_base=score_base):
            scores.take(event)
            if by_token and isinstance(event, ChunkScored):
                scores.take_tokens(session.study)
    finally:
        session.discard()
    return scores
