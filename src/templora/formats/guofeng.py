"""The GuoFeng set: a work as passages of sentence pairs."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from templora.errors import InvalidText
from templora.formats.book import plain

Pair = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Excerpt:
    """One passage: pairs of (Chinese, English) sentences."""

    pairs: list[Pair]

    @property
    def source(self) -> str:
        """The Chinese, a sentence a line."""
        return "\n".join(zh for zh, _ in self.pairs)

    @property
    def target(self) -> str:
        """The English."""
        return "\n".join(en for _, en in self.pairs)


def read(path: Path) -> list[Excerpt]:
    """The passages of a .json or .json.xz file, in reading order.

    Raises:
        InvalidText: it is not of that form.
    """
    try:
        found: Any = json.loads(plain(path).text)
        return [Excerpt(_pairs(item["inference"])) for item in found]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidText(f"{path} is not a GuoFeng file ({error!r}); it holds a list of passages") from error


def _pairs(items: Any) -> list[Pair]:
    return [(" ".join(item["zh"].split()), " ".join(item["en"].split())) for item in items]
