"""Which tokens are seen while which are written, scored or learned: integers only, no tensors.

The laws that its tests hold: the chunks of a text tile it, each token but the first a target exactly
once; nothing older than the window is visible; window + chunk never exceeds the trained positions.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from templora.errors import WindowTooLarge

# The first token of a text has nothing before it, so it is context only, never a target.
FIRST_TARGET = 1
LEAST_ROOM = 2048  # positions: as cheap as any, and small models are trained for no more


@dataclass(frozen=True, slots=True)
class Span:
    """One chunk of a text, as half-open ranges of token indices.

    The chunk is [start, stop). [visible, start) is the window it is written or scored in.
    """

    chunk: int
    visible: int
    start: int
    stop: int

    @property
    def tokens(self) -> int:
        """Targets in this chunk."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Plan:
    """Sizes in tokens: window W, chunk Δ, context L_T; positions: what the base was trained for.

    positions None means that the base has no limit. sinks: tokens at the beginning of the text that stay
    visible (arXiv 2309.17453).
    """

    window: int
    chunk: int
    context: int
    positions: int | None = None
    sinks: int = 0

    def __post_init__(self) -> None:
        for name in ("window", "chunk", "context"):
            if getattr(self, name) < 1:
                raise WindowTooLarge(f"{name} must be at least 1 token, not {getattr(self, name)}")
        if self.positions is None:
            return
        for name in ("window", "context"):
            size = getattr(self, name)
            if self.sinks + size + self.chunk > self.positions:
                raise WindowTooLarge(self._too_large(name, size))

    def _too_large(self, name: str, size: int) -> str:
        sizes = f"{name} {size} + chunk {self.chunk}" + (f" + sinks {self.sinks}" if self.sinks else "")
        cause = f"{sizes} exceed the {self.positions} positions of this base"
        assert self.positions is not None
        if self.positions - self.sinks < 2:
            return f"{cause}; lower the sinks to {max(0, self.positions - 2)} or less"
        largest = self.positions - self.chunk - self.sinks
        if largest < 1:
            return f"{cause}; lower the chunk to {(self.positions - self.sinks) // 2} or less"
        return f"{cause}; the largest {name} is {largest}"

    @property
    def needed(self) -> int:
        """Positions that one chunk takes with all that it sees."""
        return self.sinks + self.window + self.chunk

    @property
    def room(self) -> int:
        """Positions that keys which stay may take before the window moves to the front again.

        Not all that the base has: buffers of a hundred thousand would fill a GPU, for nothing.
        """
        needed = self.needed
        return max(needed, min(self.positions or 2 * needed, max(4 * needed, LEAST_ROOM)))

    def span(self, chunk: int, tokens: int | None = None) -> Span:
        """The chunk of that number, as far as a text of so many tokens goes; None: full-sized."""
        start = FIRST_TARGET + chunk * self.chunk
        stop = start + self.chunk
        return Span(chunk, max(0, start - self.window), start, stop if tokens is None else min(stop, tokens))

    def spans(self, tokens: int) -> Iterator[Span]:
        """The chunks of a text of that many tokens; the last one may be short."""
        chunk = 0
        while (span := self.span(chunk, tokens)).start < tokens:
            yield span
            chunk += 1


def fit(
    window: int,
    chunk: int,
    context: int,
    positions: int | None,
    fixed: frozenset[str] = frozenset(),
    sinks: int = 0,
) -> Plan:
    """A plan for this base: sizes that nobody fixed by hand shrink until they fit.

    fixed: the names among window, chunk and context that were asked for and so must not change.

    Raises:
        WindowTooLarge: the fixed sizes cannot fit; the message says what can.
    """
    if positions is not None:
        free = positions - sinks
        if "chunk" not in fixed:
            taken = max(
                [{"window": window, "context": context}[n] for n in fixed & {"window", "context"}],
                default=0,
            )
            room = free - taken if taken else free // 2
            chunk = min(chunk, room) if room > 0 else chunk
        if "window" not in fixed:
            window = max(1, min(window, free - chunk))
        if "context" not in fixed:
            context = max(1, min(context, free - chunk))
    if "context" not in fixed:
        context = min(context, window)
    return Plan(window, chunk, context, positions, sinks)
