"""`templora sessions`: look at sessions, move in their past, copy, export, remove. No model is loaded."""

import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from templora.commands.running import one_line_errors, say
from templora.errors import InvalidRecipe, InvalidText, NotASession, OutputError, TemploraError

if TYPE_CHECKING:
    from rich.console import Console

    from templora.history import History
    from templora.store import Store
    from templora.versions import Version

app = typer.Typer(no_args_is_help=True, help="Sessions on disk: their past, copies, export, repair.")
Folder = Annotated[Path, typer.Argument(help="The session's folder.")]


@app.command()
def ls(folder: Annotated[Path, typer.Argument(help="Where to look.")] = Path()) -> None:
    """Sessions in a folder."""
    from rich.table import Table

    from templora import shelf

    with one_line_errors():
        if not folder.is_dir():
            raise NotASession(f"no folder {folder}; check the name")
        table = Table("session", "tokens", "chunks", "perplexity", "base", "recipe", "MB", box=None)
        for path in shelf.find(folder):
            try:
                head, tokens, chunks, adapted = shelf.summary(path)
            except TemploraError as error:
                table.add_row(_shown(path), *[""] * 4, _shown(f"cannot be opened: {error}"))
                continue
            perplexity = f"{adapted.perplexity:.2f}" if adapted.perplexity else ""
            counts = (f"{tokens:,}", f"{chunks:,}")
            size = sum(map(_size, path.rglob("*"))) / 2**20
            names = (head["base"]["name"], head["recipe"]["name"])
            table.add_row(_shown(path), *counts, perplexity, *map(_shown, names), f"{size:,.0f}")
        _screen().print(table)


@app.command()
def show(folder: Folder) -> None:
    """The versions of a session as a tree, with perplexities."""
    from rich.tree import Tree

    from templora import shelf
    from templora.versions import Versions

    with one_line_errors():
        head, history = shelf.look(folder)
        base = head["base"]["name"] or "a model in memory"
        title = f"{folder}: {len(history.ids):,} tokens on {base}, recipe {head['recipe']['name']}"
        root = Tree(_shown(title), highlight=False)
        names = shelf.names(folder)
        branches: dict[int, Tree] = {}
        versions = Versions(folder / shelf.VERSIONS).all()
        here = [v.number for v in versions if shelf.leads_to(v, history)]
        for version in versions:
            parent = next((branches[n] for n in reversed(version.ancestors) if n in branches), root)
            branches[version.number] = parent.add(_line(version, names))
        end: Tree = branches[here[-1]] if here else root
        end.add(f"now: {len(history.ids):,} tokens, {_last_words(history)!r}")
        _screen().print(root)


def _size(path: Path) -> int:
    """Of a file; another process that writes there may have taken it away by now."""
    try:
        return path.stat().st_size if path.is_file() else 0
    except OSError:
        return 0


def _screen() -> "Console":
    """Words as they are: a text may hold [brackets] and :colons:."""
    from rich.console import Console

    return Console(highlight=False, markup=False, emoji=False)


def _shown(name: str | Path) -> str:
    """A name that may be no UTF-8, on a screen that is."""
    return str(name).encode(errors="backslashreplace").decode()


def _line(version: "Version", names: dict[int, list[str]]) -> str:
    from templora.metrics import perplexity

    parts = [version.name, f"{version.tokens:,} tokens", f"{version.adapter:,} updates"]
    if version.scored:
        adapted = f"perplexity {perplexity(version.adapted_nll, version.scored):.2f}"
        bare = version.base_scored and f" (base {perplexity(version.base_nll, version.base_scored):.2f})"
        parts.append(adapted + (bare or ""))
    parts += [f"“{_shown(name)}”" for name in names.get(version.number, [])]
    return ", ".join(parts)


def _last_words(history: "History") -> str:
    return history.text.getvalue()[-50:]


@contextmanager
def _opened(folder: Path) -> "Generator[Store]":
    from templora.store import Store

    with one_line_errors():
        store = Store(folder)
        try:
            for warning in store.warnings:
                say(f"warning: {warning}")
            before = len(store.history.ids)
            yield store
            tokens, words = len(store.history.ids), _last_words(store.history)
            moved = f" ({tokens - before:+,})" if tokens != before else ""
            say(f"{folder} now has {tokens:,} tokens{moved} and ends {words!r}")
        finally:
            store.close()


