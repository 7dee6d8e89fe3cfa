"""Whatever is done to a session in whatever order, its text, ids and adapter are what a simple model says.

The model is a list of snapshots in memory; the adapter's truth is a session that went there straight.
"""

import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import templora
from templora.durable import DurableSession
from templora.errors import NoSuchMoment
from templora.testing import ByteTokenizer
from tests.sessions import BASE, SIZES, base, state

pytestmark = pytest.mark.slow
TOKENIZER = ByteTokenizer()
CHUNK = SIZES["chunk"]


@dataclass
class Modelled:
    """What a session must be: its ids (with BOS), past states to go back to, and its named moments."""

    ids: list[int] = field(default_factory=list[int])
    undone: list[list[int]] = field(default_factory=list[list[int]])
    notes: dict[str, list[int]] = field(default_factory=dict[str, list[int]])

    @property
    def text(self) -> str:
        return TOKENIZER.decode(self.ids, skip_special_tokens=True)

    @property
    def pieces(self) -> int:
        return -(-max(0, len(self.ids) - 1) // CHUNK)


class Machine(RuleBasedStateMachine):
    """One session and, after a fork, the other one; text is ASCII, so a character is a token."""

    @initialize(save_every=st.sampled_from([1, 2, 5, None]), guard=st.booleans())
    def begin(self, save_every: int | None, guard: bool) -> None:
        self.root = Path(tempfile.mkdtemp())
        self.forks, self.save_every = 0, save_every
        self.session = BASE.session("default", seed=7, dir=self.root / "s", **(SIZES | {"guard": guard}))
        self.session.save_every = save_every
        self.model = Modelled()

    def teardown(self) -> None:
        if hasattr(self, "root"):
            self.session.close()
            shutil.rmtree(self.root)

    @rule(text=st.text("abc \n", min_size=1, max_size=40))
    def read(self, text: str) -> None:
        self.session.read(text)
        self.model.ids += ([] if self.model.ids else BASE.prefix_ids) + BASE.encode(text)
        self.model.undone.clear()

    @rule(tokens=st.integers(1, 30))
    def write(self, tokens: int) -> None:
        before = list(self.session.ids) or BASE.prefix_ids
        list(self.session.write(tokens))
        assert self.session.ids[: len(before)] == before
        assert len(self.session.ids) == len(before) + tokens
        self.model.ids = list(self.session.ids)
        self.model.undone.clear()

    @rule(chunks=st.integers(1, 4))
    def undo(self, chunks: int) -> None:
        if chunks > self.model.pieces:
            self.refused(lambda: self.session.undo(chunks))
            return
        self.session.undo(chunks)
        self.model.undone.append(self.model.ids)
        self.model.ids = self.model.ids[: 1 + (self.model.pieces - chunks) * CHUNK]

    @rule()
    def redo(self) -> None:
        if not self.model.undone:
            self.refused(self.session.redo)
            return
        self.session.redo()
        self.model.ids = self.model.undone.pop()

    @rule(share=st.floats(0, 1))
    def rewind(self, share: float) -> None:
        tokens = int(share * len(self.model.ids))
        self.session.rewind(tokens)
        self.model.ids = self.model.ids[:tokens]
        self.model.undone.clear()

    @rule(name=st.sampled_from(["storm", "calm"]))
    def note(self, name: str) -> None:
        self.session.note(name)
        self.model.notes[name] = list(self.model.ids)

    @precondition(lambda self: self.model.notes)
    @rule(data=st.data())
    def rewind_to_note(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.model.notes)))
        self.session.rewind(name)
        self.model.ids = list(self.model.notes[name])
        self.model.undone.clear()

    @precondition(lambda self: self.model.text.isascii())
    @rule(data=st.data(), text=st.text("xyz", max_size=5))
    def edit(self, data: st.DataObject, text: str) -> None:
        old = self.session.text
        start = data.draw(st.integers(0, len(old)))
        end = data.draw(st.integers(start, len(old)))
        self.session.edit(start, end, text)
        assert self.session.text == old[:start] + text + old[end:]
        self.model.ids = list(self.session.ids)
        self.model.undone.clear()

    @rule(closed=st.booleans())
    def resume(self, closed: bool) -> None:
        before = state(self.session)
        if closed:
            self.session.close()
        else:
            self.session.store.close()  # as a killed process leaves it
        self.session = templora.resume(self.session.dir, base())
        self.session.save_every = self.save_every
        assert state(self.session) == before

    @precondition(lambda self: self.forks < 3)
    @rule()
    def fork(self) -> None:
        self.forks += 1
        fork: DurableSession = self.session.fork(self.root / f"fork-{self.forks}")
        fork.save_every = self.save_every
        left = self.session
        assert state(fork) == state(left)
        # What happens to one must not reach the other: change the one that is left behind.
        left_before = left.text
        list(fork.write(3))
        assert left.text == left_before
        fork.rewind(len(self.model.ids))
        left.close()
        self.session = fork
        self.model.undone.clear()

    @invariant()
    def is_as_modelled(self) -> None:
        if not hasattr(self, "session"):
            return
        assert list(self.session.ids) == self.model.ids
        assert self.session.text == self.model.text or not self.model.text.isascii()
        # All that is full is learned, as if the session had come here straight.
        assert self.session.chunk == max(0, len(self.model.ids) - 1) // CHUNK

    def refused(self, action: object) -> None:
        before = state(self.session)
        try:
            action()  # pyright: ignore[reportCallIssue]
        except NoSuchMoment:
            assert state(self.session) == before
        else:
            raise AssertionError("nothing was refused")


class TestHistory(Machine.TestCase):
    """Hypothesis runs the machine."""

    settings = settings(
        max_examples=25,
        stateful_step_count=14,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )
