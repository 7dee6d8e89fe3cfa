"""Sessions of older formats, brought up to date one step at a time when they are opened for writing.

A step makes the new files beside the old ones and replaces `session.json` last, through `header.write`, so
that one that is cut short is simply done again. It may drop versions: the journal rebuilds any state.
"""

from collections.abc import Callable
from pathlib import Path

from templora import header
from templora.errors import SessionDamaged

Step = Callable[[Path, header.Header], header.Header]

# From each format to the next: none yet, 1 is the first.
STEPS: dict[int, Step] = {}


def upgrade(folder: Path, found: header.Header) -> header.Header:
    """The header in today's format, after all steps that it needs.

    Raises:
        SessionDamaged: a step found something else than its format says.
    """
    while (number := found["format"]) < header.FORMAT:
        try:
            found = STEPS[number](folder, found)
        except (KeyError, TypeError, ValueError) as error:
            raise SessionDamaged(f"{folder} is of format {number} and damaged; restore a copy") from error
    return found
