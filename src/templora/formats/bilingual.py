"""Files of segments, with or without translations: plain text, TSV, TMX, XLIFF, EPUB; in, and out again."""

import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from templora.errors import InvalidText, OutputError
from templora.formats import book, epub_pages, side_by_side, units
from templora.formats.elements import printable
from templora.formats.extra import needed

TOOLKIT = {".tmx": ("tmx", "tmxfile"), ".xlf": ("xliff", "xlifffile"), ".xliff": ("xliff", "xlifffile")}
Languages = tuple[str | None, str | None]  # of the source, of the target
# What would be plain text under the name of something else.
NO_TEXT = frozenset((".docx", ".doc", ".odt", ".rtf", ".pdf", ".mobi", ".azw3", ".xz", ".gz", ".bz2", ".zip"))
# Text of which not every line is to be translated, for its times and keys, or its marks.
CODED = frozenset((".srt", ".vtt", ".ass", ".ssa", ".sub", ".po", ".pot", ".csv", ".json", ".jsonl", ".xml"))
MARKED = frozenset((".html", ".htm", ".xhtml", ".tex", ".yaml", ".yml", ".toml", ".ini", ".properties"))
UNREAD = NO_TEXT - {".xz"} | CODED | MARKED
ESCAPES = {"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"}


@dataclass(frozen=True, slots=True)
class Segment:
    """A unit of a file: a line, a row, a translation unit, a paragraph. target: None where there is none."""

    source: str
    target: str | None = None


@dataclass(frozen=True, slots=True)
class Document:
    """A file's segments in order.

    languages: source and target as the file names them, where it does.
    asked: those that it was read for; to write into a copy of the file finds the same segments with them.
    guessed: the encoding, where it had to be guessed.
    """

    segments: list[Segment]
    languages: Languages = (None, None)
    asked: Languages = (None, None)
    guessed: str | None = None

    def translated(self, targets: Sequence[str], source: str, target: str) -> "Document":
        """The same with these translations; an empty one leaves what was there."""
        pairs = zip(self.segments, targets, strict=True)
        return replace(
            self,
            segments=[replace(s, target=t or s.target) for s, t in pairs],
            languages=(source, target),
        )


def read(path: Path, languages: Languages = (None, None)) -> Document:
    """The segments of a file, whose kind its name says. Unknown kinds are plain text, a line a segment.

    Args:
        languages: source and target to take of a TMX file, which can hold any number; None: the source is
            what its header says, the target what is beside it. Other kinds have one of each.

    Raises:
        InvalidText: there is no such file, or it is not what its name says.
        MissingExtra: a package is needed to read it.
    """
    suffix = path.suffix.lower()
    if suffix == ".epub":
        return Document([Segment(text) for text in epub_pages.read(path)])
    if suffix in TOOLKIT:
        return _from_toolkit(path, languages)
    if suffix in UNREAD:
        coded = suffix in CODED
        cure = "put its words into a .tsv, .tmx or .xlf" if coded else "save it as EPUB or plain text"
        raise InvalidText(f"{path} cannot be taken apart as {suffix}; {cure}")
    plain = book.plain(path)
    lines = plain.text.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n").split("\n")
    segments = [_row(line, path) if suffix == ".tsv" else Segment(line) for line in lines]
    return Document(segments, guessed=plain.guessed)


def write(
    path: Path,
    document: Document,
    original: Path,
    *,
    ready: Callable[[Path], None] | None = None,
) -> None:
    """A document as the kind of file that the name says; it appears whole or not at all.

    Args:
        original: what it was read from. Of the same kind, its structure is kept: XLIFF's groups and notes,
            an EPUB's pages and pictures. `.html` and `.md` show source and target side by side.
        ready: is shown the whole file before it takes its name.

    Raises:
        OutputError: it cannot be written, or not as this kind.
    """
    part = _part(path)
    try:
        _writer(path, original)(part, document, original)
        if ready:
            ready(part)
        os.replace(part, path.resolve())  # a link stays one
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        part.unlink(missing_ok=True)


def check(path: Path, original: Path) -> None:
    """Whether a file of that name could be made, before any work starts.

    Raises:
        OutputError: not as this kind, or not there.
    """
    _writer(path, original)
    try:
        _part(path).touch()
        _part(path).unlink()
    except OSError as error:
        raise _cannot_write(path, error) from error


