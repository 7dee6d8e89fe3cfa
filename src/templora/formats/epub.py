"""EPUB in and out, through ebooklib."""

import codecs
import re
import warnings
import zipfile
import zlib
from html import escape
from pathlib import Path
from typing import Any

from templora.errors import InvalidText
from templora.formats.chapters import Chapter
from templora.formats.elements import printable
from templora.formats.extra import needed

# Elements that begin a paragraph of their own.
BLOCKS = frozenset(
    re.findall(r"\w+", "p div h1 h2 h3 h4 h5 h6 li blockquote pre section article header footer tr hr dt dd")
) | frozenset(
    re.findall(r"\w+", "main aside figure figcaption caption address center details summary hgroup legend")
)
# The last three: the small characters above others say the same once more.
SILENT = frozenset(("script", "style", "head", "title", "nav", "rt", "rtc", "rp"))
DECLARED = re.compile(rb"""(?:\xef\xbb\xbf)?<\?xml[^>]*?\sencoding\s*=\s*["']([\w.:-]+)""")


def read(path: Path) -> str:
    """The text of a book in reading order, headings as Markdown headings.

    Raises:
        InvalidText: it is no EPUB file.
    """
    epub = needed("ebooklib.epub", "reading EPUB")
    html = needed("lxml.html", "reading EPUB")
    etree = needed("lxml.etree", "reading EPUB")
    # ebooklib looks into what may not be there without asking: AttributeError, TypeError.
    damages = (LookupError, ValueError, AttributeError, TypeError, EOFError, RuntimeError)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # notices about ebooklib's own future
            book = epub.read_epub(str(path), {"ignore_ncx": True})
    except (*damages, epub.EpubException, zipfile.BadZipFile, zlib.error, etree.LxmlError) as error:
        raise InvalidText(f"{path} is not an EPUB file ({error}); convert it anew") from error
    pages = [_page(book.get_item_with_id(name), html, etree) for name, _ in book.spine]
    return "\n\n".join(page for page in pages if page) + "\n"


def write(path: Path, title: str, chapters: list[Chapter], language: str = "en") -> None:
    """A book of these chapters.

    Raises:
        OSError: it cannot be written.
    """
    epub = needed("ebooklib.epub", "writing EPUB")
    title, language = printable(title), printable(language)
    book = epub.EpubBook()
    book.set_identifier(re.sub(r"\W+", "-", title) or "text")
    book.set_title(title)
    book.set_language(language)
    pages: list[Any] = []
    for number, chapter in enumerate(chapters, 1):
        named = printable(chapter.title)
        page = epub.EpubHtml(title=named or title, file_name=f"chapter-{number:03}.xhtml", lang=language)
        heading = f"<h1>{escape(named)}</h1>" if named else ""
        page.content = heading + "".join(_paragraph(text) for text in chapter.paragraphs) or "<p></p>"
        book.add_item(page)
        pages.append(page)
    book.toc = pages
    book.add_item(epub.EpubNcx())
    book.add_item(epub.EpubNav())
    book.spine = ["nav", *pages]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Without this option ebooklib swallows what goes wrong while writing.
        epub.write_epub(str(path), book, {"raise_exceptions": True})


def _paragraph(text: str) -> str:
    return f"<p>{escape(printable(text)).replace(chr(10), '<br/>')}</p>"


def _page(item: Any, html: Any, etree: Any) -> str:
    if item is None or "nav" in (getattr(item, "properties", None) or []):
        return ""
    content: bytes = item.content  # as it is in the file: get_content() is without the declaration
    if not content.strip():
        return ""
    text = _decoded(content)
    try:
        if text is None:
            root = html.document_fromstring(content)
        else:
            root = html.document_fromstring(text.encode(), html.HTMLParser(encoding="utf-8"))
    except etree.LxmlError:
        return ""
    blocks: list[list[str]] = [[]]
    _collect(root, blocks)
    joined = (re.sub(r"[ \t\r\n]+", " ", "".join(block)).replace("\v", "\n").strip() for block in blocks)
    return "\n\n".join(block for block in joined if block.strip("# "))


def _decoded(content: bytes) -> str | None:
    """A page as its mark or declaration says, which a parser of HTML ignores; None if that cannot be."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return content.decode("utf-16", "replace")
    declared = DECLARED.match(content)
    try:
        text = content.decode(declared[1].decode("ascii") if declared else "utf-8")
    except (LookupError, UnicodeDecodeError):
        return None
    text = text.removeprefix("\ufeff")
    # Pages that only say that they are in UTF-16 would be gibberish.
    return text if not declared or text.startswith("<?xml") else None


def _collect(element: Any, blocks: list[list[str]]) -> None:
    """Append the element's text: a new list for each paragraph."""
    tag = element.tag if isinstance(element.tag, str) else ""
    if tag and tag not in SILENT:
        if tag in BLOCKS:
            blocks.append(["#" * int(tag[1]) + " "] if re.fullmatch("h[1-6]", tag) else [])
        if tag == "br":
            blocks[-1].append("\v")  # a line break that survives the joining of white space
        if tag in ("td", "th"):
            blocks[-1].append(" ")  # a row is one paragraph
        blocks[-1].append(element.text or "")
        for child in element:
            _collect(child, blocks)
        if tag in BLOCKS:
            blocks.append([])
    blocks[-1].append(element.tail or "")
