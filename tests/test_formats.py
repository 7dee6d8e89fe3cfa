"""Books in and out, opened by readers that know nothing of ours."""

import lzma
import zipfile
from pathlib import Path

import pytest
from docx import Document
from ebooklib import epub as other_epub
from lxml import etree

from templora.errors import InvalidText, MissingExtra
from templora.formats import book, chapters, epub, extra
from tests.archives import damage

WORD = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"
PLAIN = "It was 1901 – “naïve”.\n\nThe second & the third < fourth.\nA line of its own."


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ("Füße\r\nund\rmehr".encode(), "Füße\nund\nmehr"),
        ("﻿Füße".encode(), "Füße"),
        (
            "Als er eines Morgens aus unruhigen Träumen erwachte, regnete es. ".encode("cp1252") * 9,
            "unruhigen Träumen",
        ),
        (
            "The café was closed — “never mind,” she said, and went on. ".encode("cp1252") * 9,
            "café was closed — “never mind,”",
        ),
        ("В лесу родилась ёлочка, в лесу она росла. ".encode("cp1251") * 9, "ёлочка"),
        (
            "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。".encode("shift_jis") * 9,
            "吾輩は猫",
        ),
        ("The sea.".encode("utf-16"), "The sea."),
    ],
)
def test_plain_text_in_any_encoding(data: bytes, text: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(data)
    assert text in book.read(tmp_path / "a.txt").text
    (tmp_path / "a.txt.xz").write_bytes(lzma.compress(data))
    assert text in book.read(tmp_path / "a.txt.xz").text


@pytest.mark.parametrize("encoding", [None, "utf-8", "utf-8-sig", "utf-16", "utf-16-le"])
def test_a_mark_at_the_beginning_is_not_text(encoding: str | None, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(f"\ufeff{PLAIN}".encode((encoding or "utf-8").removesuffix("-sig")))
    assert book.read(tmp_path / "a.txt", encoding).text == PLAIN


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("a.txt", b"", "holds no text"),
        ("a.md", b" \n\n", "holds no text"),
        ("a.txt", b"a\0b", "binary data"),
        ("a.txt", bytes(range(128, 256)) * 8 + b"\0\1", "not text in any known encoding|binary data"),
        ("a.epub", b"no zip", "not an EPUB file"),
        ("a.docx", b"no zip", "not a DOCX file"),
        ("a.txt.xz", b"no xz", "not a valid .xz file"),
    ],
)
def test_what_is_no_book_is_refused(name: str, data: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InvalidText, match=reason):
        book.read(tmp_path / name)


@pytest.mark.parametrize("kind", ["epub", "docx"])
def test_a_zip_that_is_no_book_is_refused(kind: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / f"a.{kind}", "w") as file:
        file.writestr("hello.txt", "hello")
    with pytest.raises(InvalidText, match=r"not an? (EPUB|DOCX) file"):
        book.read(tmp_path / f"a.{kind}")


def test_docx_with_headings_and_tables(tmp_path: Path) -> None:
    document = Document()
    document.add_heading("Chapter One", 1)
    document.add_paragraph("It began.")
    table = document.add_table(1, 2)
    table.cell(0, 0).text, table.cell(0, 1).text = "left", "right"
    document.add_paragraph("It ended.")
    document.save(str(tmp_path / "a.docx"))
    assert book.read(tmp_path / "a.docx").text == "# Chapter One\n\nIt began.\n\nleft right\n\nIt ended.\n"


def word(tmp_path: Path, body: str) -> Path:
    """A document of this XML, made by Word for all that a reader can tell."""
    document = Document()
    for number, element in enumerate(etree.fromstring(f'<w:body xmlns:w="{WORD}">{body}</w:body>')):
        document.element.body.insert(number, element)
    document.save(str(tmp_path / "a.docx"))
    return tmp_path / "a.docx"


def run(text: str) -> str:
    return f'<w:r><w:t xml:space="preserve">{text}</w:t></w:r>'


@pytest.mark.parametrize(
    ("inside", "text"),
    [
        (f"{run('He ')}<w:ins>{run('really ')}</w:ins>{run('left.')}", "He really left."),
        (f"{run('He ')}<w:del><w:r><w:delText>never </w:delText><w:tab/></w:r></w:del>{run('x')}", "He x"),
        (f"<w:moveFrom>{run('gone ')}</w:moveFrom><w:moveTo>{run('here')}</w:moveTo>", "here"),
        (f"{run('To ')}<w:sdt><w:sdtContent>{run('whom')}</w:sdtContent></w:sdt>", "To whom"),
        (f"{run('a')}<w:hyperlink>{run('link')}</w:hyperlink><w:r><w:br/><w:t>b</w:t></w:r>", "alink\nb"),
        (f'{run("a")}<w:r><w:br w:type="page"/></w:r>{run("b")}', "a\nb"),
        (f'{run("a")}<w:r><w:br w:type="column"/></w:r>{run("b")}<w:r><w:br w:type="page"/></w:r>', "a\nb"),
        (f'<w:pPr><w:tabs><w:tab w:val="left" w:pos="9"/></w:tabs></w:pPr>{run("a")}', "a"),
        (
            f"<w:r><w:ruby><w:rt>{run('ねこ')}</w:rt><w:rubyBase>{run('猫')}</w:rubyBase></w:ruby></w:r>",
            "猫",
        ),
        (
            f"<w:r><w:pict><w:txbxContent><w:p>{run('box')}</w:p></w:txbxContent></w:pict></w:r>{run('a')}",
            "a",
        ),
    ],
)
def test_docx_as_it_stands_with_all_changes_accepted(inside: str, text: str, tmp_path: Path) -> None:
    assert book.read(word(tmp_path, f"<w:p>{inside}</w:p>")).text == text + "\n"


def test_docx_with_content_controls_and_merged_cells(tmp_path: Path) -> None:
    held = "<w:sdt>{}<w:sdtContent>{}</w:sdtContent></w:sdt>"
    contents = '<w:sdtPr><w:docPartObj><w:docPartGallery w:val="Table of Contents"/></w:docPartObj></w:sdtPr>'
    wide = f'<w:tc><w:tcPr><w:gridSpan w:val="3"/></w:tcPr><w:p>{run("Merged")}</w:p></w:tc>'
    narrow = "".join(f"<w:tc><w:p>{run(letter)}</w:p></w:tc>" for letter in "ab")
    last = held.format("", f"<w:tc><w:p>{run('c')}</w:p></w:tc>")
    grid = "<w:tblPr/><w:tblGrid><w:gridCol/><w:gridCol/><w:gridCol/></w:tblGrid>"
    path = word(
        tmp_path,
        held.format(contents, f"<w:p>{run('Chapter One 5')}</w:p>")
        + held.format("", f"<w:p>{run('In a control.')}</w:p>")
        + f"<w:tbl>{grid}<w:tr>{wide}</w:tr><w:tr>{narrow}{last}</w:tr></w:tbl><w:p>{run('End.')}</w:p>",
    )
    assert book.read(path).text == "In a control.\n\nMerged\na b c\n\nEnd.\n"


def test_a_damaged_docx_or_epub_is_refused(tmp_path: Path) -> None:
    Document().save(str(tmp_path / "a.docx"))
    epub.write(tmp_path / "a.epub", "A", chapters.split("# One\n\nText."))
    damage(tmp_path / "a.docx", "word/document.xml")
    damage(tmp_path / "a.epub", "EPUB/content.opf")
    for name, kind in (("a.docx", "DOCX"), ("a.epub", "EPUB")):
        with pytest.raises(InvalidText, match=f"is not an? {kind} file"):
            book.read(tmp_path / name)


def test_an_epub_without_metadata_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.epub", "w") as file:
        file.writestr(
            "META-INF/container.xml",
            '<container xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles><rootfile '
            'full-path="a.opf" media-type="application/oebps-package+xml"/></rootfiles></container>',
        )
        file.writestr("a.opf", '<package xmlns="http://www.idpf.org/2007/opf"><manifest/><spine/></package>')
    with pytest.raises(InvalidText, match="is not an EPUB file"):
        book.read(tmp_path / "a.epub")


def test_an_epub_is_read_as_it_was_written(tmp_path: Path) -> None:
    text = f"# One\n\n{PLAIN}\n\n# Two & three\n\nThe end.\n"
    epub.write(tmp_path / "a.epub", "A <book>", chapters.split(text), "fr")
    assert book.read(tmp_path / "a.epub").text == text
    # Without ebooklib: every page is well-formed XML, and the package lists them in order.
    with zipfile.ZipFile(tmp_path / "a.epub") as file:
        assert file.namelist()[0] == "mimetype"
        assert file.read("mimetype") == b"application/epub+zip"
        pages = [name for name in file.namelist() if name.endswith((".xhtml", ".opf", ".ncx"))]
        roots = {name: etree.fromstring(file.read(name)) for name in pages}
    package = next(root for name, root in roots.items() if name.endswith(".opf"))
    assert package.findtext(".//{*}language") == "fr"
    assert package.findtext(".//{*}title") == "A <book>"
    headings = [root.findtext(".//{*}h1") for name, root in sorted(roots.items()) if "chapter" in name]
    assert headings == ["One", "Two & three"]
    assert other_epub.read_epub(str(tmp_path / "a.epub"), {"ignore_ncx": True}).title == "A <book>"


