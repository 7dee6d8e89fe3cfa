"""`templora write`: continue a text, learning it on the way."""

import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from templora import shelf
from templora.commands.inputs import decoded, text_of
from templora.commands.opening import Wanted, begun, behind, given, has_read, opened, repeated, unread
from templora.commands.options import Context, Device, Dtype, Model, Pairs, RecipeName, Window
from templora.commands.prompts import write_all
from templora.commands.running import INTERRUPTED, compared, interruptible, one_line_errors, say
from templora.errors import InvalidRecipe, InvalidText

if TYPE_CHECKING:
    from templora.events import End, Event
    from templora.session import Session

# Options that a text needs again when it goes on; a session on disk keeps the second kind by itself.
DRAW = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
DRY = ("dry_multiplier", "dry_base", "dry_allowed_length")
HOW = frozenset([*DRAW, *DRY, "stop", "stop_at_eos", "base"])
OF_SESSION = frozenset(
    ["model", "recipe", "set_", "window", "chunk", "context", "seed", "dtype", "device", "parallel"]
)

HELP = """
Continue a text, learning it on the way.

**Examples**

    templora write "It was a dark and stormy night" --tokens 2000 --out novel.txt

    templora write --read novel.txt --out novel.txt --tokens 2000

    templora write "It was a dark and stormy night" --session my-novel

    templora write --prompt-file opening.txt --model ./my-model --window 2048 --json

    templora write --prompts openings.txt --batch 8 --out-dir novels
"""


def write(
    context_: typer.Context,
    prompt: Annotated[str | None, typer.Argument(help="The text to continue.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="A file with the prompt; - is stdin.")] = None,
    read: Annotated[list[Path] | None, typer.Option(help="Text to learn first; may be repeated.")] = None,
    session: Annotated[
        Path | None, typer.Option(help="A folder that keeps text and adapter; continued if it exists.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="How many tokens to write.")] = 1000,
    out: Annotated[
        Path | None, typer.Option(help="A new file for the text, or the one from --read, which goes on.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help='Several prompts: one a line, or .jsonl with "prompt" and "name".')
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="How many of --prompts at once.")] = 8,
    out_dir: Annotated[Path | None, typer.Option(help="A folder for the texts of --prompts.")] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Keep those texts of --prompts that are finished; write the rest."),
    ] = False,
    model: Model = "novelist",
    recipe: RecipeName = "default",
    set_: Pairs = None,
    window: Window = None,
    chunk: Annotated[int | None, typer.Option(help="Tokens written, then learned.")] = None,
    context: Context = None,
    seed: Annotated[int, typer.Option(help="Same seed, same text.")] = 0,
    temperature: Annotated[
        float | None,
        typer.Option(help="0: the likeliest token. This and the next: by default the model's own."),
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Only the k likeliest tokens; 0 switches it off.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Only the likeliest that make up p; 1: off.")] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Only those with p times the likeliest's; 0: off.")
    ] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="1 switches it off.")] = None,
    dry_multiplier: Annotated[
        float | None, typer.Option(help="DRY: against spans that repeat; 0 switches it off.")
    ] = None,
    dry_base: Annotated[float | None, typer.Option(help="DRY: growth with each token of a span.")] = None,
    dry_allowed_length: Annotated[int | None, typer.Option(help="DRY: tokens that may repeat.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End where this string appears.")] = None,
    stop_at_eos: Annotated[bool, typer.Option(help="End where the model ends a document.")] = False,
    base: Annotated[bool, typer.Option(help="Also measure perplexity under the bare base.")] = True,
    parallel: Annotated[
        bool, typer.Option("--parallel", help="Learn each chunk while the next is written, a chunk behind.")
    ] = False,
    dtype: Dtype = None,
    device: Device = None,
    json: Annotated[bool, typer.Option("--json", help="One event a line.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No text on the screen.")] = False,
) -> None:
    """Continue a text."""
    with one_line_errors():
        sampling = {name: context_.params[name] for name in (*DRAW, *DRY)}
        sizes = {"window": window, "chunk": chunk, "context": context}
        wanted = Wanted(model, recipe, set_ or [], sizes, seed, dtype, device, given(context_), parallel)
        if prompts is not None:
            how = {"stop": stop or (), "stop_at_eos": stop_at_eos, "score_base": base}
            wishes = {"tokens": tokens, "draw": sampling, **how}
            write_all(wanted, prompts, out_dir, batch, wishes, resume=resume, json=json)
            return
        if lost := given(context_) & {"batch", "out_dir", "resume"}:
            raise InvalidRecipe(
                f"--{min(lost).replace('_', '-')} goes with --prompts; leave it out, or give both"
            )
        if parallel and session is not None:
            raise InvalidRecipe("a session on disk learns in turn; leave out --parallel or --session")
        goes_on = bool(read) or (session is not None and shelf.exists(session))
        opening = _opening(prompt, prompt_file, goes_on)
        texts = {path: text_of(path) for path in read or []}
        path = out
        if path is None and session is None:
            path = Path(f"templora-{datetime.now():%Y%m%d-%H%M%S}.txt")
        append = path is not None and any(path.exists() and path.samefile(r) for r in read or [])
        within = path is not None and session in path.parents  # a folder that may not be there yet
        _refuse_early(None if within else path, append, stop or (), sampling)
        from templora.sampling import Sampling

        made = begun(wanted) if session is None else opened(session, wanted)
        with made:
            wishes = {
                "stop": stop or (),
                "stop_at_eos": stop_at_eos,
                "score_base": base,
                "sampling": Sampling.of(made.base.model.generation_config, **sampling),
            }
            again = repeated(context_, HOW if session else HOW | OF_SESSION)
            origin = "" if prompt_file is None else f" --prompt-file {shlex.quote(str(prompt_file))}"
            lacking = ""
            for own in texts if append else ():
                if path is not None and path.samefile(own) and (lacking := behind(made, texts[own])):
                    say(f"{path} lacks the last {len(lacking):,} characters of {session}; they are added")
                    texts[own] += lacking
            job = _Job(made, session, opening, origin, texts, tokens, path, append, wishes, again, lacking)
            _write(job, json=json, quiet=quiet)


