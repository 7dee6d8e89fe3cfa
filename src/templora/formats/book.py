"""A book file as plain text, whatever its kind: txt, Markdown, EPUB, DOCX, in any encoding.

Headings become Markdown headings, so that chapters can be told apart again on the way out.
"""

import lzma
from collections.abc import Callable
from pathlib import Path

from templora.errors import InvalidText
from templora.formats.extra import needed

READERS = {".epub": "epub", ".docx": "docx"}


def read(path: Path) -> str:
    """The text of a book file, lines ended by a line feed.

    Raises:
        InvalidText: there is no such file, it is damaged, or it holds no text.
        MissingExtra: a package is needed to read it.
    """
    try:
        text = _reader(path)(path)
    except OSError as error:
        raise InvalidText(f"cannot read {path}: {error.strerror or error}; check the name") from error
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if not text.strip():
        raise InvalidText(f"{path} holds no text; give a file that does")
    return text


def _reader(path: Path) -> Callable[[Path], str]:
    match READERS.get(path.suffix.lower()):
        case "epub":
            from templora.formats import epub

            return epub.read
        case "docx":
            from templora.formats import docx

            return docx.read
        case _:
            return _plain


def _plain(path: Path) -> str:
    data = path.read_bytes()
    if path.suffix == ".xz":
        try:
            data = lzma.decompress(data)
        except lzma.LZMAError as error:
            raise InvalidText(f"{path} is not a valid .xz file ({error}); unpack it by hand") from error
    return decoded(data, path)


def decoded(data: bytes, path: Path) -> str:
    """Text in any encoding: UTF-8 if it is that, else the likeliest.

    Raises:
        InvalidText: it is not text. MissingExtra: guessing needs a package.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        detect = needed("charset_normalizer", f"{path} is not UTF-8, and guessing its encoding")
        best = detect.from_bytes(data).best()
        if best is None:
            raise InvalidText(f"{path} is not text in any known encoding; convert it to UTF-8") from None
        return str(best)
    if "\0" in text:
        raise InvalidText(f"{path} holds binary data, not text; give a text file, EPUB or DOCX")
    return text
