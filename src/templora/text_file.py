"""The text in a file while it is written: what a kill or a full disk leaves is whole text, and goes on."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Self

from templora.errors import OutputError
from templora.events import Event, Token
from templora.lock import alone


class TextFile:
    """The text in a file, each token handed over as it comes. append: continue what is there, in its own ends
    of lines.

    A new one that got nothing is taken away again, and none ends inside a character.
    """

    def __init__(self, path: Path, *, append: bool = False) -> None:
        self.path, self._new = path, not append
        if path.suffix == ".xz":
            raise OutputError(f"{path} would hold plain text, which is not .xz; choose another --out")
        try:
            self._file = path.open("ab" if append else "xb", buffering=0)
        except FileExistsError as error:
            raise OutputError(
                f"{path} exists and is never overwritten; choose another --out, "
                f"or add --read {path} to continue it"
            ) from error
        except OSError as error:
            raise OutputError(f"cannot write to {path}: {error.strerror}; choose another --out") from error
        if not alone(self._file.fileno()):
            self._file.close()
            raise OutputError(f"another process is writing to {path}; let it end, or choose another --out")
        self._line_end = _line_end(path) if append else "\n"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            os.fsync(self._file.fileno())
            if self._new and not self._size:
                self.path.unlink()
        except OSError as failure:
            if error is None:
                raise self._full(failure) from failure
        finally:
            with suppress(OSError):  # closing flushes once more; the failure has been reported already
                self._file.close()

    def echo(self, text: str) -> None:
        """Append, for the operating system to keep.

        Raises:
            OutputError: the disk is full or gone; what was written before is safe.
        """
        if self._line_end != "\n":
            text = text.replace("\r\n", "\n").replace("\n", self._line_end)
        data, done = text.encode(), 0
        try:
            while done < len(data):
                done += self._file.write(data[done:])
        except OSError as error:
            if half := done - len(data[:done].decode(errors="ignore").encode()):
                with suppress(OSError):
                    self._file.truncate(self._size - half)
            raise self._full(error) from error

    def take(self, event: Event) -> None:
        """Append the text of a token."""
        if isinstance(event, Token):
            self.echo(event.text)

    @property
    def _size(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def _full(self, error: OSError) -> OutputError:
        left = f", then continue the text so far with --read {self.path}" if self._size else ""
        return OutputError(f"cannot write to {self.path}: {error.strerror}; free some space{left}")


def _line_end(path: Path) -> str:
    """How the first line of a file ends."""
    try:
        with path.open("rb") as file:
            return "\r\n" if file.readline(1 << 16).endswith(b"\r\n") else "\n"
    except OSError as error:
        raise OutputError(f"cannot read {path}: {error.strerror}; choose another --out") from error