def with_page(tmp_path: Path, page: bytes) -> Path:
    """An EPUB whose only page is this one."""
    epub.write(tmp_path / "plain.epub", "A", chapters.split("Text."))
    with (
        zipfile.ZipFile(tmp_path / "plain.epub") as source,
        zipfile.ZipFile(tmp_path / "a.epub", "w") as target,
    ):
        for info in source.infolist():
            is_page = info.filename.endswith("chapter-001.xhtml")
            target.writestr(info, page if is_page else source.read(info))
    return tmp_path / "a.epub"


@pytest.mark.parametrize(
    ("coding", "declared", "text"),
    [
        ("utf-8", "utf-8", "Café — 猫"),
        ("utf-8-sig", "utf-8", "Café — 猫"),
        ("utf-8", "", "Café — 猫"),
        ("utf-16", "utf-16", "Café — 猫"),
        ("utf-16", "", "Café — 猫"),
        ("iso-8859-1", "ISO-8859-1", "Café"),
        ("cp1252", "windows-1252", "Café — “oui”"),
        ("shift_jis", "Shift_JIS", "吾輩は猫である"),
        ("ascii", "utf-16", "It only says so."),
        ("ascii", "x-unknown", "It is in nothing that we know."),
    ],
)
def test_an_epub_page_is_in_the_encoding_that_it_says(
    coding: str, declared: str, text: str, tmp_path: Path
) -> None:
    said = f"<?xml version='1.0' encoding='{declared}'?>" if declared else ""
    page = (
        f'{said}<html xmlns="http://www.w3.org/1999/xhtml"><body><h1>{text}</h1><p>{text}</p></body></html>'
    )
    path = with_page(tmp_path, page.encode(coding))
    assert book.read(path).text == f"# {text}\n\n{text}\n"


def test_words_of_an_epub_page_are_not_glued_and_none_come_twice(tmp_path: Path) -> None:
    page = (
        "<html><body><table><tr><th>Name</th><td>Age</td></tr></table><aside>a</aside><aside>b</aside>"
        "<p><ruby>漢<rp>(</rp><rt>かん</rt><rp>)</rp>字</ruby>を</p></body></html>"
    )
    assert book.read(with_page(tmp_path, page.encode())).text == "Name Age\n\na\n\nb\n\n漢字を\n"


def test_an_epub_page_of_html_is_read_as_such(tmp_path: Path) -> None:
    page = '<html><head><meta charset="iso-8859-1"/></head><body>Words of its own.<p>Café</p></body></html>'
    path = with_page(tmp_path, page.encode("iso-8859-1"))
    assert book.read(path).text == "Words of its own.\n\nCafé\n"


def test_control_characters_do_not_break_an_epub(tmp_path: Path) -> None:
    epub.write(tmp_path / "a.epub", "A", chapters.split("a\x00\x08b\ufffe\n\nc"))
    assert book.read(tmp_path / "a.epub").text == "ab\n\nc\n"
    epub.write(tmp_path / "b.epub", "A\x0b", chapters.split("# O\x1fn\x08e\n\na\ud800"))
    assert book.read(tmp_path / "b.epub").text == "# One\n\na\n"
    assert other_epub.read_epub(str(tmp_path / "b.epub"), {"ignore_ncx": True}).title == "A"


@pytest.mark.parametrize(
    ("text", "titles"),
    [
        ("No heading at all.", [""]),
        ("Before.\n\n# One\n\na\n\n## Two\n\nb", ["", "One", "Two"]),
        ("CHAPTER I\n\na\n\nChapter 2: The Storm\n\nb\n\nPART THE SECOND\n\nc", None),
        ("Chapter one was over before\nshe knew it.", [""]),
        ("Prologue\n\na\n\nEPILOGUE.\n\nb", ["Prologue", "EPILOGUE."]),
    ],
)
def test_chapters_are_split_at_headings(text: str, titles: list[str] | None) -> None:
    found = [chapter.title for chapter in chapters.split(text)]
    assert found == (titles or ["CHAPTER I", "Chapter 2: The Storm", "PART THE SECOND"])
    words = " ".join(chapters.markdown(chapters.split(text)).replace("#", "").split())
    assert words == " ".join(text.replace("#", "").split()), "no word is lost"


def test_a_package_that_is_missing_is_named_with_what_to_install() -> None:
    with pytest.raises(MissingExtra, match=r'X needs no_such; say: pip install "templora\[formats\]"'):
        extra.needed("no_such.module", "reading X")


def test_a_heading_keeps_its_own_number_sign_and_a_long_run_of_spaces_is_read_at_once() -> None:
    text = "# Learning C#\n\na\n\n## Two ##\n\nb\n\n# c" + " " * 20_000 + "d\n\ne\n"
    titles = [chapter.title for chapter in chapters.split(text)]
    assert titles[:2] == ["Learning C#", "Two"]
    assert titles[2].split() == ["c", "d"]  # in no time; it was cubic
