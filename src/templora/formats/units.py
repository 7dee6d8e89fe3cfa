"""Translation units of a TMX or XLIFF file, as the XML that they are: their words, and other words in them.

translate-toolkit finds the units. It does not fill them here: it keeps old words that stand behind an inline
code, puts a target before what must precede it, and lays out anew what the file has beside them.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any

from templora.formats.elements import local, printable
from templora.formats.extra import needed

# What they hold is markup of the file that the text was taken from, no words.
CODES = frozenset(["bpt", "ept", "ph", "it", "ut"])
# What XLIFF has before a target.
BEFORE = frozenset(["source", "seg-source"])
SIGNED = frozenset(["signed-off", "final"])  # states of a target
OPEN = frozenset(["new", "needs-translation"])  # and of one that is none yet
SPACE = re.compile("[ \t\r\n]+")  # in XML


def meant(store: Any) -> list[Any]:
    """The units that are to be translated."""
    return [unit for unit in store.units if unit.istranslatable() and _is_meant(unit.xmlelement)]


def _is_meant(element: Any) -> bool:
    """Whether it is to be translated: as the nearest says that says anything, such as the group round it."""
    around = (outer.get("translate") for outer in (element, *element.iterancestors()))
    return next(filter(None, around), "yes").lower() != "no"


def texts(unit: Any) -> tuple[str, str | None]:
    """The words of its source and of its target, None where there are none or they wait to be translated."""
    source, node = _text(unit.source_dom, unit.source) or "", unit.target_dom
    waits = node is not None and node.get("state") in OPEN
    return source, None if waits else _text(node, unit.target) or None


def _text(node: Any, text: str | None) -> str | None:
    """text: as the toolkit takes it, white space as the file says, but with what codes hold."""
    if node is None or not any(local(inner) in CODES for inner in node.iterdescendants()):
        return text
    return SPACE.sub(" ", "".join(_words(_held(node)))).strip()


def _words(node: Any) -> Iterator[str]:
    yield node.text or ""
    for inner in node:
        if local(inner) and local(inner) not in CODES:
            yield from _words(inner)
        yield inner.tail or ""


def filled(store: Any, pairs: Iterable[tuple[Any, str | None]], language: str, *, is_xliff: bool) -> bytes:
    """The file with these targets in its units. What has none stays; so does what a person has approved."""
    for unit, target in pairs:
        if target and target != texts(unit)[1] and not (is_xliff and _is_approved(unit)):
            fill = _fill_xliff if is_xliff else _fill_tmx
            fill(unit, printable(target), language if is_xliff else store.gettargetlanguage() or language)
    if is_xliff:
        for file in store.document.getroot().iterchildren(store.namespaced("file")):
            if not file.get("target-language"):
                file.set("target-language", language)
    etree = needed("lxml.etree", "writing TMX and XLIFF", "translate")
    return etree.tostring(store.document, encoding="utf-8", xml_declaration=True)


def _is_approved(unit: Any) -> bool:
    node = unit.target_dom
    return bool(unit.target) and (unit.isapproved() or (node is not None and node.get("state") in SIGNED))


def _fill_tmx(unit: Any, text: str, language: str) -> None:
    if (node := unit.get_target_dom(language)) is None:
        unit.settarget(text, language)
    else:
        _say(_held(node), text)


def _fill_xliff(unit: Any, text: str, language: str) -> None:
    element, node = unit.xmlelement, unit.target_dom
    before = next((inner for inner in reversed(element) if local(inner) in BEFORE), None)
    if before is None:  # a group of plural forms
        unit.settarget(text, language)
        return
    if node is None:
        node = element.makeelement(unit.namespaced("target"))
        element.insert(element.index(before) + 1, node)
        node.tail = before.tail
    _say(node, text)
    # No person has approved it, and it is not what it was.
    node.attrib.pop("state-qualifier", None)
    node.set("state", "needs-review-translation")
    if unit.isapproved():
        unit.markapproved(False)


def _say(node: Any, text: str) -> None:
    """These words in place of all that is in it."""
    for inner in list(node):
        node.remove(inner)
    node.text = text


def _held(node: Any) -> Any:
    """What holds the words: TMX has an element for that inside of a language's."""
    return next((inner for inner in node if local(inner) == "seg"), node)
