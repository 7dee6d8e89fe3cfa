"""DOCX in, through python-docx. Headings become Markdown headings; pictures and notes are left out."""

import re
from pathlib import Path
from typing import Any

from templora.errors import InvalidText
from templora.formats.extra import needed


def read(path: Path) -> str:
    """The paragraphs and tables of a document, one blank line between two.

    Raises:
        InvalidText: it is no DOCX file.
    """
    docx = needed("docx", "reading DOCX")
    try:
        document = docx.Document(str(path))
    # What a damaged file raises depends on where it is damaged: zipfile, lxml or python-docx.
    except (KeyError, ValueError, SyntaxError, docx.opc.exceptions.OpcError, _bad_zip()) as error:
        raise InvalidText(f"{path} is not a DOCX file ({error}); open and save it anew") from error
    blocks = [_block(inner) for inner in document.iter_inner_content()]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _block(inner: Any) -> str:
    if hasattr(inner, "rows"):
        rows = [" ".join(cell.text.strip() for cell in row.cells) for row in inner.rows]
        return "\n".join(row for row in rows if row.strip())
    text = inner.text.strip()
    style = inner.style.name if inner.style is not None else ""
    level = 1 if style == "Title" else int(found[1]) if (found := re.match(r"Heading (\d)", style)) else 0
    return f"{'#' * level} {text}" if level and text else text


def _bad_zip() -> type[Exception]:
    import zipfile

    return zipfile.BadZipFile
