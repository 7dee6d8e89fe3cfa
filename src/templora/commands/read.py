"""`templora read`: learn books into a session."""

import shlex
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated

import typer

from templora.commands.opening import Wanted, given, opened, unread
from templora.commands.options import Context, Device, Dtype, Model, Pairs, RecipeName, Window
from templora.commands.running import INTERRUPTED, interruptible, one_line_errors, say

if TYPE_CHECKING:
    from collections.abc import Iterator

    from templora.durable import DurableSession
    from templora.events import Event

HELP = """
Learn books into a session; `templora write --session DIR` then continues them.

**Examples**

    templora read novel.epub --session my-novel

    templora read part-1.docx part-2.txt --session my-novel --recipe paper
"""


def read(
    context_: typer.Context,
    files: Annotated[list[Path], typer.Argument(help="txt, Markdown, EPUB, DOCX; any encoding.")],
    session: Annotated[Path, typer.Option(help="The session's folder; made if it does not exist.")],
    model: Model = "novelist",
    recipe: RecipeName = "default",
    set_: Pairs = None,
    window: Window = None,
    chunk: Annotated[int | None, typer.Option(help="Tokens learned at once.")] = None,
    context: Context = None,
    seed: Annotated[int, typer.Option(help="Of the adapter's start and of sampling.")] = 0,
    encoding: Annotated[str | None, typer.Option(help="Of plain text; else UTF-8 or guessed.")] = None,
    base: Annotated[bool, typer.Option(help="Also measure perplexity under the bare base.")] = False,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Learn books into a session."""
    with one_line_errors():
        from templora.formats import book

        books = [(path, book.read(path, encoding)) for path in files]
        for path, each in books:
            if each.guessed:
                say(f"{path} is not UTF-8; read as {each.guessed} (if that is wrong, say --encoding)")
        sizes = {"window": window, "chunk": chunk, "context": context}
        wanted = Wanted(model, recipe, set_ or [], sizes, seed, dtype, device, given(context_))
        with opened(session, wanted) as opened_, interruptible() as interrupted:
            for path, each in books:
                if not interrupted:
                    _learn(opened_, session, path, each.text, base, interrupted)
            tokens = len(opened_.ids)
        if interrupted:
            say("interrupted; go on with the same command")
            raise typer.Exit(INTERRUPTED)
        go_on = f"templora write --session {shlex.quote(str(session))}"
        say(f"{session} holds {tokens:,} tokens; go on with: {go_on}")


def _learn(
    session: "DurableSession", folder: Path, path: Path, text: str, score_base: bool, interrupted: list[int]
) -> None:
    from templora.events import Warned
    from templora.metrics import Tally, count
    from templora.report import ScoreStatus

    events: Iterator[Event]
    if not (new := unread(session, text)):
        say(f"{path} is in {folder} already; learning what is left of it")
        events = session.learning(score_base=score_base)
        goal = len(session.ids)
    else:
        events = session.reading(new, score_base=score_base)
        goal = len(session.base.encode(new))
    base, adapted, started = Tally(), Tally(), perf_counter()
    with ScoreStatus(path.name, goal) as status:
        for event in events:
            count(event, base, adapted)
            status.show(base, adapted)
            if isinstance(event, Warned):
                say(f"warning: {event.message}")
            if interrupted:
                return
    parts = [f"{path}: {adapted.tokens:,} tokens learned in {perf_counter() - started:.0f} s"]
    if adapted.perplexity is not None:
        parts.append("perplexity" + (f" base {base.perplexity:.2f}," if base.perplexity else ""))
        parts[-1] += f" adapter {adapted.perplexity:.2f}"
    say(", ".join(parts))