def _part(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


def _cannot_write(path: Path, error: OSError) -> OutputError:
    return OutputError(f"cannot write {path}: {error.strerror or error}; choose another name")


def _writer(path: Path, original: Path) -> Callable[[Path, Document, Path], None]:
    suffix = path.suffix.lower()
    if suffix == ".epub":
        if original.suffix.lower() != ".epub":
            raise OutputError(f"{path.name} can be made of an EPUB only; choose .txt or .html")
        return _epub
    if suffix in (UNREAD | {".xz"}) - {".html"}:
        raise OutputError(f"{path.name} cannot be made; choose .txt, .html, .md, .tsv, .tmx or .xlf")
    if suffix in TOOLKIT:
        return lambda part, document, original: _with_toolkit(part, suffix, document, original)
    if suffix in (".html", ".md"):
        return lambda part, document, original: _text(part, side_by_side.page(document, suffix))
    if suffix == ".tsv":
        return lambda part, document, original: _lines(part, map(_tabbed, document.segments))
    return lambda part, document, original: _lines(part, (s.target or "" for s in document.segments))


def _lines(path: Path, lines: Iterable[str]) -> None:
    _text(path, "".join(" ".join(line.split("\n")) + "\n" for line in lines))


def _text(path: Path, text: str) -> None:
    path.write_text(text, "utf-8", newline="")


def _epub(path: Path, document: Document, original: Path) -> None:
    _check_unchanged(original, document, epub_pages.read(original))
    epub_pages.write(path, original, [segment.target for segment in document.segments], document.languages[1])


def _row(line: str, path: Path) -> Segment:
    cells = line.split("\t")
    if len(cells) > 2:
        raise InvalidText(f"{path} has a line of {len(cells)} columns; a TSV file has source and target")
    return Segment(*map(_unescaped, cells))


def _tabbed(segment: Segment) -> str:
    cells = (segment.source, segment.target or "")
    return "\t".join(cell.translate(str.maketrans(ESCAPES)) for cell in cells)


def _unescaped(cell: str) -> str:
    plain = {escaped: character for character, escaped in ESCAPES.items()}
    return re.sub(r"\\[\\tnr]", lambda found: plain[found[0]], cell)


def _store(path: Path, asked: Languages = (None, None)) -> Any:
    """The file as translate-toolkit's object. asked: languages to take of a TMX file."""
    suffix = path.suffix.lower()
    module, name = TOOLKIT[suffix]
    kind = getattr(needed(f"translate.storage.{module}", f"reading {suffix} files", "translate"), name)
    try:
        # Reading all units finds what parsing alone does not: a file of another kind.
        store = kind.parsestring(path.read_bytes())
        list(store.units)
        if module == "tmx":
            _take(store, asked)
    except (SyntaxError, ValueError, AttributeError, AssertionError, StopIteration) as error:
        raise InvalidText(f"{path} is not a valid {suffix} file ({error}); export it anew") from error
    except OSError as error:
        raise InvalidText(f"cannot read {path}: {error.strerror}; check the name") from error
    return store


def _take(store: Any, asked: Languages) -> None:
    """These languages, as the file spells them: with a region, say. Neither, if that source is not there."""
    nodes = (node for unit in store.units for node in unit.getlanguageNodes())
    there = list(dict.fromkeys(node.get(epub_pages.XML_LANGUAGE) or "" for node in nodes))
    source, target = (_spelled(language, there, asked) for language in asked)
    if asked[0] and not source:
        return
    if source:
        store.setsourcelanguage(source)
    if asked[1]:
        # One that is not there yet is set, too: else any other language would pass for it.
        store.settargetlanguage(target or asked[1])


def _spelled(language: str | None, there: Sequence[str], asked: Languages) -> str | None:
    """Which of those there it is: the same, else a wider or narrower one that is not asked for itself."""
    if not language:
        return None
    wanted, others = _plain(language), [_plain(other) for other in asked if other and other != language]
    for name in there:
        if _plain(name) == wanted:
            return name
    for name in there:
        found = _plain(name)
        if found not in others and (found.startswith(wanted + "-") or wanted.startswith(found + "-")):
            return name
    return None


def _plain(language: str) -> str:
    return language.replace("_", "-").lower()


def _from_toolkit(path: Path, asked: Languages) -> Document:
    store = _store(path, asked)
    segments = [Segment(*units.texts(unit)) for unit in units.meant(store)]
    return Document(segments, (store.getsourcelanguage(), store.gettargetlanguage()), asked)


def _with_toolkit(path: Path, suffix: str, document: Document, original: Path) -> None:
    source, target = document.languages
    module, name = TOOLKIT[suffix]
    if TOOLKIT.get(original.suffix.lower()) == (module, name):
        store = _store(original, document.asked)
        found = units.meant(store)
        _check_unchanged(original, document, [units.texts(unit)[0] for unit in found])
        pairs = [(unit, s.target) for unit, s in zip(found, document.segments, strict=True)]
        path.write_bytes(units.filled(store, pairs, target or "und", is_xliff=module == "xliff"))
        return
    kind = getattr(needed(f"translate.storage.{module}", f"writing {suffix} files", "translate"), name)
    store = kind(sourcelanguage=source, targetlanguage=target)
    for number, segment in enumerate(document.segments, 1):
        unit = store.addsourceunit(printable(segment.source))
        if hasattr(unit, "setid"):
            unit.setid(str(number))
        if segment.target:
            unit.settarget(printable(segment.target), target or "und")
            if module == "xliff":
                unit.markreviewneeded()  # no person has approved it
    content = bytes(store)
    if module == "xliff":
        # The toolkit begins files of version 1.1; all of it is in 1.2, which is what tools expect today.
        content = content.replace(b":document:1.1", b":document:1.2", 1).replace(b'"1.1"', b'"1.2"', 1)
    path.write_bytes(content)


def _check_unchanged(original: Path, document: Document, sources: Sequence[str]) -> None:
    """See that the translations go where their sources are.

    Raises:
        InvalidText: somebody has changed the file since it was read.
    """
    if sources != [segment.source for segment in document.segments]:
        raise InvalidText(
            f"{original} was changed while it was translated; put back what it was, or begin anew"
        )
