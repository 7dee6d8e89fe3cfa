"""One process at a time on one session: a lock file that says who has it.

The operating system frees the lock of a process that has died, so a stale file hinders nobody on the same
machine. A file left by another machine is not trusted to be stale: it may be a shared folder.
"""

import json
import os
import socket
from pathlib import Path
from typing import Any, cast

from templora.errors import OutputError, SessionLocked

try:
    import fcntl
except ImportError:  # Windows has no flock; there the process number decides
    fcntl = None


class Lock:
    """Held from construction to `release`.

    Raises:
        SessionLocked: someone else has it; the message says who.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = -1
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            self._take()
        except BaseException as error:
            if self._file >= 0:
                os.close(self._file)
                self._file = -1
            if not isinstance(error, OSError):
                raise
            raise OutputError(
                f"cannot write in {path.parent}: {error.strerror}; free some space or make it writable, or "
                "copy the folder to another place"
            ) from error

    def release(self) -> None:
        """Let others in."""
        if self._file >= 0:
            os.ftruncate(self._file, 0)
            os.close(self._file)
            self._file = -1

    def __del__(self) -> None:
        if getattr(self, "_file", -1) >= 0:
            os.close(self._file)

    def _take(self) -> None:
        owner = _owner(self._file)
        here = socket.gethostname()
        if not self._free(owner, here):
            raise SessionLocked(
                f"{self.path.parent} is open in process {owner.get('pid', '?')} on {owner.get('host', here)};"
                " close it there first"
            )
        if owner.get("host", here) != here:
            raise SessionLocked(
                f"{self.path.parent} was opened by process {owner.get('pid')} on {owner['host']} and not "
                f"closed; if that has ended, remove {self.path}"
            )
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, json.dumps({"pid": os.getpid(), "host": here}).encode(), 0)

    def _free(self, owner: dict[str, Any], here: str) -> bool:
        if fcntl is not None:
            return alone(self._file)
        return owner.get("host") != here or not _alive(owner.get("pid"))


def alone(file: int) -> bool:
    """Take a file for this process until it is closed; False if another has it. True where none can tell."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _owner(file: int) -> dict[str, Any]:
    """Who wrote the file last; nothing if it is empty or unreadable."""
    try:
        found: Any = json.loads(os.pread(file, 4096, 0) or b"{}")
    except ValueError:
        return {}
    return cast(dict[str, Any], found) if isinstance(found, dict) else {}


def _alive(pid: Any) -> bool:
    import psutil

    return isinstance(pid, int) and psutil.pid_exists(pid)
