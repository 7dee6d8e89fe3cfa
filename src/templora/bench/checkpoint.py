"""The document that is being scored, on disk: a run that is killed goes on at the chunk it had reached.

Torch is imported when there is something to store or restore: the command line must start without it.
"""

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, cast

from templora.errors import OutputError
from templora.header import software

if TYPE_CHECKING:
    from templora.session import Session
    from templora.tasks.score import Scores

EVERY = 20.0  # seconds between two checkpoints


def digest(ids: Sequence[int]) -> str:
    """Of what is scored of a text."""
    return hashlib.sha256(repr(list(ids)).encode()).hexdigest()


class Checkpoint:
    """One file beside the results; none where there are no results to go on from.

    It is used only by a run that asks to resume, and only for the same tokens, recipe, base, seed and
    version of the package.
    """

    def __init__(self, results: Path | None, *, resume: bool) -> None:
        self.path = None if results is None else results.with_name(f".{results.name}.checkpoint")
        self._resume = resume
        self._stored = monotonic()
        self._weights: str | None = None  # the base's fingerprint, made once: it reads all of them
        self._key = list[str]()

    @property
    def is_due(self) -> bool:
        """Whether it is time to store again."""
        return self.path is not None and monotonic() - self._stored > EVERY

    def begin(self, document: str, session: "Session", ids: Sequence[int], *, score_base: bool) -> None:
        """Name what is scored from now on."""
        if self.path is None:
            return
        self._weights = self._weights or session.base.fingerprint()
        recipe, seed = session.recipe.model_dump_json(), str(session.seed)
        version = software()["templora"]
        self._key = [document, digest(ids), str(score_base), recipe, self._weights, seed, version]

    def store(self, session: "Session", scores: "Scores", seconds: float) -> None:
        """Write all that is needed to go on, in place of the checkpoint before."""
        if self.path is None:
            return
        import torch

        parts: dict[str, Any] = {
            "key": self._key,
            "session": session.state(),
            "chunks": scores.chunks,
            "seconds": seconds,
        }
        temporary = self.path.with_name(self.path.name + ".part")
        try:
            torch.save(parts, temporary)
            temporary.replace(self.path)
        except (OSError, RuntimeError) as error:  # the second is torch's, of its writer of archives
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            reason = getattr(error, "strerror", None) or "the disk may be full"
            raise OutputError(f"cannot write {self.path}: {reason}; free some space") from error
        finally:
            self._stored = monotonic()  # also where it failed: not again at each chunk

    def restore(self, session: "Session", scores: "Scores") -> float:
        """Put session and scores where the stored run was; returns the seconds it had spent, 0 if none."""
        if self.path is None or not self._resume or not self.path.exists():
            return 0.0
        import torch

        try:
            parts = torch.load(self.path, weights_only=True, map_location=session.base.device)
        except Exception:
            # Half-written or of another version: the document is scored from its start, which is never wrong.
            return 0.0
        if not isinstance(parts, dict) or cast(dict[str, Any], parts).get("key") != self._key:
            return 0.0
        session.load_state(parts["session"])
        scores.restore(parts["chunks"])
        return float(parts["seconds"])

    def clear(self) -> None:
        """The document is done."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
