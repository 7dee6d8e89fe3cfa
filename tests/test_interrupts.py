"""Ctrl-C in a notebook, or no memory, at the worst moment: nothing is lost, no half of anything is kept."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import templora
from templora import journal
from templora.cache_layers import PrefixLayer, WindowLayer
from templora.errors import OutputError
from templora.injection import standing_in
from templora.study import Study
from tests.sessions import PROSE, base, durable, state


def test_a_line_that_was_interrupted_is_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is on the disk, and nobody knows of it: what came after it would not fit."""
    session, real, calls = durable(tmp_path / "s"), os.fsync, [0]
    session.read(PROSE)

    def interrupted(file: int) -> None:
        real(file)
        calls[0] += 1
        if calls[0] == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(session.write(200))
    with pytest.raises(OutputError, match="close this session and resume it"):
        list(session.write(200))
    session.close()
    text = session.text
    with templora.resume(tmp_path / "s", session.base) as again:
        assert again.text.startswith(text)
        assert len(list(again.write(20)))


class _Fails(Sequence[nn.Module]):
    """Modules, the third of which cannot be had."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self.modules = modules

    def __len__(self) -> int:
        return len(self.modules)

    def __getitem__(self, place: Any) -> Any:
        return self.modules[place]

    def __iter__(self) -> Iterator[nn.Module]:
        yield from self.modules[:2]
        raise KeyboardInterrupt


def test_an_interrupt_while_layers_are_exchanged_leaves_the_base_bare() -> None:
    session = base().session(seed=1)
    sites = session.adapter.sites
    before = [site.module for site in sites]
    layers = _Fails([site.lora for site in sites])
    with pytest.raises(KeyboardInterrupt), standing_in(sites, layers):
        pass
    assert [site.module for site in sites] == before


@pytest.mark.parametrize("cache", ["reuse", "recompute", "base"])
@pytest.mark.parametrize("tokens", [1, 2])
def test_a_pass_that_broke_off_between_two_layers_is_made_again(
    cache: str, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tokens: of that pass, at least: 1 breaks one that writes, 2 one that reads."""
    left, layers = [0], {kind: kind.update for kind in (WindowLayer, PrefixLayer)}

    def update(self: Any, keys: Any, *more: Any, **options: Any) -> Any:
        if keys.shape[2] >= tokens:
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
        return layers[type(self)](self, keys, *more, **options)

    for kind in layers:
        monkeypatch.setattr(kind, "update", update)
    made: list[Any] = []
    for passes in (0, 3):
        session = base().session(seed=7, window=32, chunk=16, context=32, cache=cache)
        session.read(PROSE)
        goal, left[0] = len(session.ids) + 100, 2 * passes  # of two layers: between them
        while len(session.ids) < goal:
            try:
                list(session.write(goal - len(session.ids)))
            except KeyboardInterrupt:
                assert passes
        assert left[0] <= 0
        made.append((session.ids, state(session)))
    assert made[0][0] == made[1][0]
    assert made[0][1] == made[1][1]


@pytest.mark.parametrize("place", ["while it learns again", "before it knows where to"])
def test_an_interrupted_move_is_made_by_whatever_comes_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    made, plain = (durable(tmp_path / name, save_every=None) for name in "ab")
    for session in (made, plain):
        session.note("start")
        list(session.write(80))
    owner, name = (Study, "finish") if place == "while it learns again" else (journal, "good")
    real, calls = getattr(owner, name), [0]

    def interrupted(*args: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] == (3 if owner is Study else 1):
            raise KeyboardInterrupt
        return real(*args, **named)

    moves = [lambda s=session: s.undo() if owner is Study else s.rewind("start") for session in (made, plain)]
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            moves[0]()
    if owner is journal:  # it had not begun
        made.rewind("start")
    moves[1]()
    for session in (made, plain):
        list(session.write(40))
    assert state(made) == state(plain)
    made.store.close()
    assert state(templora.resume(made.dir, base())) == state(plain)
