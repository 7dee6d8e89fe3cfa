"""A session in a folder, for commands: continued where there is one, begun where there is none."""

import shlex
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from templora import header, shelf
from templora.commands.inputs import hush, load_base, load_recipe
from templora.commands.running import say
from templora.errors import InvalidRecipe
from templora.recipe import SIZES

if TYPE_CHECKING:
    from templora.durable import DurableSession
    from templora.session import Session

# What a session was begun with, and so cannot change.
SETTLED = ("recipe", "set_", "window", "chunk", "context", "dtype")


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the command line says about a session. given: names of the options that the user wrote."""

    model: str = "novelist"
    recipe: str = "default"
    pairs: list[str] = field(default_factory=list[str])
    sizes: dict[str, int | None] = field(default_factory=dict[str, int | None])
    seed: int = 0
    dtype: str | None = None
    device: str | None = None
    given: frozenset[str] = frozenset()
    parallel: bool = False


def given(context: typer.Context) -> frozenset[str]:
    """Names of the options that the user wrote."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return frozenset(name for name, source in sources.items() if source and source.name == "COMMANDLINE")


def repeated(context: typer.Context, names: Collection[str]) -> str:
    """The options of these names that the user wrote, as they can be typed again, each after a space."""
    wrote, words = given(context), list[str]()
    for option in context.command.params:
        name = option.name or ""
        if name not in wrote or name not in names:
            continue
        value = context.params[name]
        if isinstance(value, bool):
            words.append((option.opts if value else option.secondary_opts)[0])
            continue
        # Older Typers have a tuple here.
        for one in value if isinstance(value, list | tuple) else [value]:  # pyright: ignore[reportUnknownVariableType]
            words += [option.opts[0], shlex.quote(str(one))]  # pyright: ignore[reportUnknownArgumentType]
    return "".join(f" {word}" for word in words)


def begun(wanted: Wanted, folder: Path | None = None) -> "Session":
    """A new session, on disk if there is a folder."""
    if wanted.parallel:
        _share_cores(wanted.device)
    base = load_base(wanted.model, wanted.dtype, wanted.device)
    recipe = load_recipe(wanted.recipe, wanted.pairs, wanted.sizes)
    return base.session(recipe, seed=wanted.seed, dir=folder, parallel=wanted.parallel)


def _share_cores(device: str | None) -> None:
    """A CPU's, between who writes and who learns: before a base is loaded, which looks how many there are."""
    import torch

    if str(device).startswith("cpu") or not torch.cuda.is_available():
        torch.set_num_threads(max(1, torch.get_num_threads() // 2))


def has_read(session: "Session", text: str, after: int | None = None) -> bool:
    """Whether a session on disk was given that text before, by a command that is repeated.

    after: how many books the command gives before it, if it is a prompt. That may well come again on purpose,
    such as the line between two scenes, and so is the same only at the beginning or the very end.
    """
    from templora.durable import DurableSession

    return isinstance(session, DurableSession) and session.store.history.was_given(text, after)


def unread(session: "Session", text: str) -> str:
    """What a session has not read yet of a file; on disk it may hold the beginning of it, or all.

    The file may be where the session's own text is saved: that was written or given bit by bit, and it may
    have grown since.
    """
    from templora.durable import DurableSession

    if not isinstance(session, DurableSession) or not (held := session.text):
        return text
    if text.startswith(held):
        return text[len(held) :]
    return "" if held.endswith(text) or has_read(session, text) else text


def behind(session: "Session", text: str) -> str:
    """What a session on disk holds beyond that text, of the file where it is saved.

    A kill, a power failure or a full disk may have kept the end from the file.
    """
    from templora.durable import DurableSession

    return session.store.history.after_given(text) if isinstance(session, DurableSession) else ""


def _other(folder: Path, wanted: Wanted) -> list[str]:
    """Options that ask for something else than a session was begun with."""
    if not (asked := [name for name in SETTLED if name in wanted.given]):
        return []
    head, _ = shelf.header_of(folder)
    now, recipe = header.recipe_of(head), load_recipe(wanted.recipe, wanted.pairs, wanted.sizes)
    keys = set(recipe.fixed)
    if {"recipe", "set_"} & wanted.given:
        keys |= type(recipe).model_fields.keys() - SIZES - {"fixed"}
    same = {"dtype": wanted.dtype == head["base"].get("dtype")}
    as_begun = all(getattr(now, key) == getattr(recipe, key) for key in keys)
    return [name for name in asked if not same.get(name, as_begun)]


def opened(folder: Path, wanted: Wanted) -> "DurableSession":
    """The session in that folder, or a new one.

    Raises:
        InvalidRecipe: the session exists, and an option would change what it was begun with.
    """
    from templora.durable import DurableSession, resume

    if not shelf.exists(folder):
        made = begun(wanted, folder)
        assert isinstance(made, DurableSession)
        return made
    if settled := _other(folder, wanted):
        names = ", ".join(f"--{name.rstrip('_')}" for name in settled)
        raise InvalidRecipe(f"{folder} exists and keeps what it was begun with; leave out {names}")
    hush()
    name = wanted.model if "model" in wanted.given else None
    session = resume(folder, device=wanted.device, name=name)
    if "seed" in wanted.given and wanted.seed != session.sampler.seed:
        session.reseed(wanted.seed)
        say(f"from here on drawn from seed {wanted.seed}")
    return session
