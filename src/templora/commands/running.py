"""How a command runs: what it says aside, errors in one line, Ctrl-C between two tokens."""

import os
import signal
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import typer

from templora.errors import OutputError, TemploraError

INTERRUPTED = 130  # the shell's code for a program that was stopped with Ctrl-C


def say(line: str) -> None:
    """A line to stderr, where it does not mix with the text."""
    typer.echo(line, err=True)


def compared(base: float, adapted: float) -> str:
    """Two perplexities and the change from one to the other."""
    return f"base {base:.2f}, adapter {adapted:.2f} ({100 * (adapted / base - 1):+.1f} %)"


def make_folder(path: Path, option: str) -> None:
    """See that there is a folder, as the user asked with that option.

    Raises:
        OutputError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make {path}: {error.strerror}; choose another {option}") from error


@contextmanager
def one_line_errors() -> Generator[None]:
    """Cause and cure in one line, exit code 2."""
    try:
        yield
    except TemploraError as error:
        say(f"error: {error}")
        raise typer.Exit(2) from error
    except BrokenPipeError:
        # The reader of our output has gone; Python would complain again while it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(1) from None
    except UnicodeEncodeError as error:
        say(f"error: {error.encoding} has no {error.object[error.start]!a}; set PYTHONIOENCODING=utf-8")
        raise typer.Exit(2) from error
    except OSError as error:  # where nobody foresaw it: a name that is too long, a folder with no entry
        what = error.filename or "what the output goes to"
        say(f"error: cannot use {what}: {error.strerror or error}; choose another")
        raise typer.Exit(2) from error


@contextmanager
def interruptible() -> Generator[list[int]]:
    """The signals that asked to stop, so far: true as soon as there is one. The second one insists."""
    asked: list[int] = []

    def ask(number: int, _: object) -> None:
        asked.append(number)
        signal.signal(number, before[signal.Signals(number)])

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        signal.signal(number, ask)
    try:
        yield asked
    finally:
        for number in numbers:
            signal.signal(number, before[number])
