"""A text as it came about: which tokens, whose they are, what was learned. Integers and strings only.

A history is what the lines of a journal add up to. Whatever a session computes is a function of it, so
`digest` names a state: two histories with the same digest at a chunk lead to the same adapter there.
"""

import hashlib
import io
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile
from typing import Any

from templora.window import FIRST_TARGET, Plan

# Whose a token is. FED: the model's own once, and given again after an edit before it.
GIVEN, OWN, FED = 0, 1, 2


@dataclass(frozen=True, slots=True)
class Learned:
    """A chunk that was scored and learned. base: whether the base had to be scored.

    Sums of NLL are in nats over `tokens`; base_nll is None where the base was not scored.
    """

    base: bool
    tokens: int
    adapted_nll: float
    base_nll: float | None
    digest: bytes


@dataclass(frozen=True, slots=True)
class Mark:
    """Something that happened between two tokens, after `position` tokens.

    kind "look": a token was drawn and not kept. "forget": caches were dropped. "seed": sampling goes on
    from seed `value`. "wish": full chunks up to here are to be scored under the base if `value`.
    """

    position: int
    kind: str
    value: int = 0


class History:
    """The tokens of one text and all that was done with them. `apply` takes a line of the journal.

    ids, kinds: the tokens and whose they are. ends: where each ends in the text, in characters. draws: of
    the sampler, after each token.
    """

    def __init__(self, plan: Plan, seed: int) -> None:
        self.plan, self.first_seed = plan, seed
        self.ids: list[int] = []
        self.kinds = bytearray()
        self.ends, self.draws = array("q"), array("q")
        self.text = io.StringIO()
        self.learned: list[Learned] = []
        self.marks: list[Mark] = []
        self.drawn = 0
        self._texts: list[tuple[int, bytes]] = []  # given ones: where each ends, and its digest

    def apply(self, line: dict[str, Any]) -> None:
        """Take in one line of a journal; lines that change no text pass by."""
        if (op := line["op"]) == "own":  # nearly every line
            self.own(line["id"], line["text"], line["draws"])
            return
        match op:
            case "given":
                self.give(line["ids"], line["text"], line["sizes"])
                self._texts.append((len(self.ids), _digest(line["text"])))
            case "chunk":
                self.learn(line["base"], line["tokens"], line["adapted_nll"], line["base_nll"])
            case "look":
                self.mark("look")
                self.drawn = line["draws"]
            case "mark":
                self.mark(line["kind"], line["value"])
            case "cut":
                self.cut(line["tokens"])
            case "edit":
                seed = self.seed
                self.cut(line["tokens"])
                for kind, ids, text, sizes in line["runs"]:
                    self.give(ids, text, sizes, kind)
                if self.seed != seed:  # it stood after the place that was changed
                    self.mark("seed", seed)
            case _:
                pass

    def give(self, ids: Sequence[int], text: str, sizes: Sequence[int], kind: int = GIVEN) -> None:
        """Append tokens. sizes: how many characters of `text` each of them completes."""
        end = self.ends[-1] if self.ends else self.text.tell()
        for size in sizes:
            end += size
            self.ends.append(end)
        if not ids and self.ends:  # text that makes no token, such as spaces: the last one ends with it
            self.ends[-1] += len(text)
        self.ids.extend(ids)
        self.kinds.extend(bytes((kind,)) * len(ids))
        self.draws.extend([self.drawn] * len(ids))
        self.text.write(text)

    def own(self, token: int, text: str, draws: int) -> None:
        """Append a token that the model wrote, the sampler having drawn so often."""
        self.ids.append(token)
        self.kinds.append(OWN)
        self.ends.append((self.ends[-1] if self.ends else self.text.tell()) + len(text))
        self.draws.append(draws)
        self.text.write(text)
        self.drawn = draws

    def mark(self, kind: str, value: int = 0) -> None:
        """Note something at this moment."""
        self.marks.append(Mark(len(self.ids), kind, value))
        if kind == "seed":
            self.drawn = 0

    def learn(self, base: bool, tokens: int, adapted_nll: float, base_nll: float | None) -> None:
        """The next chunk was scored and learned."""
        span = self.plan.span(len(self.learned))
        digest = self.digest(len(self.learned), span.stop, base)
        self.learned.append(Learned(base, tokens, adapted_nll, base_nll, digest))

    def cut(self, tokens: int) -> None:
        """Forget everything after that many tokens."""
        while self.learned and self.plan.span(len(self.learned) - 1).stop > tokens:
            self.learned.pop()
        end = self.ends[tokens - 1] if tokens else 0
        self.text.truncate(end)
        self.text.seek(end)
        for column in (self.ids, self.kinds, self.ends, self.draws):
            del column[tokens:]
        self.marks = [mark for mark in self.marks if mark.position < tokens]
        self._texts = [text for text in self._texts if text[0] <= tokens]
        self.drawn = self.draws[-1] if tokens else 0

    def was_given(self, text: str, after: int | None = None) -> bool:
        """Whether that text was given, whole and by itself, and is still there.

        after: only if at most so many were given before it, or if it is the end of all.
        """
        wanted, end = _digest(text), len(self.ids)
        places = enumerate(self._texts)
        return any(
            digest == wanted and (after is None or place <= after or stop == end)
            for place, (stop, digest) in places
        )

    def after_given(self, text: str) -> str:
        """What follows that text, where it begins at a place at which something was given; else nothing."""
        kinds, held = self.kinds, self.text.getvalue()
        begun = (n for n in range(1, len(kinds)) if kinds[n] == GIVEN != kinds[n - 1])
        starts = {0, *map(self.end, begun), *(self.end(stop) for stop, _ in self._texts)}
        found = next((start for start in sorted(starts, reverse=True) if held.startswith(text, start)), None)
        return "" if found is None else held[found + len(text) :]

    @property
    def seed(self) -> int:
        """The seed that sampling draws from now."""
        return next((mark.value for mark in reversed(self.marks) if mark.kind == "seed"), self.first_seed)

    def marks_at(self, position: int) -> list[Mark]:
        """What happened after that many tokens."""
        first = bisect_left(self.marks, position, key=lambda mark: mark.position)
        return list(takewhile(lambda mark: mark.position == position, self.marks[first:]))

    def wish(self, stop: int) -> bool | None:
        """Whether a chunk that was full when it was asked for is to be scored under the base."""
        wishes = (m for m in self.marks if m.kind == "wish" and m.position >= stop)
        return next((bool(mark.value) for mark in wishes), None)

    @property
    def own_from(self) -> int:
        """Where in the text the end begins that the model wrote, in characters."""
        given = max(self.kinds.rfind(GIVEN), self.kinds.rfind(FED)) + 1
        return self.end(given) if given else 0

    def own_in(self, start: int, stop: int) -> int:
        """How many of those tokens are the model's own."""
        return stop - start - self.kinds.count(GIVEN, start, stop)

    def digest(self, chunk: int, stop: int, base: bool | None = None) -> bytes:
        """Names the state after `chunk` learned chunks and the tokens up to `stop`."""
        before = self.learned[chunk - 1].digest if chunk else b""
        start = self.plan.span(chunk).start if chunk else 0
        made = hashlib.sha256(before)
        made.update(array("q", self.ids[start:stop]).tobytes() + bytes(self.kinds[start:stop]))
        marks = (m for m in self.marks if start <= m.position <= stop and m.kind in ("look", "forget"))
        # What happens at the end of a full chunk belongs to the next one.
        seen = [f"{m.position}{m.kind}" for m in marks if base is None or m.position < stop]
        made.update(f"{seen}{base}".encode())
        return made.digest()

    @property
    def pieces(self) -> int:
        """How many chunks there are, an unfinished one counting as one."""
        return -(-max(0, len(self.ids) - FIRST_TARGET) // self.plan.chunk)

    def before(self, character: int, least: int) -> int:
        """The most tokens, but at least `least`, whose text ends at or before that character.

        A token that only begins a character goes with what completes it.
        """
        tokens = bisect_right(self.ends, character)
        while tokens > least and self.end(tokens) == self.end(tokens - 1):
            tokens -= 1
        return max(tokens, least)

    def after(self, character: int, least: int) -> int:
        """The fewest tokens, but at least `least`, whose text reaches that character."""
        return max(least, bisect_left(self.ends, character) + 1 if character > self.end(least) else least)

    def end(self, tokens: int) -> int:
        """Where the text of that many tokens ends, in characters."""
        return self.ends[tokens - 1] if tokens else 0

    def runs(self, start: int) -> list[tuple[int, list[int], str, list[int]]]:
        """The tokens from `start` on, as what an edit line holds: kind, ids, text, sizes of each run."""
        made: list[tuple[int, list[int], str, list[int]]] = []
        text, kinds = self.text.getvalue(), [GIVEN if k == GIVEN else FED for k in self.kinds]
        while start < len(self.ids):
            stop = start
            while stop < len(self.ids) and kinds[stop] == kinds[start]:
                stop += 1
            bounds = [self.end(start), *self.ends[start:stop]]
            sizes = [after - before for before, after in pairwise(bounds)]
            made.append((kinds[start], self.ids[start:stop], text[bounds[0] : bounds[-1]], sizes))
            start = stop
        return made


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def replayed(lines: Sequence[dict[str, Any]], plan: Plan, seed: int) -> tuple[History, list[int]]:
    """The history at the end of a journal, and what could be redone: numbers of lines to go back to.

    A line "at" says that what follows continues from an earlier line, so a journal is a tree; the way from
    its root to its last line is the history.
    """
    redoable: list[int] = []
    jumps: list[int] = []
    for number, line in enumerate(lines, 1):
        op = line["op"]
        if op == "own":  # nearly every line
            redoable.clear()
        elif op == "cut" and line.get("undo"):
            redoable.append(number - 1)
        elif op == "at":
            jumps.append(number)
            redoable = redoable[:-1] if line["redo"] else []
        elif op != "note":
            redoable.clear()
    way: list[tuple[int, int]] = []
    number = len(lines)
    while number:
        jump = next((jump for jump in reversed(jumps) if jump <= number), 0)
        way.append((jump, number))
        number = lines[jump - 1]["line"] if jump else 0
    history = History(plan, seed)
    for start, stop in reversed(way):
        for line in lines[start:stop]:
            history.apply(line)
    return history, redoable
