"""How likely a continuation is here: nothing is appended, nothing is learned from it.

For choices that are weighed against each other, and candidates that are ranked. Each token is judged as if it
stood in the text, its chunk's window and all; only learning does not go on.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from templora.detokenizer import continuing
from templora.errors import InvalidText
from templora.memory import fits_in_memory
from templora.session import Session


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Of one continuation.

    tokens: its ids. values: log of each one's probability after all before it, in nats. is_greedy: whether
    greedy decoding would write just these.
    """

    tokens: list[int]
    values: list[float]
    is_greedy: bool

    @property
    def total(self) -> float:
        """Log of the probability of all of it, in nats."""
        return math.fsum(self.values)


def logprobs(
    session: Session, continuations: Sequence[str | Sequence[int]], *, base: bool = False
) -> list[Logprobs]:
    """Of each continuation after the session's text, which is learned first as far as its chunks are full.

    The session goes on afterwards as if it had not been asked.

    Args:
        continuations: texts, or token ids. base: under the bare base instead.

    Raises:
        InvalidText: one is empty or has a token that the base has not, or there is nothing before it.
    """
    for _ in session.learning():
        pass
    before = session.ids or session.base.prefix_ids
    if not before:
        raise InvalidText("nothing stands before it and this base has no start token; read some text first")
    found = list[Logprobs]()
    for continuation in continuations:
        tokens = [*map(int, _ids(session, continuation))]
        session.base.check(tokens)
        if not tokens:
            raise InvalidText("a continuation is empty; give at least one token")
        span, stop = session.plan.span(session.chunk), len(before) + len(tokens)
        looking = session.passes.looking(before, span, stop, bare=base)
        with session.alone, fits_in_memory(session.plan), looking:
            found.append(_after(session, before, tokens, bare=base))
    return found


def _ids(session: Session, continuation: str | Sequence[int]) -> Sequence[int]:
    if isinstance(continuation, str):
        return continuing(session.base, session.ids, session.text, continuation)
    return continuation


def _after(session: Session, before: Sequence[int], tokens: Sequence[int], *, bare: bool) -> Logprobs:
    whole, values, greedy, chunk = [*before, *tokens], list[float](), True, session.chunk
    while len(values) < len(tokens):
        span = session.plan.span(chunk, len(whole))
        left = span.stop - len(before) - len(values)
        nll, likeliest = session.passes.judged(whole, span, left, bare=bare)
        values += (-nll).tolist()
        greedy = greedy and bool(likeliest.all())
        chunk += 1
    return Logprobs([*tokens], values, greedy)
