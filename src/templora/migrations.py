"""Sessions of older formats, brought up to date one step at a time when they are opened for writing.

Each step makes the new files beside the old ones and replaces `session.json` last, so that a step that is
cut short is simply done again. What was replaced stays beside it. Versions of an older format are dropped:
the journal rebuilds any state.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from templora import header, journal
from templora.errors import SessionDamaged

Step = Callable[[Path, header.Header], header.Header]


def upgrade(folder: Path, found: header.Header) -> header.Header:
    """The header in today's format, after all steps that it needs."""
    while found["format"] < header.FORMAT:
        try:
            found = STEPS[found["format"]](folder, found)
        except (KeyError, TypeError, ValueError) as error:
            raise SessionDamaged(
                f"{folder} is of format {found['format']} and damaged; restore a copy"
            ) from error
    return found


def _from_0(folder: Path, old: header.Header) -> header.Header:
    """Format 0: a journal without checksums, tokens without counted draws, no description of the base."""
    new = {
        "format": 1,
        "base": {"name": old["model"], "weights": old["weights"]},
        "recipe": old["recipe"],
        "seed": old["seed"],
        "budget": old.get("budget", 1 << 30),
        "software": old.get("software", {}),
        "created": old.get("created", ""),
    }
    path, kept, crc = folder / "journal.jsonl", folder / "journal.0.jsonl", 0
    if not kept.exists():
        os.replace(path, kept)
    part = folder / ".journal.part"
    with part.open("wb") as file:
        for line in ({"op": "begin", "header": new}, *_lines_of_0(kept)):
            data, crc = journal.sealed(line, crc)
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    shutil.rmtree(folder / "versions", ignore_errors=True)
    os.replace(part, path)
    header.write(folder, new)
    return new


def _lines_of_0(path: Path) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    draws = 0
    for line in map(json.loads, path.read_text("utf-8").splitlines()):
        if line["op"] == "token":
            draws += 1
            lines.append({"op": "own", "id": line["id"], "text": line["text"], "draws": draws})
        elif line["op"] == "read":
            lines.append({**line, "op": "given"})
    return lines


STEPS: dict[int, Step] = {0: _from_0}
