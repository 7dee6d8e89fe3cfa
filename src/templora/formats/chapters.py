"""A text cut into chapters at its headings: Markdown's, or lines such as "Chapter 3" and "PART TWO"."""

import re
from dataclasses import dataclass

HEADING = re.compile(
    r"^(?:#{1,2}[ \t]+(?P<marked>\S.*)"
    r"|(?P<named>(?:chapter|part|book)[ \t]+(?:\d+|[ivxlc]+|one|two|three|four|five|six|seven|eight|nine|ten"
    r"|the[ \t]+\w+)\b.{0,60}|(?:prologue|epilogue)\.?))[ \t]*$",
    re.IGNORECASE | re.MULTILINE,
)


@dataclass(frozen=True, slots=True)
class Chapter:
    """title: empty for what comes before the first heading. text: what follows the heading."""

    title: str
    text: str

    @property
    def paragraphs(self) -> list[str]:
        """Pieces between blank lines."""
        pieces = re.split(r"\n[ \t]*\n", self.text)
        return [piece.strip("\n") for piece in pieces if piece.strip()]


def split(text: str) -> list[Chapter]:
    """The chapters of a text; one without a title where there is no heading."""
    found = [m for m in HEADING.finditer(text) if m["marked"] or _stands_alone(text, m)]
    if not found:
        return [Chapter("", text)]
    stops = [*(m.start() for m in found[1:]), len(text)]
    chapters = [Chapter(_title(m), text[m.end() : stop]) for m, stop in zip(found, stops, strict=True)]
    before = text[: found[0].start()]
    return [Chapter("", before), *chapters] if before.strip() else chapters


def markdown(chapters: list[Chapter]) -> str:
    """All chapters under Markdown headings."""
    pieces = [f"# {c.title}\n\n{c.text.strip()}" if c.title else c.text.strip() for c in chapters]
    return "\n\n".join(piece for piece in pieces if piece) + "\n"


def _title(match: re.Match[str]) -> str:
    """Without the signs that may close a heading, which a space parts from it: not those of "Learning C#"."""
    title = (match["marked"] or match["named"]).strip()
    bare = title.rstrip("#")
    return bare.rstrip() if match["marked"] and bare[-1:] in (" ", "\t") else title


def _stands_alone(text: str, match: re.Match[str]) -> bool:
    """Between blank lines; else it is a line of prose that begins like a heading."""
    before, after = text[: match.start()], text[match.end() :]
    return (not before.strip() or before.endswith("\n\n")) and (not after.strip() or after.startswith("\n\n"))
