"""Threads take turns on a model: its modules are swapped for a pass, which no other thread may see.

Two sessions of one base may so be used in two threads. They do not run at the same time; for that there is
`parallel`, which works on modules of its own.
"""

from threading import RLock
from weakref import WeakKeyDictionary

from torch import nn

_locks: WeakKeyDictionary[nn.Module, RLock] = WeakKeyDictionary()  # pyright: ignore[reportInvalidTypeForm]


def turn(model: nn.Module) -> RLock:  # pyright: ignore[reportInvalidTypeForm]
    """What a thread holds while it runs that model, or has other modules stand in it; may be held twice."""
    return _locks.setdefault(model, RLock())
