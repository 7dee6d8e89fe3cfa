"""Killed at any moment, also inside a save: nothing that was reported is lost, and it goes on alike.

Each session is written by a process of its own that tells of every token and is then killed (SIGKILL).
"""

import os
import random
import signal
import sys
from collections.abc import Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch

import templora
from templora.events import ChunkLearned, Token
from templora.versions import Versions
from tests.sessions import base, durable, in_memory, state, written

TOKENS = 150
KILLS_ANYWHERE, KILLS_WHILE_SAVING = 28, 14

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL"),
]


def write_and_tell(folder: Path, tells: Connection, deadly_call: int | None) -> None:
    """Write a session and tell how many tokens and learned chunks were reported.

    deadly_call: die at that call of the operating system or of torch inside a save; 0: only count them.
    """
    torch.set_num_threads(1)
    if deadly_call is not None:
        _die_while_saving(deadly_call, tells)
    made = durable(folder, save_every=2)
    tokens = chunks = 0
    tells.send((tokens, chunks))
    for event in made.write(TOKENS):
        tokens += isinstance(event, Token)
        chunks += isinstance(event, ChunkLearned)
        tells.send((tokens, chunks))
    if deadly_call is None:
        signal.pause()  # the kill is on its way, however fast this machine is
    made.close()


def _die_while_saving(deadly_call: int, tells: Connection) -> None:
    """Every function written in C that is called inside `Versions.save` is a moment to die at."""
    save, calls = Versions.save, 0

    def count(_frame: Any, event: str, _function: Any) -> None:
        nonlocal calls
        if event == "c_call":
            calls += 1
            if calls == deadly_call:
                os.kill(os.getpid(), signal.SIGKILL)

    def counted(self: Versions, *args: Any) -> None:
        sys.setprofile(count)
        try:
            save(self, *args)
        finally:
            sys.setprofile(None)
            tells.send(calls)

    Versions.save = counted


@pytest.fixture(scope="module")
def processes() -> ForkServerContext:
    """Processes that start at once, because what they import is there already."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["tests.sessions"])
    return context


@pytest.fixture(scope="module")
def unkilled() -> dict[str, Any]:
    """What a session is that nobody kills, 40 tokens further on."""
    return state(written(in_memory(), TOKENS + 40))


def told(tells: Connection) -> Iterator[Any]:
    """What a process tells until it ends."""
    try:
        while True:
            yield tells.recv()
    except EOFError:
        return


def check(folder: Path, reported: tuple[int, int], unkilled: dict[str, Any]) -> None:
    resumed = templora.resume(folder, base())
    learned = len(resumed.store.history.learned)
    own = resumed.store.history.own_in(0, len(resumed.ids))
    assert own >= reported[0]
    assert learned >= reported[1]
    assert not list((folder / "versions").glob(".partial*"))
    assert unkilled["text"].startswith(resumed.text)
    assert state(written(resumed, TOKENS + 40 - own)) == unkilled
    assert resumed.store.warnings == []
    resumed.close()


@pytest.mark.parametrize("kill", range(KILLS_ANYWHERE))
def test_killed_anywhere(
    kill: int, tmp_path: Path, processes: ForkServerContext, unkilled: dict[str, Any]
) -> None:
    dice = random.Random(kill)
    hears, tells = processes.Pipe(duplex=False)
    process = processes.Process(target=write_and_tell, args=(tmp_path / "s", tells, None))
    process.start()
    tells.close()
    last, reported = dice.randrange(TOKENS), (0, 0)
    for reported in told(hears):
        if reported[0] == last:
            # A token takes about 3 ms, learning and saving more: die at any point of the next few.
            process.join(dice.uniform(0, 0.05))
            process.kill()
            last = -1
    process.join()
    assert process.exitcode == -signal.SIGKILL
    check(tmp_path / "s", reported, unkilled)


@pytest.fixture(scope="module")
def calls_while_saving(processes: ForkServerContext, tmp_path_factory: pytest.TempPathFactory) -> int:
    """How many moments there are to die at, over all saves of a session."""
    hears, tells = processes.Pipe(duplex=False)
    folder = tmp_path_factory.mktemp("counted") / "s"
    process = processes.Process(target=write_and_tell, args=(folder, tells, 0))
    process.start()
    tells.close()
    calls = max(n for n in told(hears) if isinstance(n, int))
    process.join()
    assert process.exitcode == 0
    return calls


@pytest.mark.parametrize("kill", range(KILLS_WHILE_SAVING))
def test_killed_while_saving(
    kill: int,
    tmp_path: Path,
    processes: ForkServerContext,
    calls_while_saving: int,
    unkilled: dict[str, Any],
) -> None:
    # One in each stretch of equal length, so that every part of a save is met.
    stretch = calls_while_saving // KILLS_WHILE_SAVING
    deadly = random.Random(kill).randrange(stretch) + kill * stretch + 1
    hears, tells = processes.Pipe(duplex=False)
    process = processes.Process(target=write_and_tell, args=(tmp_path / "s", tells, deadly))
    process.start()
    tells.close()
    reported = max((heard for heard in told(hears) if isinstance(heard, tuple)), default=(0, 0))
    process.join()
    assert process.exitcode == -signal.SIGKILL
    check(tmp_path / "s", reported, unkilled)
