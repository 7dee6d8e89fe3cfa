"""Events to what a person or a program reads: a live screen, plain text, JSON lines, a file.

Each sink takes one event at a time; none of them knows where events come from.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Protocol, Self

import psutil
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from templora.errors import OutputError
from templora.events import ChunkScored, Event, Token, Warned
from templora.metrics import Tally, perplexity


class Sink(AbstractContextManager["Sink"], Protocol):
    """Takes events; a context manager, so that a screen or a file is always left in order."""

    def take(self, event: Event) -> None:
        """Show or store one event."""
        ...

    def echo(self, text: str) -> None:
        """Show the given text that the written one continues."""
        ...


class Status:
    """What the status line says, kept up to date by events. goal: tokens to write, None if unknown."""

    def __init__(self, goal: int | None, window: int) -> None:
        self.goal, self.window = goal, window
        self.tokens, self.chunk = 0, 0
        self.base: float | None = None
        self.adapted: float | None = None
        self._started: float | None = None
        self._process = psutil.Process()

    def take(self, event: Event) -> None:
        """Note what the event tells."""
        if isinstance(event, Token):
            self.tokens += 1
            # The clock starts at the first token, so that loading and prefill do not bend the rate.
            self._started = self._started or time.perf_counter()
        elif isinstance(event, ChunkScored):
            self.chunk = event.chunk + 1
            self.adapted = perplexity(event.adapted_nll, event.tokens)
            self.base = None if event.base_nll is None else perplexity(event.base_nll, event.tokens)

    def line(self) -> str:
        """Tokens, rate, ETA, window, chunk, perplexity of the last chunk, resident memory."""
        parts = [f"{self.tokens:,}" + (f"/{self.goal:,}" if self.goal else "") + " tokens"]
        elapsed = time.perf_counter() - self._started if self._started else 0.0
        if elapsed > 0 and self.tokens > 1:
            rate = (self.tokens - 1) / elapsed
            parts.append(f"{rate:.1f} tokens/s")
            if self.goal:
                parts.append(f"ETA {_clock((self.goal - self.tokens) / rate)}")
        parts += [f"window {self.window}", f"chunk {self.chunk}"]
        if self.adapted is not None:
            before = "" if self.base is None else f"base {self.base:.2f} → "
            parts.append(f"perplexity {before}adapter {self.adapted:.2f}")
        parts.append(f"{self._process.memory_info().rss / 2**20:,.0f} MB")
        return " · ".join(parts)


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
        status = Text(self._status.line(), style="dim", overflow="ellipsis", no_wrap=True)
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
        if self._live is None or not adapted.tokens:
            return
        before = f"base {base.perplexity:.2f} → " if base.perplexity else ""
        parts = [self._document, f"{done:,}/{goal:,} passages"]
        line = " · ".join([*parts, f"perplexity {before}adapter {adapted.perplexity:.2f}"])
        self._live.update(Text(line, style="dim", overflow="ellipsis", no_wrap=True), refresh=True)

    def show(self, base: Tally, adapted: Tally) -> None:
        """Tokens, rate, ETA and the perplexities so far."""
        if self._live is None or not adapted.tokens:
            return
        rate = adapted.tokens / (time.perf_counter() - self._started)
        parts = [
            self._document,
            f"{adapted.tokens:,}/{self._goal:,} tokens",
            f"{rate:.0f} tokens/s",
            f"ETA {_clock((self._goal - adapted.tokens) / rate)}",
            "perplexity" + (f" base {base.perplexity:.2f} →" if base.perplexity else ""),
        ]
        line = f"{' · '.join(parts)} adapter {adapted.perplexity:.2f}"
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


class TextFile:
    """The text in a file, each token flushed as it comes. append: continue what is there."""

    def __init__(self, path: Path, *, append: bool = False) -> None:
        self.path = path
        if path.suffix == ".xz":
            raise OutputError(f"{path} would hold plain text, which is not .xz; choose another --out")
        try:
            self._file = path.open("a" if append else "x", encoding="utf-8", newline="")
        except FileExistsError as error:
            raise OutputError(
                f"{path} exists and is never overwritten; choose another --out, "
                f"or add --read {path} to continue it"
            ) from error
        except OSError as error:
            raise OutputError(f"cannot write to {path}: {error.strerror}; choose another --out") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as failure:
            if error is None:
                raise self._full(failure) from failure
        finally:
            _close_quietly(self._file)

    def echo(self, text: str) -> None:
        """Append and flush.

        Raises:
            OutputError: the disk is full or gone; what was written before is safe.
        """
        try:
            self._file.write(text)
            self._file.flush()
        except OSError as error:
            raise self._full(error) from error

    def take(self, event: Event) -> None:
        """Append the text of a token."""
        if isinstance(event, Token):
            self.echo(event.text)

    def _full(self, error: OSError) -> OutputError:
        return OutputError(
            f"cannot write to {self.path}: {error.strerror}; free some space, then continue the text so "
            f"far with --read {self.path}"
        )


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


def _close_quietly(file: IO[str]) -> None:
    # Closing flushes once more; the failure has been reported already.
    with suppress(OSError):
        file.close()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
