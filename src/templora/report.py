"""Events to what a person or a program reads: a live screen, plain text, JSON lines.

Each sink takes one event at a time; none of them knows where events come from.
"""

import json
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import IO, Protocol, Self

import psutil
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from templora.events import ChunkScored, Event, Token, Warned
from templora.metrics import Tally, count


class Sink(AbstractContextManager["Sink"], Protocol):
    """Takes events; a context manager, so that a screen or a file is always left in order."""

    def take(self, event: Event) -> None:
        """Show or store one event."""
        ...

    def echo(self, text: str) -> None:
        """Show the given text that the written one continues."""
        ...


class Status:
    """What the status line says, kept up to date by events. goal: tokens to write, None if unknown.

    base, adapted: what was scored; once something is written, of that alone, as the last line of all has it.
    """

    def __init__(self, goal: int | None, window: int) -> None:
        self.goal, self.window = goal, window
        self.tokens, self.chunk = 0, 0
        self.base, self.adapted = Tally(), Tally()
        self._started: float | None = None
        self._process = psutil.Process()

    def take(self, event: Event) -> None:
        """Note what the event tells."""
        if isinstance(event, Token):
            if self._started is None:
                # The clock starts at the first token, so that loading and prefill do not bend the rate.
                self._started = time.perf_counter()
                self.base, self.adapted = Tally(), Tally()
            self.tokens += 1
        elif isinstance(event, ChunkScored):
            self.chunk = event.chunk + 1
            count(event, self.base, self.adapted)

    def line(self, width: int) -> str:
        """Perplexity, tokens, rate, ETA, chunk, window, resident memory: as many as there is room for."""
        parts = [_perplexities(self.base, self.adapted)] if self.adapted.tokens else []
        parts.append(f"{self.tokens:,}" + (f"/{self.goal:,}" if self.goal else "") + " tokens")
        elapsed = time.perf_counter() - self._started if self._started else 0.0
        if elapsed > 0 and self.tokens > 1:
            rate = (self.tokens - 1) / elapsed
            parts.append(f"{rate:.1f} tokens/s")
            if self.goal:
                parts.append(f"ETA {_clock((self.goal - self.tokens) / rate)}")
        parts += [f"chunk {self.chunk}", f"window {self.window}"]
        parts.append(f"{self._process.memory_info().rss / 2**20:,.0f} MB")
        return _fitted(parts, width)


class Screen:
    """Text that streams word by word above a live status line, on a terminal."""

    def __init__(self, status: Status, console: Console | None = None) -> None:
        self._status = status
        self._console = console or Console(highlight=False)
        self._line = ""
        self._live = Live(console=self._console, auto_refresh=False, transient=True)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()
        if self._line:
            self._console.print(Text(self._line))

    def take(self, event: Event) -> None:
        """Stream a token; redraw the status at each event."""
        self._status.take(event)
        if isinstance(event, Token):
            self._stream(event.text)
        elif isinstance(event, Warned):
            self._live.console.print(Text(f"warning: {event.message}", style="yellow"))
        status = Text(self._status.line(self._console.width), style="dim", overflow="ellipsis", no_wrap=True)
        self._live.update(Group(Text(self._line), Text(), status), refresh=True)

    def echo(self, text: str) -> None:
        """Stream given text as if it were written."""
        self._stream(text)

    def _stream(self, piece: str) -> None:
        """Lines that are full move up into the scroll-back; the last one stays in the live part."""
        *full, self._line = (self._line + piece).split("\n")
        for line in full:
            self._live.console.print(Text(line))
        width = max(20, self._console.width)
        while len(self._line) > width:
            cut = self._line.rfind(" ", 0, width + 1)
            cut = cut if cut > 0 else width
            self._live.console.print(Text(self._line[:cut]))
            self._line = self._line[cut:].lstrip(" ")


class ScoreStatus:
    """A line that follows the scoring of one document, on stderr; nothing if that is not a terminal."""

    def __init__(self, document: str, goal: int) -> None:
        self._document, self._goal = document, goal
        self._started = time.perf_counter()
        console = Console(stderr=True, highlight=False)
        self._live = (
            Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
        )

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def passages(self, done: int, goal: int, base: Tally, adapted: Tally) -> None:
        """Passages done, and the perplexities of their translations so far."""
        self._show([f"{done:,}/{goal:,} passages"], base, adapted)

    def show(self, base: Tally, adapted: Tally) -> None:
        """Tokens, rate, ETA and the perplexities so far."""
        rate = max(1, adapted.tokens) / (time.perf_counter() - self._started)
        tokens, left = f"{adapted.tokens:,}/{self._goal:,} tokens", max(0, self._goal - adapted.tokens) / rate
        self._show([tokens, f"ETA {_clock(left)}", f"{rate:.0f} tokens/s"], base, adapted)

    def _show(self, parts: list[str], base: Tally, adapted: Tally) -> None:
        if self._live is None or not adapted.tokens:
            return
        line = _fitted([_perplexities(base, adapted), *parts, self._document], self._live.console.width)
        self._live.update(Text(line, style="dim", overflow="ellipsis", no_wrap=True), refresh=True)


class Plain:
    """Text alone, to a pipe or a file; warnings to stderr."""

    def __init__(self, out: IO[str] | None = None) -> None:
        self._out = out or sys.stdout

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._out.flush()

    def take(self, event: Event) -> None:
        """Print the text of a token at once."""
        if isinstance(event, Token):
            self._out.write(event.text)
            self._out.flush()
        else:
            _warn(event)

    def echo(self, text: str) -> None:
        """Print given text."""
        self._out.write(text)


class JsonLines(Plain):
    """One event a line, as JSON; given text is not an event."""

    def echo(self, text: str) -> None:
        """Nothing."""

    def take(self, event: Event) -> None:
        """Print the event at once."""
        self._out.write(json.dumps(event.as_dict(), ensure_ascii=False) + "\n")
        self._out.flush()


class Quiet(Plain):
    """Nothing but warnings."""

    def echo(self, text: str) -> None:
        """Nothing."""

    def take(self, event: Event) -> None:
        """Pass over all but warnings."""
        _warn(event)


def screen_or_plain(status: Status) -> Screen | Plain:
    """A live screen on a terminal, plain text into a pipe."""
    return Screen(status) if sys.stdout.isatty() and shutil.get_terminal_size().columns >= 20 else Plain()


def send(events: Iterable[Event], sinks: Iterable[Sink]) -> Iterator[Event]:
    """Pass events through to the sinks, in order, and on."""
    sinks = tuple(sinks)
    for event in events:
        for sink in sinks:
            sink.take(event)
        yield event


def _warn(event: Event) -> None:
    if isinstance(event, Warned):
        print(f"warning: {event.message}", file=sys.stderr)


def _perplexities(base: Tally, adapted: Tally) -> str:
    """What the adapter is worth; adapted must hold something."""
    now, before = adapted.perplexity, base.perplexity
    if now is None or before is None:
        return f"perplexity {now:.2f}"
    return f"perplexity base {before:.2f} → adapter {now:.2f} ({100 * (now / before - 1):+.1f} %)"


def _fitted(parts: Sequence[str], width: int) -> str:
    """As many of the first parts as a line has room for, and one at least."""
    line = parts[0]
    for part in parts[1:]:
        if len(line) + len(part) + 3 > width:
            break
        line += f" · {part}"
    return line


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
