"""An EPUB's paragraphs, and the same EPUB with other paragraphs: nothing else in it changes by a byte.

Read and written as what it is, a ZIP of XHTML pages, because libraries for books write their own structure.
"""

import codecs
import posixpath
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from html.entities import html5
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from templora.errors import InvalidText
from templora.formats.elements import local, printable
from templora.formats.epub import DECLARED
from templora.formats.extra import needed

# What holds a paragraph, if nothing inside of it does.
BLOCKS = frozenset(
    re.findall(r"\w+", "p h1 h2 h3 h4 h5 h6 li dt dd td th caption figcaption blockquote div address center")
) | frozenset(
    re.findall(r"\w+", "section article main aside header footer figure nav details summary hgroup legend")
)
APART = frozenset(["pre", "hr"])  # what stands between paragraphs and stays as it is
# What is part of a line of text.
INLINE = frozenset(
    re.findall(r"\w+", "a abbr acronym b bdi bdo big br cite code data del dfn em font i ins kbd label mark")
) | frozenset(
    re.findall(r"\w+", "q rb rp rt rtc ruby s samp small span strike strong sub sup time tt u var wbr")
)
# What can have words of its own beside the blocks inside of it.
HOLDERS = BLOCKS | INLINE | {"body"}
# What stays of a paragraph's inside.
KEPT = frozenset(
    re.findall(r"\w+", "img image svg math audio video picture object embed iframe canvas script style")
)
READINGS = frozenset(["rt", "rtc", "rp"])  # the small characters above others say the same once more
# The entities of XML itself stay, and so does what only looks like one.
NAMED = re.compile(rb"<!--.*?-->|<!\[CDATA\[.*?\]\]>|&(?!(?:amp|lt|gt|quot|apos);)(\w+;)", re.DOTALL)
# Languages that are written from right to left.
LEFTWARD = frozenset(re.findall(r"\w+", "ar arc ckb dv fa he iw ps sd ug ur yi"))
CONTAINER = "META-INF/container.xml"
LANGUAGE = "{http://purl.org/dc/elements/1.1/}language"
XML_LANGUAGE = "{http://www.w3.org/XML/1998/namespace}lang"


def read(path: Path) -> list[str]:
    """The paragraphs of all pages in reading order, white space joined.

    Raises:
        InvalidText: it is not an EPUB file.
    """
    with _opened(path) as file:
        return [_text(block) for _, root in _pages(file, path) for block in _passages(root)]


def write(path: Path, original: Path, targets: Sequence[str | None], language: str | None) -> None:
    """The original with its paragraphs replaced, one after another; what has no target stays as it is.

    language: of the new text.

    Raises:
        InvalidText: the original is damaged. OSError: it cannot be written.
    """
    etree = needed("lxml.etree", "writing EPUB")
    with _opened(original) as file:
        rest = iter(targets)
        changed: dict[str, bytes] = {}
        for name, root in _pages(file, original):
            pairs = [(block, target) for block in _passages(root) if (target := next(rest, None))]
            for block, target in pairs:
                _set_language(_replace(block, target), language)
            if pairs:
                changed[name] = _serialised(root, etree)
        package = _package(file, original)
        root = _parsed(file, package, original)
        for element in root.iter(LANGUAGE):
            element.text = language or element.text
        changed[package] = _serialised(root, etree)
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
            for info in file.infolist():
                content = changed.get(info.filename) or _unpacked(file, info, original)
                # Name, date, place and packing of each entry stay: the first must come first, unpacked.
                out.writestr(info, content, info.compress_type)