@app.command()
def undo(
    folder: Folder,
    chunks: Annotated[int, typer.Option(min=1, help="An unfinished one counts as one.")] = 1,
) -> None:
    """Take back the last chunks, and what was learned from them."""
    with _opened(folder) as store:
        store.undo(chunks)


@app.command()
def redo(folder: Folder) -> None:
    """Take back the last undo."""
    with _opened(folder) as store:
        store.redo()


@app.command()
def rewind(
    folder: Folder, to: Annotated[str, typer.Argument(help="A number of tokens, a version (v12), or a note.")]
) -> None:
    """Go to an earlier moment, or to one on another branch."""
    with _opened(folder) as store:
        store.rewind(_moment(to))


def _moment(to: str) -> int | str:
    """A number of tokens, or a name; Python makes no number of thousands of digits."""
    return int(to) if to.isdecimal() and len(to) < 20 else to


@app.command()
def note(folder: Folder, name: Annotated[str, typer.Argument(help="For `rewind` and `fork --to`.")]) -> None:
    """Give this moment a name."""
    with _opened(folder) as store:
        InvalidText.check_note(name)
        here = [own for own in store.usable() if own.tokens == len(store.history.ids)]
        store.note(name, here[-1].number if here else None)


@app.command()
def fork(
    folder: Folder,
    new: Annotated[Path, typer.Argument(help="A folder that does not exist yet.")],
    to: Annotated[str | None, typer.Option(help="Go there at once: tokens, a version, a note.")] = None,
) -> None:
    """Copy a session; unchanged files are shared."""
    from templora.store import Store

    with one_line_errors():
        store = Store(folder)
        try:
            for warning in store.warnings:
                say(f"warning: {warning}")
            store.fork(new)
        finally:
            store.close()
    with _opened(new) as copy:
        if to is not None:
            try:
                copy.rewind(_moment(to))
            except TemploraError:
                shutil.rmtree(new)  # it was to be that moment's copy
                raise


@app.command()
def export(
    folder: Folder,
    out: Annotated[Path | None, typer.Option(help="A .txt, .md or .epub file; else to the screen.")] = None,
    title: Annotated[str | None, typer.Option(help="Of an EPUB.")] = None,
    language: Annotated[str, typer.Option(help="Of an EPUB.")] = "en",
) -> None:
    """The text of a session, chapters split at headings."""
    from templora import shelf
    from templora.formats import chapters

    with one_line_errors():
        text = shelf.look(folder)[1].text.getvalue()
        if out is None:
            typer.echo(text, nl=False, color=True)  # else its own control characters are left out
            return
        if out.suffix not in (".txt", ".md", ".epub"):
            raise InvalidRecipe(f"cannot export to {out.name!r}; choose .txt, .md or .epub")
        if out.exists():
            raise OutputError(f"{out} exists and is never overwritten; choose another --out")
        part = out.with_name(f".{out.name}.part")
        try:
            if out.suffix == ".epub":
                from templora.formats import epub

                epub.write(part, title or folder.resolve().name, chapters.split(text), language)
            else:
                whole = text if out.suffix == ".txt" else chapters.markdown(chapters.split(text))
                part.write_text(whole, "utf-8", newline="")
            os.replace(part, out)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise OutputError(f"cannot write {out}: {error.strerror}; choose another --out") from error
        say(f"saved to {out}")


@app.command()
def rm(
    folders: Annotated[list[Path], typer.Argument(help="Sessions.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Delete sessions, text and all."""
    from templora import shelf
    from templora.lock import Lock

    with one_line_errors():
        for folder in folders:
            if not shelf.exists(folder):
                raise NotASession(f"{folder} holds no session; nothing was deleted")
        names = ", ".join(map(str, folders))
        if not yes and not typer.confirm(f"Delete {names}, text and all?", err=True):
            say("nothing was deleted")
            raise typer.Exit(1)
        for folder in dict.fromkeys(folders):
            Lock(folder / shelf.LOCK).release()
            try:
                shutil.rmtree(folder)
            except OSError as error:
                reason = error.strerror or error  # rmtree's own have none
                raise OutputError(f"cannot delete {folder}: {reason}; check who may") from error
            say(f"{folder} is deleted")


@app.command()
def repair(folder: Folder) -> None:
    """Keep what comes before a damaged place in a session's journal; the damaged file stays beside it."""
    from templora import shelf

    with one_line_errors():
        lines, whole = shelf.repair(folder)
        if whole is None:
            say(f"all {lines:,} lines are good and stay")
        else:
            say(f"{lines:,} lines are good and stay; what was there before is in {whole}")
