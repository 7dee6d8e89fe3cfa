"""DOCX in, through python-docx. Headings become Markdown headings; pictures and notes are left out.

A document with tracked changes is read as if all were accepted.
"""

import re
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from templora.errors import InvalidText
from templora.formats.elements import local
from templora.formats.extra import needed

# What goes round paragraphs, rows or cells: content controls and custom XML.
WRAPPERS = frozenset(["sdt", "sdtContent", "customXml"])
# What a run says, unless it is inside of text that was deleted or moved away, of a text box, of the small
# characters above others, or of what is there for old programs only: that says the same once more.
WORDS = (
    ".//w:r/*[self::w:t or self::w:tab or self::w:br or self::w:cr or self::w:noBreakHyphen or self::w:ptab]"
    "[not(ancestor::w:del or ancestor::w:moveFrom or ancestor::w:txbxContent or ancestor::w:rt"
    " or ancestor::*[local-name() = 'Fallback'])]"
)


def read(path: Path) -> str:
    """The paragraphs and tables of a document, one blank line between two.

    Raises:
        InvalidText: it is no DOCX file.
    """
    docx = needed("docx", "reading DOCX")
    paragraph = needed("docx.text.paragraph", "reading DOCX").Paragraph
    damages = (KeyError, ValueError, SyntaxError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)
    try:
        document = docx.Document(str(path))
        body = document.element.body
        if body is None:
            raise ValueError("it has no body")
        blocks = [
            _table(inner) if local(inner) == "tbl" else _paragraph(paragraph(inner, document._body))
            for inner in _inside(body, "p", "tbl")
        ]
    # What a damaged file raises depends on where it is damaged: zipfile, zlib, lxml or python-docx.
    except (*damages, docx.opc.exceptions.OpcError) as error:
        raise InvalidText(f"{path} is not a DOCX file ({error}); open and save it anew") from error
    return "\n\n".join(block for block in blocks if block) + "\n"


def _paragraph(paragraph: Any) -> str:
    text = _words(paragraph._p).strip()
    style = (paragraph.style.name or "") if paragraph.style is not None else ""
    level = 1 if style == "Title" else int(found[1]) if (found := re.match(r"Heading (\d)", style)) else 0
    return f"{'#' * level} {text}" if level and text else text


def _table(table: Any) -> str:
    """A row a line. A cell that reaches over several columns or rows is one cell in the file, too."""
    rows = (" ".join(filter(None, map(_cell, _inside(row, "tc")))) for row in _inside(table, "tr"))
    return "\n".join(row for row in rows if row)


def _cell(cell: Any) -> str:
    inside = _inside(cell, "p", "tbl")
    return "\n".join(_table(i) if local(i) == "tbl" else _words(i) for i in inside).strip()


def _words(paragraph: Any) -> str:
    # A page may end in the middle of a paragraph; python-docx says nothing for that.
    return "".join("\n" if local(word) == "br" else str(word) for word in paragraph.xpath(WORDS))


def _inside(element: Any, *names: str) -> Iterator[Any]:
    """The elements of these names directly in it, or in no more than a wrapper."""
    for inner in element:
        name = local(inner)
        if name in names:
            yield inner
        # A table of contents is made of the headings, which follow.
        elif name in WRAPPERS and not _is_contents(inner):
            yield from _inside(inner, *names)


def _is_contents(control: Any) -> bool:
    kinds = control.iterfind("./{*}sdtPr/{*}docPartObj/{*}docPartGallery")
    return any("Table of Contents" in kind.attrib.values() for kind in kinds)