def _opened(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise InvalidText(f"{path} is not an EPUB file ({error}); convert it anew") from error
    except OSError as error:
        raise InvalidText(f"cannot read {path}: {error.strerror}; check the name") from error


def _unpacked(file: zipfile.ZipFile, name: str | zipfile.ZipInfo, path: Path) -> bytes:
    try:
        return file.read(name)
    except (KeyError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise InvalidText(f"{path} is not an EPUB file ({error}); convert it anew") from error


def _parsed(file: zipfile.ZipFile, name: str, path: Path) -> Any:
    etree = needed("lxml.etree", "reading EPUB")
    content = _numbered(_in_its_encoding(_unpacked(file, name, path)))
    try:
        return etree.fromstring(
            content, etree.XMLParser(resolve_entities=False, recover=True, strip_cdata=False)
        )
    except etree.LxmlError as error:
        raise InvalidText(f"{path} is not an EPUB file ({error}); convert it anew") from error


def _in_its_encoding(content: bytes) -> bytes:
    """As it is; in that of old web pages where it is not what it should be: the parser would lose letters."""
    declared = DECLARED.match(content)
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or (
        declared and declared[1].lower() != b"utf-8"
    ):
        return content
    try:
        content.decode()
    except UnicodeDecodeError:
        return content.decode("cp1252", "replace").encode()
    return content


def _numbered(content: bytes) -> bytes:
    """With HTML's entities as numbers: XML knows no `&nbsp;` by its name, and its parser would drop it."""
    if not content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return NAMED.sub(_number, content)  # in ASCII, as any other encoding has it, too
    return NAMED.sub(_number, content.decode("utf-16", "replace").encode()).decode().encode("utf-16")


def _number(found: re.Match[bytes]) -> bytes:
    characters = html5.get(found[1].decode("ascii")) if found[1] else None
    return found[0] if characters is None else "".join(f"&#{ord(c)};" for c in characters).encode()


def _package(file: zipfile.ZipFile, path: Path) -> str:
    found = _parsed(file, CONTAINER, path)
    names = [] if found is None else found.xpath("//*[local-name()='rootfile']/@full-path")
    if not names:
        raise InvalidText(f"{path} is not an EPUB file (it names no package); convert it anew")
    return str(names[0])


def _pages(file: zipfile.ZipFile, path: Path) -> Iterator[tuple[str, Any]]:
    package = _package(file, path)
    root = _parsed(file, package, path)
    if root is None:
        raise InvalidText(f"{path} is not an EPUB file (its package is empty); convert it anew")
    items = {item.get("id"): item.get("href") for item in root.iter("{*}item")}
    for reference in root.iter("{*}itemref"):
        href = items.get(reference.get("idref"))
        name = posixpath.normpath(posixpath.join(posixpath.dirname(package), unquote(href or "")))
        if href and name in file.namelist():
            page = _parsed(file, name, path)
            if page is not None:
                yield name, page


def _passages(root: Any) -> list[Any]:
    """The elements that hold a passage each, in reading order; made where words stand beside a block."""
    bodies = [element for element in root.iter() if local(element) == "body"]
    return [element for body in bodies for element in _blocks(body)]


def _blocks(element: Any) -> Iterator[Any]:
    if local(element) in KEPT | APART:
        return
    if local(element) in BLOCKS and not _holds_block(element):
        if _text(element):
            yield element
    elif local(element) in HOLDERS:
        yield from _beside_blocks(element)
    else:
        for inner in list(element):
            yield from _blocks(inner)


def _beside_blocks(element: Any) -> Iterator[Any]:
    """Its blocks, and each run of words between them as an element of its own."""
    before, run = None, []
    for inner in [*element, None]:
        if inner is not None and _in_line(inner):
            run.append(inner)
            continue
        if words := _joined(_words(element.text if before is None else before.tail, run)):
            single = _single(words, run)
            yield _wrapped(element, before, run) if single is None else single
        if inner is not None:
            yield from _blocks(inner)
        before, run = inner, []


def _in_line(element: Any) -> bool:
    name = local(element)
    return not name or name in KEPT or (name in INLINE and not _holds_block(element))


def _holds_block(element: Any) -> bool:
    inside = (inner for inner in element if local(inner) not in KEPT)
    return any(local(inner) in BLOCKS | APART or _holds_block(inner) for inner in inside)


def _single(words: str, run: list[Any]) -> Any:
    """The element that holds all words of a run already: a table of contents may have no span round it."""
    return next((inner for inner in run if _worded(inner) and _text(inner) == words), None)


def _wrapped(element: Any, before: Any, run: list[Any]) -> Any:
    """The run and the text before it, put into a span."""
    span = _made(element, "span")
    if before is None:
        span.text, element.text = element.text, None
        element.insert(0, span)
    else:
        span.text, before.tail = before.tail, None
        element.insert(element.index(before) + 1, span)
    span.extend(run)
    return span


def _made(parent: Any, name: str) -> Any:
    return parent.makeelement(parent.tag[: -len(local(parent))] + name)


def _text(element: Any) -> str:
    return _joined(_words(element.text, element))


def _joined(words: Iterable[str]) -> str:
    return " ".join("".join(words).split())


def _words(text: str | None, inside: Iterable[Any]) -> Iterator[str]:
    """A text and that of the elements after it, with what follows each; what stays as it is says nothing."""
    yield text or ""
    for inner in inside:
        if local(inner) == "br":
            yield " "
        # A comment has no name, only what follows it.
        if local(inner) and local(inner) not in KEPT | READINGS:
            yield from _words(inner.text, inner)
        yield inner.tail or ""


def _worded(element: Any) -> bool:
    """Whether it can hold words by itself, and does; where readings stood above some there would be none."""
    name = local(element)
    return bool(name) and name != "ruby" and name not in KEPT | READINGS and bool(_text(element))


def _replace(element: Any, text: str) -> Any:
    """Other words in it. Its pictures come after them, and whatever was linked to can still be linked to.

    Returns:
        The element that they stand in: it, or one inside of it.
    """
    element = _around_all_words(element)
    inside = [inner for inner in element.iterdescendants() if local(inner)]
    pictures = [inner for inner in inside if local(inner) in KEPT]
    of_kept = {id(e) for picture in pictures for e in picture.iterdescendants()}
    kept = [deepcopy(picture) for picture in pictures if id(picture) not in of_kept]
    marks = [i.get("id") for i in inside if i.get("id") and i not in pictures and id(i) not in of_kept]
    for inner in list(element):
        element.remove(inner)
    element.text = printable(text)
    for mark in marks:
        element.append(_made(element, "span"))
        element[-1].set("id", mark)
    for inner in kept:
        inner.tail = None
        element.append(inner)
    return element


def _around_all_words(element: Any) -> Any:
    """The innermost element that holds all its words: the link of an entry in a table of contents, say."""
    inner = [child for child in element if _worded(child)]
    if len(inner) == 1 and _text(inner[0]) == _text(element):
        return _around_all_words(inner[0])
    return element


def _set_language(element: Any, language: str | None) -> None:
    """Of its words, and their direction, wherever one is named."""
    leftward = re.split("[-_]", (language or "").lower())[0] in LEFTWARD
    for around in (element, *element.iterancestors()) if language else ():
        if around.get("dir") in ("ltr", "rtl") or (leftward and local(around) == "html"):
            around.set("dir", "rtl" if leftward else "ltr")
        for name in (XML_LANGUAGE, "lang"):
            if name in around.attrib:
                around.set(name, language)


def _serialised(root: Any, etree: Any) -> bytes:
    return etree.tostring(root.getroottree(), encoding="utf-8", xml_declaration=True)
