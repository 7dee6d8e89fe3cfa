"""Whether to learn a chunk, which updates to try out, and when to go back: a policy over plain numbers.

It sees NLLs and token ids and answers; it knows nothing of tensors, and it never changes anything itself.
Four ways to go wrong, four rules:

1. A chunk that is not like its text (noise) is left out, unless it goes on so long that it is the text.
2. A chunk that repeats itself is left out: learned, a loop becomes permanent (arXiv 2206.02369). Where the
   model wrote it, the adapter is pulled back as well: what it has learned is what loops, and an adapter that
   learns nothing any more would go on looping for ever.
3. The model's own text is learned only while the adapter stays close to the base; past that the adapter is
   pulled back. Own tokens are drawn from the adapter, so base NLL minus adapted NLL on them estimates
   KL(adapter || base); on the few tokens of one line that is chance, so short chunks are judged together.
4. An adapter that does worse than the base on text it had not learned goes back to its last good version. A
   few strange sentences are enough for that, and no reason to forget a book: it goes back to the base only
   where that version is clearly worse by now, or does no better either.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice, tee
from typing import Any

HISTORY = 32  # chunks that say what is usual for this text
ENOUGH = 8  # of them, before anything counts as unusual
UNUSUAL = 4.0  # standard deviations above the usual NLL
LEAST_SPREAD = 0.25  # nats per token: a text calmer than this has no outliers below one nat
LONGEST_NOISE = 16_384  # tokens: what goes on for longer is not noise but the text
LOOK_BACK = 256  # tokens in which repetition is sought
LEAST_DISTINCT = 0.5  # share of 4-grams that differ; prose has above 0.9, tables and code less
# Own tokens are judged more strictly: a phrase that comes back on every page is how a loop begins.
OWN_LOOK_BACK, OWN_LEAST_DISTINCT = 1024, 0.8
LOOP_SHRINK = 0.5  # what is left of the adapter after a chunk of its own that repeats itself
OWN_DRIFT = 0.2  # nats per token that own text may move the adapter from the base
OWN_ENOUGH = 64  # own tokens, before how far they have moved it means anything
LARGEST_LOSS = 30.0  # nats, added up over chunks, that the adapter may lose against the base
CLEARLY = 0.5  # nats per token of a chunk: what the last good version loses there if it is given up at once
RECOVERY = 1.05  # a learning rate that was lowered comes back by this factor at each chunk that gains
CHECK_FIRST, CHECK_EVERY = 8, 16  # updates that are checked: the first ones, then every so many


@dataclass(frozen=True, slots=True)
class Verdict:
    """What to do with a chunk.

    reason: why it should not be learned; None if it should. keep: by which factor the adapter must shrink.
    """

    reason: str | None = None
    keep: float = 1.0


@dataclass(slots=True)
class Guard:
    """The watch over one text's adapter.

    usual: adapted NLL per token of chunks that were learned. lost: nats that the adapter has lost against the
    base and not made good since (a CUSUM: it never falls below 0). skipped: tokens left out as noise in a
    row. own: the last tokens of chunks that the model wrote. allowed: how far from the base own text may
    move the adapter; what given text has taught it widens this. drifted: nats and tokens of own chunks that
    are still too few to be judged. rate: what learning rates are multiplied by. went_back: and has not been
    good since.
    """

    usual: deque[float] = field(default_factory=lambda: deque[float](maxlen=HISTORY))
    lost: float = 0.0
    skipped: int = 0
    own: deque[int] = field(default_factory=lambda: deque[int](maxlen=OWN_LOOK_BACK))
    allowed: float = OWN_DRIFT
    drifted: tuple[float, int] = (0.0, 0)
    rate: float = 1.0
    went_back: bool = False

    def judge(
        self, ids: Sequence[int], tokens: int, adapted: float, base: float | None, written: int
    ) -> Verdict:
        """Whether this chunk should be learned.

        Args:
            ids: the last LOOK_BACK tokens of the text, or the whole chunk if that is more. tokens: in the
                chunk. adapted, base: NLL per token.
            written: how many of the chunk's tokens the model wrote itself.
        """
        is_own = 2 * written > tokens
        if is_own:
            self.own.extend(ids[-tokens:])
            if distinct_4(self.own) < OWN_LEAST_DISTINCT:
                self.drifted = 0.0, 0  # they are of an adapter that is no more
                return Verdict("repetition", LOOP_SHRINK)
        if distinct_4(ids) < LEAST_DISTINCT:
            return Verdict("repetition")
        if self._is_noise(adapted):
            if self.skipped < LONGEST_NOISE or not adapted < float("inf"):
                self.skipped += tokens
                return Verdict("noise")
            self.usual.clear()  # the text has become another one, and says anew what is usual
        self.skipped = 0
        self.usual.append(adapted)
        if base is None:
            return Verdict()
        if is_own:
            return self._drift(tokens, base - adapted)
        self.allowed = max(self.allowed, base - adapted + OWN_DRIFT)
        return Verdict()

    def _drift(self, tokens: int, gain: float) -> Verdict:
        nats, counted = self.drifted
        mean = (nats + gain * tokens) / (counted + tokens) if counted else gain
        counted += tokens
        self.drifted = (mean * counted, counted) if counted < OWN_ENOUGH else (0.0, 0)
        if counted < OWN_ENOUGH or mean <= self.allowed:
            return Verdict()
        # What a LoRA update adds grows with its scale, and KL with the square of that.
        return Verdict("drift", (self.allowed / mean) ** 0.5)

    def must_go_back(self, adapted: float, base: float) -> bool:
        """Note a chunk's NLL under both, in nats; whether the adapter has done enough harm."""
        self.lost += adapted - base
        if not self.lost <= LARGEST_LOSS:  # a loss that is not a number is a loss, too
            self.lost, self.drifted = 0.0, (0.0, 0)
            self.rate /= 2
            return True
        self.lost = max(0.0, self.lost)
        if adapted < base:
            self.rate = min(1.0, self.rate * RECOVERY)
        return False

    def must_give_up(self, good: float, base: float, tokens: int) -> bool:
        """Having gone back: whether even that version is none for this text, by a chunk's NLL under both."""
        hopeless = self.went_back or not good <= base + CLEARLY * tokens
        self.went_back = not hopeless
        return hopeless

    @property
    def is_good(self) -> bool:
        """Whether the adapter is worth keeping as the version to go back to."""
        return self.lost == 0

    def checks(self, update: int) -> bool:
        """Whether this update (from 0) should be tried on learned text before it is kept."""
        return update < CHECK_FIRST or update % CHECK_EVERY == 0

    def state(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return {
            "usual": list(self.usual),
            "lost": self.lost,
            "skipped": self.skipped,
            "own": list(self.own),
            "allowed": self.allowed,
            "drifted": list(self.drifted),
            "rate": self.rate,
            "went_back": self.went_back,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from what `state` returned."""
        self.usual = deque(state["usual"], maxlen=HISTORY)
        self.own = deque(state.get("own", ()), maxlen=OWN_LOOK_BACK)  # sessions of old do not have it
        self.lost, self.skipped = state["lost"], state["skipped"]
        self.allowed, self.rate = state["allowed"], state["rate"]
        self.went_back = state.get("went_back", False)
        nats, tokens = state.get("drifted", (0.0, 0))
        self.drifted = float(nats), int(tokens)

    def _is_noise(self, adapted: float) -> bool:
        if not adapted < float("inf"):
            return True
        if len(self.usual) < ENOUGH:
            return False
        mean = sum(self.usual) / len(self.usual)
        spread = (sum((x - mean) ** 2 for x in self.usual) / len(self.usual)) ** 0.5
        return adapted > mean + UNUSUAL * max(spread, LEAST_SPREAD)


def distinct_4(ids: Iterable[int]) -> float:
    """Share of 4-grams that differ, 1.0 for a text without repetition or shorter than four tokens."""
    grams = list(zip(*(islice(run, start, None) for start, run in enumerate(tee(ids, 4))), strict=False))
    return len(set(grams)) / len(grams) if grams else 1.0
