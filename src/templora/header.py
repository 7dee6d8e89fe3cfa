"""`session.json`: what a session is, so that another day can tell whether it is the same.

Written once, sealed with a checksum, and repeated as the first line of the journal. It knows names, numbers
and checksums of a base, never the base itself.
"""

import hashlib
import json
import os
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

from templora import __version__
from templora.errors import NotASession, SessionDamaged, WrongBase
from templora.recipe import SIZES, Recipe
from templora.versions import sync
from templora.window import Plan

NAME = "session.json"
FORMAT = 1
PACKAGES = ("torch", "numpy", "numba", "transformers", "peft", "tokenizers", "safetensors")
Header = dict[str, Any]


def made(base: dict[str, Any], recipe: Recipe, seed: int, budget: int) -> Header:
    """The header of a new session. base: as `Base.describe` gives it. budget: bytes for all versions."""
    return {
        "format": FORMAT,
        "base": base,
        "recipe": recipe.model_dump(mode="json"),
        "seed": seed,
        "budget": budget,
        "software": software(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def software() -> dict[str, str]:
    """Versions of what computes here."""
    found = {"templora": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "?"
    return found


def changes(header: Header) -> str:
    """What is of another version now than when the session began, in parentheses, or nothing."""
    was, now = header["software"], software()
    changed = ", ".join(f"{name} {was[name]} → {now.get(name)}" for name in was if was[name] != now.get(name))
    return f" ({changed})" if changed else ""


def recipe_of(header: Header) -> Recipe:
    """The recipe, its sizes fixed: they were fitted when the session began."""
    return Recipe.model_validate({**header["recipe"], "fixed": SIZES})


def plan_of(header: Header) -> Plan:
    """The sizes in tokens."""
    recipe = header["recipe"]
    return Plan(recipe["window"], recipe["chunk"], recipe["context"], sinks=recipe.get("sinks", 0))


def write(folder: Path, header: Header) -> None:
    """Store it; an old one stays whole until the new one is."""
    new = folder / f".{NAME}.part"
    text = json.dumps({**header, "checksum": _checksum(header)}, indent=1, ensure_ascii=False)
    new.write_text(text + "\n", "utf-8", "surrogatepass")  # a folder may have any bytes for a name
    sync(new)
    os.replace(new, folder / NAME)
    sync(folder)


def read(folder: Path) -> Header:
    """The header.

    Raises:
        NotASession: there is none. SessionDamaged: it is not what was written.
    """
    path = folder / NAME
    try:
        found: Any = json.loads(path.read_text("utf-8", "surrogatepass"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotASession(f"{folder} holds no session; templora sessions ls shows where some are") from error
    except OSError as error:
        raise NotASession(f"cannot read {path}: {error.strerror}; check who may read it") from error
    except ValueError as error:
        raise SessionDamaged(f"{path} is damaged; restore it from a copy") from error
    header = cast(Header, found) if isinstance(found, dict) else {}
    # Every format has this checksum, so damage is never taken for another format.
    if header.pop("checksum", None) != _checksum(header):
        raise SessionDamaged(f"{path} is damaged; restore it from a copy")
    return header


def check_format(header: Header, folder: Path) -> None:
    """Refuse a format of the future.

    Raises:
        NotASession: the message says what to install.
    """
    found = header.get("format")
    if not isinstance(found, int) or found > FORMAT:
        raise NotASession(
            f"{folder} has format {found}, and this templora reads up to {FORMAT}; install a newer templora"
        )


# What of a base's description may change: where it lies, and what its tokenizer was last asked for.
FLEETING = frozenset(("name", "tokenizer_then"))


def check_base(header: Header, base: dict[str, Any], folder: Path) -> None:
    """Refuse any base but the one that the session was begun on.

    Raises:
        WrongBase: the message says what differs.
    """
    wanted: dict[str, Any] = header["base"]
    keys = [key for key in sorted(wanted.keys() - FLEETING) if wanted[key] != base.get(key)]
    if "tokenizer" in keys and wanted["tokenizer"] == base.get("tokenizer_then"):
        keys.remove("tokenizer")
    if keys:
        differences = ", ".join(f"{key} {_short(wanted[key])}, not {_short(base.get(key))}" for key in keys)
        raise WrongBase(
            f"{folder} was begun on {wanted['name'] or 'a model in memory'}, and this base differs: it had "
            f"{differences}; use the base it was begun on, or read its text into a new session"
        )


def _short(value: Any) -> str:
    return f"{value[:12]}…" if isinstance(value, str) and len(value) == 64 else str(value)


def _checksum(header: Header) -> str:
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()
