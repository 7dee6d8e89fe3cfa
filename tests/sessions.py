"""What the tests of sessions share: a tiny base, sizes that make many chunks, what a session on disk is."""

import hashlib
from pathlib import Path
from typing import Any

import templora
from templora.base import Base
from templora.durable import DurableSession
from templora.session import Session
from templora.testing import ByteTokenizer, tiny_llama

PROSE = "The lighthouse keeper climbed the stairs each evening, counting them aloud."
# Fast enough that a version more or less shows in the text.
SIZES: dict[str, Any] = {
    "window": 40,
    "chunk": 16,
    "context": 40,
    "learning_rate": 5e-3,
    "warmup_chunks": 0,
    "guard": False,
}


def base(seed: int = 0, **changes: Any) -> Base:
    """A tiny base that is loaded anew each time, as after a restart."""
    return templora.load(
        model=tiny_llama(seed, **{"initializer_range": 0.2, **changes}), tokenizer=ByteTokenizer()
    )


BASE = base()


def durable(folder: Path, save_every: int | None = 3, **changes: Any) -> DurableSession:
    """A session on disk that has read PROSE."""
    made = BASE.session("default", seed=7, dir=folder, **(SIZES | changes))
    made.save_every = save_every
    made.read(PROSE)
    return made


def in_memory(**changes: Any) -> Session:
    """The same, in memory."""
    made = BASE.session("default", seed=7, **(SIZES | changes))
    made.read(PROSE)
    return made


def written(session: Session, tokens: int, **wishes: Any) -> Session:
    """After so many more tokens."""
    for _ in session.write(tokens, **wishes):
        pass
    return session


def killed(session: DurableSession) -> Path:
    """The folder as a killed process leaves it: nothing saved on the way out."""
    session.store.close()
    return session.dir


def state(session: Session) -> dict[str, Any]:
    """All that decides what comes next, and the text."""
    return {
        "ids": list(session.ids),
        "text": session.text,
        "chunk": session.chunk,
        "weights": hashlib.sha256(session.adapter.flat.numpy().tobytes()).hexdigest(),
        "version": session.adapter.version,
        "sampler": (session.sampler.seed, session.sampler.draws),
        "guard": session.study.guard.state(),
    }
