"""Threads take turns on a model: its modules are swapped for a pass, which no other thread may see.

Two sessions of one base may so be used in two threads. They do not run at the same time; for that there is
`parallel`, which works on modules of its own. torch's random state is one for all models, and so is its turn.
A session is one thread's at a time, and another is told so: turns on it would mix two texts.
"""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import wraps
from threading import RLock
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

from templora.errors import SessionInUse

Kind = TypeVar("Kind", bound=type)
_random = RLock()
_locks: WeakKeyDictionary[nn.Module, RLock] = WeakKeyDictionary()  # pyright: ignore[reportInvalidTypeForm]


def turn(model: nn.Module) -> RLock:  # pyright: ignore[reportInvalidTypeForm]
    """What a thread holds while it runs that model, or has other modules stand in it; may be held twice."""
    return _locks.setdefault(model, RLock())


@contextmanager
def random_state(device: torch.device) -> Generator[None]:
    """torch's global random state is this thread's, to set and draw from; afterwards it is what it was."""
    with _random, torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


class OneThread:
    """A session's steps, each in a `with`: they may be within each other, but not in two threads at once."""

    def __init__(self) -> None:
        self._lock = RLock()

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            raise SessionInUse("another thread is at work in this session; give each a session of its own")

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def one_thread(*names: str) -> Callable[[Kind], Kind]:
    """A class decorator: each of these methods is such a step as a whole."""

    def guarded(method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def step(self: Any, *args: Any, **kwargs: Any) -> Any:
            with self.alone:
                return method(self, *args, **kwargs)

        return step

    def guard(kind: Kind) -> Kind:
        for name in names:
            setattr(kind, name, guarded(vars(kind)[name]))
        return kind

    return guard
