"""Several texts at once on a CPU: a thread for each, in which it does what it would do alone.

What a pass of a small base computes is too little for several cores to share, but one text keeps a core busy.
Each thread has modules of its own over the same weights, so that none waits for another's turn on them; how
a batch runs elsewhere says `batch`. A text's events come in its own order, those of several as they happen.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from queue import Empty, Full, Queue, SimpleQueue
from typing import Any

import torch

from templora.base import Base
from templora.errors import InvalidRecipe
from templora.events import Event
from templora.half import LARGE
from templora.parallel import twin_of
from templora.recipe import Recipe
from templora.recipe import load as load_recipe
from templora.session import Session

AHEAD = 2  # events of each thread that nobody has asked for yet; then it waits
PATIENCE = 0.2  # seconds after which who waits looks whether there is still somebody to wait for


class Member(Session):
    """A session in a crew. number: whose text it is, for whoever made the crew."""

    def __init__(self, base: Base, recipe: Recipe, seed: int, number: int) -> None:
        super().__init__(base, recipe, seed=seed)
        self.number = number


Loop = Callable[[Member], Iterator[Event]]


def pays(base: Base, size: int) -> bool:
    """Whether so many texts are faster on their own than in lockstep: by what is there, never by a clock.

    A large base's weights are better read once for all of them, and a GPU runs one pass at a time. A text has
    one of torch's threads, so where these are many, so must be the texts. And a `forward` of a layer's own
    need not be one that a twin can have.
    """
    weights = sum(weight.numel() for weight in base.model.parameters())
    usual = not any("forward" in vars(module) for module in base.model.modules())
    many = 2 * size >= torch.get_num_threads()
    return base.device.type == "cpu" and weights < LARGE and usual and many


class Crew:
    """Up to `size` texts at once on one base, by one recipe, no more of them than torch has threads.

    Raises:
        InvalidRecipe: this recipe must run its texts one at a time.
    """

    def __init__(
        self, base: Base, recipe: str | Path | Recipe = "default", *, size: int, **overrides: Any
    ) -> None:
        self.base, self.size = base, size
        self.recipe = load_recipe(recipe, overrides)
        if size < 1:
            raise InvalidRecipe(f"a batch of {size} holds no text; say 1 or more")
        if self.recipe.dropout:  # drawn from torch's random state, of which there is one
            raise InvalidRecipe(
                f"dropout {self.recipe.dropout} cannot run several texts at once; set dropout=0, or batch 1"
            )

    def run(
        self, loops: Iterable[tuple[int, Loop]], *, seed: int = 0
    ) -> Iterator[tuple[Member, Event | None]]:
        """Run a loop over a fresh session for each number, the next as soon as a thread is free.

        Each has one thread, so that it comes to the same however many there are; one at a time has all. While
        several run, torch's products have one thread elsewhere in the program, too.

        Args:
            loops: the next is asked for when a thread is free.

        Yields:
            Each event with the text it is of; None as the last of a text, which then is the caller's.
        """
        if min(self.size, torch.get_num_threads()) == 1:
            return self._in_turn(loops, seed)
        return self._at_once(loops, seed)

    def _in_turn(self, loops: Iterable[tuple[int, Loop]], seed: int) -> Iterator[tuple[Member, Event | None]]:
        for number, loop in loops:
            text = Member(self.base, self.recipe, seed, number)
            for event in loop(text):
                yield text, event
            yield text, None

    def _at_once(self, loops: Iterable[tuple[int, Loop]], seed: int) -> Iterator[tuple[Member, Event | None]]:
        threads, waiting = torch.get_num_threads(), iter(loops)
        most = min(self.size, threads)
        work = _Work(self.base, self.recipe, seed, most)
        workers, running = list[threading.Thread](), 0
        try:
            while True:
                while running < most and (loop := next(waiting, None)) is not None:
                    work.waiting.put(loop)
                    running += 1
                    if running > len(workers):
                        worker = threading.Thread(target=work.go, name="templora")
                        worker.start()
                        workers.append(worker)
                    # An adapter sets torch's random state and puts it back; meanwhile nobody here draws.
                    work.made.acquire()
                if not running:
                    return
                work.caller = threading.current_thread()
                text, event = work.news.get()
                if isinstance(event, BaseException):
                    try:
                        raise event
                    finally:  # its traceback holds this frame, which would hold it
                        del event
                assert text is not None
                running -= event is None
                yield text, event
        finally:
            try:
                work.leave(workers)
            finally:
                torch.set_num_threads(threads)


class _Left(Exception):
    """Nobody listens any more."""


class _Work:
    """What the threads of a crew share.

    caller: the thread that asks for events; left: whether it has. made: counts sessions that are there.
    """

    def __init__(self, base: Base, recipe: Recipe, seed: int, workers: int) -> None:
        self._base, self._recipe, self._seed = base, recipe, seed
        self.waiting: SimpleQueue[tuple[int, Loop] | None] = SimpleQueue()
        self.news: Queue[tuple[Member | None, Event | BaseException | None]] = Queue(AHEAD * workers)
        self.left, self.caller = threading.Event(), threading.current_thread()
        self.made, self._ended = threading.Semaphore(0), threading.Semaphore(0)

    def go(self) -> None:
        """In a worker's thread, until there is no loop left."""
        try:
            # Before the modules are made: how they write a token depends on it.
            torch.set_num_threads(1)
            base = twin_of(self._base, "use batch 1")
            while (loop := self._next()) is not None:
                self._run(base, *loop)
        except _Left:
            pass
        except BaseException as error:  # raised where the caller is
            with suppress(_Left):
                self._tell(None, error)
        finally:
            self.made.release()  # whatever it died of
            self._ended.release()

    def _run(self, base: Base, number: int, loop: Loop) -> None:
        text = Member(base, self._recipe, self._seed, number)
        self.made.release()
        for event in loop(text):
            self._tell(text, event)
        self._tell(text, None)

    def leave(self, workers: Sequence[threading.Thread]) -> None:
        """Wait until each has done what it is doing; if this is interrupted, they end by themselves."""
        self.left.set()
        for _ in workers:
            self.waiting.put(None)
        if threading.current_thread() in workers:  # which happened to collect the loop that nobody holds
            return
        for _ in workers:  # not `join`, which takes a thread for ended where an interrupt ends the waiting
            self._ended.acquire()
        for worker in workers:
            worker.join()

    def _next(self) -> tuple[int, Loop] | None:
        while True:
            self._look()
            try:
                return self.waiting.get(timeout=PATIENCE)
            except Empty:
                pass

    def _tell(self, text: Member | None, event: Event | BaseException | None) -> None:
        while True:
            self._look()
            try:
                return self.news.put((text, event), timeout=PATIENCE)
            except Full:
                pass

    def _look(self) -> None:
        """Whether somebody listens; nobody does where the program ends with the caller's loop still open."""
        ended = not threading.main_thread().is_alive() and not self.caller.is_alive()
        if self.left.is_set() or ended:
            raise _Left
