"""Source and translation beside each other, to be read by a person: an HTML or a Markdown table."""

from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from templora.formats.bilingual import Document

STYLE = "td{vertical-align:top;width:50%;padding:.4em 1em}body{font-family:serif;max-width:70em;margin:auto}"


def page(document: "Document", suffix: str) -> str:
    """The whole page. suffix: ".html" or ".md"."""
    rows = [(s.source, s.target or "") for s in document.segments if s.source.strip()]
    names = [language or "" for language in document.languages]
    if suffix == ".md":
        lines = [f"| {a} | {b} |" for a, b in ((names[0], names[1]), ("---", "---"), *map(_cells, rows))]
        return "\n".join(lines) + "\n"
    source, target = (f' lang="{escape(name)}"' for name in names)
    body = "\n".join(f"<tr><td{source}>{_html(a)}</td><td{target}>{_html(b)}</td></tr>" for a, b in rows)
    head = f'<meta charset="utf-8"><title>{escape(" – ".join(names))}</title><style>{STYLE}</style>'
    table = f"<body><table>\n{body}\n</table></body>"
    return f"<!DOCTYPE html>\n<html{target}>\n<head>{head}</head>\n{table}\n</html>\n"


def _cells(row: tuple[str, str]) -> tuple[str, str]:
    a, b = (cell.replace("\\", "\\\\").replace("|", "\\|").replace("\n", "<br>") for cell in row)
    return a, b


def _html(text: str) -> str:
    return escape(text).replace("\n", "<br>")