@dataclass(frozen=True, slots=True)
class _Job:
    """What to write: after which texts, how much, where to, with which wishes for `Session.write`.

    folder: of a session on disk. opening: the prompt. origin: the option that it came from. given: what to
    learn first, by file. path: a file for the text. again: options to repeat when going on. lacking: what of
    the session that file has not got. came_to: what was given so far.
    """

    session: "Session"
    folder: Path | None
    opening: str
    origin: str
    given: dict[Path, str]
    tokens: int
    path: Path | None
    append: bool
    wishes: dict[str, Any]
    again: str
    lacking: str = ""
    came_to: list[str] = field(default_factory=list[str])

    def events(self) -> "Iterator[Event]":
        """Learn what is given, then write."""
        told = self.has_prompt
        for text in (*self.given.values(), self.opening):
            self.came_to.append(text)
            new = unread(self.session, text) if text is not self.opening else "" if told else text
            if new:
                yield from self.session.reading(new, score_base=self.wishes["score_base"])
        yield from self.session.write(self.tokens, **self.wishes)

    @property
    def has_prompt(self) -> bool:
        """Whether the session was given the prompt before."""
        return has_read(self.session, self.opening, after=len(self.given))

    @property
    def is_empty(self) -> bool:
        """Whether nothing came after what was learned first, so that there is no new file."""
        learned = "".join(self.given.values())
        return not self.append and not self.opening and learned.startswith(self.session.text)

    @property
    def going_on(self) -> str:
        """The command that goes on, with what was not given yet."""
        words = "templora write"
        if self.folder is not None:
            left = [path for path, text in self.given.items() if text not in self.came_to]
            words += "".join(f" --read {shlex.quote(str(path))}" for path in left)
            if self.opening and self.opening not in self.came_to:
                words += self.origin or f" {shlex.quote(self.opening)}"
            words += f" --session {shlex.quote(str(self.folder))}"
        else:
            # The prompt is in the file; what was learned before it must be learned again.
            files = [*self.given, *([] if self.append or self.is_empty else [self.path])]
            words += "".join(f" --read {shlex.quote(str(path))}" for path in files)
            words += f" --out {shlex.quote(str(self.path))}"
        return f"{words} --tokens {self.tokens}{self.again}"


def _refuse_early(path: Path | None, append: bool, stop: Sequence[str], sampling: dict[str, Any]) -> None:
    """See that the text can be saved and drawn as wished, before a base is loaded or a session begun.

    Raises:
        OutputError, InvalidText, InvalidRecipe: it cannot.
    """
    from templora.pen import Wishes
    from templora.sampling import Sampling
    from templora.text_file import TextFile

    if path is not None:
        with TextFile(path, append=append):  # nothing is left of the try
            pass
    Wishes(0, Sampling.of(None, **sampling), None, stop, False, False)


def _write(job: _Job, *, json: bool, quiet: bool) -> None:
    from templora import report
    from templora.events import End
    from templora.text_file import TextFile

    status = report.Status(job.tokens, job.session.plan.window)
    sink = report.JsonLines() if json else report.Quiet() if quiet else report.screen_or_plain(status)
    end: End | None = None
    with ExitStack() as stack:
        sinks: list[report.Sink] = [stack.enter_context(sink)]
        if job.path is not None:
            file = stack.enter_context(TextFile(job.path, append=job.append))
            # A file that goes on holds the text already.
            file.echo(job.lacking if job.append else job.session.text)
            sinks.insert(0, file)
        interrupted = stack.enter_context(interruptible())
        if not job.has_prompt:
            for each in sinks:
                each.echo(job.opening)
        for event in report.send(job.events(), sinks):
            end = event if isinstance(event, End) else end
            if interrupted:
                break
    _closing_lines(job, end)
    if interrupted:
        raise typer.Exit(INTERRUPTED)


def _closing_lines(job: _Job, end: "End | None") -> None:
    """Where the text is, what the adapter was worth, and how to go on; to stderr."""
    if end and end.adapted_perplexity and end.base_perplexity:
        change = compared(end.base_perplexity, end.adapted_perplexity)
        say(f"perplexity of {end.scored_tokens:,} tokens: {change}")
    if job.folder is None and job.is_empty:
        say("nothing was written" if end else "interrupted before anything was written")
    else:
        state = "saved to" if end else "interrupted; all that was written is in"
        say(f"{state} {shlex.quote(str(job.folder or job.path))}")
    say(f"go on with: {job.going_on}")


def _opening(prompt: str | None, prompt_file: Path | None, goes_on: bool) -> str:
    if prompt is not None and prompt_file is not None:
        raise InvalidText("a prompt and --prompt-file were both given; give one of them")
    if prompt_file == Path("-"):
        text = decoded(sys.stdin.buffer.read(), Path("stdin"))
    else:
        text = text_of(prompt_file) if prompt_file is not None else prompt or ""
    InvalidText.check(text, "the prompt")
    if not text.strip() and not goes_on:
        raise InvalidText('the prompt is empty; say for example: templora write "It was a dark night"')
    return text
