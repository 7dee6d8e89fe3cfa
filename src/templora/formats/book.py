"""A book file as plain text, whatever its kind: txt, Markdown, EPUB, DOCX, in any encoding.

Headings become Markdown headings, so that chapters can be told apart again on the way out.
"""

import lzma
from dataclasses import dataclass
from pathlib import Path

from templora.errors import InvalidText
from templora.formats.extra import needed


@dataclass(frozen=True, slots=True)
class Book:
    """text: lines ended by a line feed. guessed: the encoding, where it had to be guessed."""

    text: str
    guessed: str | None = None


def read(path: Path, encoding: str | None = None) -> Book:
    """The text of a book file.

    Args:
        encoding: of plain text; by default UTF-8 if it is that, else the likeliest.

    Raises:
        InvalidText: there is no such file, it is damaged, or it holds no text.
        MissingExtra: a package is needed to read it.
    """
    try:
        book = _read(path, encoding)
    except OSError as error:
        raise InvalidText(f"cannot read {path}: {error.strerror or error}; check the name") from error
    text = line_feeds(book.text)
    if not text.strip():
        raise InvalidText(f"{path} holds no text; give a file that does")
    return Book(text, book.guessed)


def line_feeds(text: str) -> str:
    """The same with all lines ended by a line feed, as nearly all text is that models are trained on."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _read(path: Path, encoding: str | None) -> Book:
    match path.suffix.lower():
        case ".epub":
            from templora.formats import epub

            return Book(epub.read(path))
        case ".docx":
            from templora.formats import docx

            return Book(docx.read(path))
        case _:
            return _plain(path, encoding)


def plain(path: Path) -> Book:
    """A plain or compressed (.xz) file as it is.

    Raises:
        InvalidText: there is no such file, or it is not text.
    """
    try:
        return _plain(path, None)
    except OSError as error:
        raise InvalidText(f"cannot read {path}: {error.strerror}; check the name") from error


def _plain(path: Path, encoding: str | None) -> Book:
    data = path.read_bytes()
    if path.suffix == ".xz":
        try:
            data = lzma.decompress(data)
        except lzma.LZMAError as error:
            raise InvalidText(f"{path} is not a valid .xz file ({error}); unpack it by hand") from error
    try:
        # Only the default would take a mark at the beginning for one.
        book = Book(data.decode(encoding or "utf-8").removeprefix("\ufeff"))
    except LookupError:
        raise InvalidText(f"there is no encoding {encoding!r}; say for example cp1252 or shift_jis") from None
    except UnicodeDecodeError as error:
        if encoding:
            raise InvalidText(
                f"{path} is not {encoding} (byte {error.start}); leave it to be guessed"
            ) from None
        book = _guess(data, path)
    if "\0" in book.text:
        raise InvalidText(f"{path} holds binary data, not text; give a text file, EPUB or DOCX")
    return book


def _guess(data: bytes, path: Path) -> Book:
    detect = needed("charset_normalizer", f"{path} is not UTF-8, and guessing its encoding")
    # Of several that fit equally well, such as for English with a few quotation marks, the commonest.
    best = min(
        detect.from_bytes(data),
        key=lambda match: (match.chaos, -match.coherence, match.encoding != "cp1252"),
        default=None,
    )
    if best is None:
        raise InvalidText(f"{path} is not text in any known encoding; convert it to UTF-8")
    return Book(str(best), best.encoding)
