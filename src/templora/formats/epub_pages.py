"""An EPUB's paragraphs, and the same EPUB with other paragraphs: nothing else in it changes by a byte.

Read and written as what it is, a ZIP of XHTML pages, because libraries for books write their own structure.
"""

import posixpath
import re
import zipfile
from collections.abc import Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from templora.errors import InvalidText
from templora.formats.extra import needed

# What holds a paragraph, if nothing inside of it does.
BLOCKS = frozenset(re.findall(r"\w+", "p h1 h2 h3 h4 h5 h6 li dt dd td th caption figcaption blockquote div"))
KEPT = frozenset(["img", "image", "svg", "math", "audio", "video"])  # what stays of a paragraph's inside
CONTAINER = "META-INF/container.xml"
LANGUAGE = "{http://purl.org/dc/elements/1.1/}language"
XML_LANGUAGE = "{http://www.w3.org/XML/1998/namespace}lang"


def read(path: Path) -> list[str]:
    """The paragraphs of all pages in reading order, white space joined.

    Raises:
        InvalidText: it is not an EPUB file.
    """
    with _opened(path) as file:
        return [_text(block) for _, root in _pages(file, path) for block in _blocks(root)]


def write(path: Path, original: Path, targets: Sequence[str], language: str | None) -> None:
    """The original with its paragraphs replaced, one after another. language: of the new text.

    Raises:
        InvalidText: the original has another number of paragraphs. OSError: it cannot be written.
    """
    etree = needed("lxml.etree", "writing EPUB")
    with _opened(original) as file:
        rest = iter(targets)
        changed: dict[str, bytes] = {}
        for name, root in _pages(file, original):
            for block in _blocks(root):
                _replace(block, next(rest, ""))
            _set_language(root, language)
            changed[name] = _serialised(root, etree)
        package = _package(file, original)
        root = _parsed(file, package, original)
        for element in root.iter(LANGUAGE):
            element.text = language or element.text
        changed[package] = _serialised(root, etree)
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
            for info in file.infolist():
                # Name, date, place and packing of each entry stay: the first must come first, unpacked.
                out.writestr(info, changed.get(info.filename, file.read(info)), info.compress_type)


def _opened(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise InvalidText(f"{path} is not an EPUB file ({error}); convert it anew") from error
    except OSError as error:
        raise InvalidText(f"cannot read {path}: {error.strerror}; check the name") from error


def _parsed(file: zipfile.ZipFile, name: str, path: Path) -> Any:
    etree = needed("lxml.etree", "reading EPUB")
    try:
        return etree.fromstring(file.read(name), etree.XMLParser(resolve_entities=False, recover=True))
    except (KeyError, etree.LxmlError, zipfile.BadZipFile) as error:
        raise InvalidText(f"{path} is not an EPUB file ({error}); convert it anew") from error


def _package(file: zipfile.ZipFile, path: Path) -> str:
    found = _parsed(file, CONTAINER, path)
    names = [] if found is None else found.xpath("//*[local-name()='rootfile']/@full-path")
    if not names:
        raise InvalidText(f"{path} is not an EPUB file (it names no package); convert it anew")
    return str(names[0])


def _pages(file: zipfile.ZipFile, path: Path) -> Iterator[tuple[str, Any]]:
    package = _package(file, path)
    root = _parsed(file, package, path)
    items = {item.get("id"): item.get("href") for item in root.iter("{*}item")}
    for reference in root.iter("{*}itemref"):
        href = items.get(reference.get("idref"))
        name = posixpath.normpath(posixpath.join(posixpath.dirname(package), unquote(href or "")))
        if href and name in file.namelist():
            page = _parsed(file, name, path)
            if page is not None:
                yield name, page


def _local(element: Any) -> str:
    return element.tag.rpartition("}")[2] if isinstance(element.tag, str) else ""


def _blocks(root: Any) -> list[Any]:
    bodies = [element for element in root.iter() if _local(element) == "body"]
    found = [element for body in bodies for element in body.iter() if _local(element) in BLOCKS]
    leaves = [e for e in found if not any(_local(inner) in BLOCKS for inner in e.iterdescendants())]
    return [element for element in leaves if _text(element)]


def _text(element: Any) -> str:
    return " ".join("".join(_words(element)).split())


def _words(element: Any) -> Iterator[str]:
    yield element.text or ""
    for inner in element:
        if _local(inner) == "br":
            yield " "
        if _local(inner):  # a comment has no name, only what follows it
            yield from _words(inner)
        yield inner.tail or ""


def _replace(element: Any, text: str) -> None:
    """Other words in it. Its pictures come after them, and whatever was linked to can still be linked to."""
    element = _around_all_words(element)
    inside = [inner for inner in element.iterdescendants() if _local(inner)]
    kept = [deepcopy(inner) for inner in inside if _local(inner) in KEPT]
    of_kept = {id(e) for inner in inside if _local(inner) in KEPT for e in inner.iter()}
    marks = [inner.get("id") for inner in inside if inner.get("id") and id(inner) not in of_kept]
    for inner in list(element):
        element.remove(inner)
    element.text = re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]", "", text)
    for mark in marks:
        space = element.tag[: -len(_local(element))]
        element.append(element.makeelement(f"{space}span", {"id": mark}))
    for inner in kept:
        inner.tail = None
        element.append(inner)


def _around_all_words(element: Any) -> Any:
    """The innermost element that holds all its words: the link of an entry in a table of contents, say."""
    inner = [child for child in element if _local(child) and _text(child)]
    if len(inner) == 1 and _text(inner[0]) == _text(element) and _local(inner[0]) not in KEPT:
        return _around_all_words(inner[0])
    return element


def _set_language(root: Any, language: str | None) -> None:
    if language:
        for name in (XML_LANGUAGE, "lang"):
            if name in root.attrib:
                root.set(name, language)


def _serialised(root: Any, etree: Any) -> bytes:
    return etree.tostring(root.getroottree(), encoding="utf-8", xml_declaration=True)
