"""`templora translate`: a book from one language to another, learned on the way."""

import shlex
import signal
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from templora import shelf
from templora.commands.inputs import load_base, load_recipe, translation_sizes
from templora.commands.options import Device, Dtype, Model, Pairs, RecipeName
from templora.commands.reviewing import Folder, ask, terms_of
from templora.commands.running import (
    INTERRUPTED,
    compared,
    interruptible,
    make_folder,
    one_line_errors,
    say,
)
from templora.errors import InvalidRecipe, InvalidText, OutputError, TemploraError

if TYPE_CHECKING:
    from templora.events import Event
    from templora.formats.bilingual import Document
    from templora.tasks.ledger import Ledger
    from templora.tasks.passages import Block
    from templora.tasks.translate import Translator

HELP = """
Translate a book passage by passage; each pair is learned before the next passage.

**Examples**

    templora translate novel.txt --from zh --to en --out novel.en.txt --model Qwen/Qwen3-4B

    templora translate novel.epub --from fr --to de --out roman.epub --review --glossary terms.csv

The same command again goes on where it was stopped.
"""


def translate(
    source: Annotated[Path, typer.Argument(help="txt, Markdown, TSV, TMX, XLIFF, EPUB.")],
    from_: Annotated[str, typer.Option("--from", help="Language of the source, such as zh.")],
    to: Annotated[str, typer.Option("--to", help="Language of the translation.")],
    out: Annotated[Path, typer.Option(help="The translation, in the same kind of file; .html, .md: both.")],
    model: Model = "novelist",
    recipe: RecipeName = "default",
    set_: Pairs = None,
    context_pairs: Annotated[int, typer.Option(min=0, help="Earlier pairs that a prompt holds.")] = 1,
    prompt_template: Annotated[str, typer.Option(help="auto, plain, chat, or a YAML file.")] = "auto",
    references: Annotated[Path | None, typer.Option(help="Given translations: learned as they are.")] = None,
    corrections: Annotated[Path | None, typer.Option(help="A folder, a file a passage, to edit.")] = None,
    review: Annotated[bool, typer.Option("--review", help="Accept or edit each passage.")] = False,
    glossary: Annotated[Path | None, typer.Option(help="CSV: source term, target term.")] = None,
    session: Annotated[Path | None, typer.Option(help="Where it lives; by default OUT.session.")] = None,
    window: Annotated[int | None, typer.Option(help="Tokens of a prompt, at most.")] = None,
    chunk: Annotated[int | None, typer.Option(help="Tokens of a translation, at most.")] = None,
    passage: Annotated[int | None, typer.Option(min=1, help="Tokens of a source passage, at most.")] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0: the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option()] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Do not show the translations.")] = False,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Translate a book."""
    with one_line_errors(), ExitStack() as stack:
        from templora.formats import bilingual
        from templora.tasks.passages import blocks
        from templora.tasks.translate import Translator, drawing
        from templora.template import load

        if not (from_.strip() and to.strip()):
            raise InvalidRecipe("--from and --to name two languages; say for example --from zh --to en")
        folder = session or out.with_name(f"{out.name}.session")
        # A source that is not there is the reader's to complain about.
        is_source = out.exists() and source.exists() and out.samefile(source)
        if is_source or (out.exists() and not shelf.exists(folder)):
            raise OutputError(f"{out} exists and is never overwritten; choose another --out")
        if out.absolute() in [place.absolute() for place in (folder, corrections) if place]:
            raise OutputError(f"{out} cannot be a folder as well; choose another --out")
        document = _read(source, (from_, to))
        sources = [segment.source for segment in document.segments]
        if not any(text.strip() for text in sources):
            raise InvalidText(f"{source} holds no text; give a file that does")
        kept = _translated(document)
        given = kept if any(kept) else None
        if given and references is None:
            said = f"{sum(map(bool, kept)):,} of its {len(kept):,} segments have a translation"
            say(f"{source}: {said}: learned as they are, and kept")
        if references is not None:
            given = _references(references, len(sources), (from_, to))
        if review and given and all(g for g, text in zip(given, sources, strict=True) if text.strip()):
            raise InvalidRecipe(f"{references or source} leaves no draft to review; leave out --review")
        make_folder(out.parent, "--out")
        bilingual.check(out, source)
        chosen = load_recipe(recipe, set_ or [], {"window": window, "chunk": chunk})
        base = load_base(model, dtype, device)
        sizes = translation_sizes(chosen, window, chunk, base.positions)
        made = base.session(load_recipe(recipe, set_ or [], sizes), seed=seed)
        stack.callback(made.discard)
        translator = Translator(
            made,
            load(prompt_template, base, from_, to),
            context_pairs,
            drawing(base.model.generation_config, temperature),
            terms_of(glossary) if glossary else {},
            review=ask if review else None,
        )
        # An earlier pair takes about two passages of room, and so do a passage and its translation.
        budget = passage or max(16, min(made.plan.window, made.plan.chunk) // (2 * context_pairs + 2))
        count = lambda text: len(base.encode(text))  # noqa: E731
        own = [bool(text) for text in kept] if references is None and given else ()
        parts = blocks(sources, from_, count, budget, split=references is None, whole=own)
        settings = {
            "from": from_,
            "to": to,
            "template": prompt_template,
            "wording": translator.template.digest,
            "pairs": context_pairs,
            "passage": budget,
            "terms": translator.terms,
        }
        job = _Job(source, out, parts, given, kept, Folder(corrections) if corrections else None, quiet)
        if job.corrections:
            job.corrections.check(parts, begun=shelf.exists(folder))
        ledger = _opened(folder, translator, settings)
        stack.callback(ledger.close)
        job.check(ledger)
        ledger.writes_to(out)
        interrupted = stack.enter_context(interruptible())
        try:
            job.run(ledger, translator, interrupted)
        except BaseException:
            with suppress(TemploraError):  # what went wrong first is what is said
                _write(job, document, ledger, (from_, to))
            raise
        _write(job, document, ledger, (from_, to))
        if interrupted:
            say("interrupted; go on with the same command")
            raise typer.Exit(INTERRUPTED)


@dataclass(frozen=True, slots=True)
class _Job:
    """What to translate and where to.

    given: a translation of each segment to learn. kept: that which the source has itself. "" where is none.
    """

    source: Path
    out: Path
    parts: "list[Block]"
    given: list[str] | None
    kept: list[str]
    corrections: Folder | None
    quiet: bool

    def run(self, ledger: "Ledger", translator: "Translator", interrupted: list[int]) -> None:
        """Passage after passage, until all are done or someone asks to stop."""
        from templora.metrics import Tally, count
        from templora.report import ScoreStatus
        from templora.tasks.translate import Passage

        if self.corrections:
            for number, target in self.corrections.changed(ledger.records):
                ledger.correct(number, target)
                say(f"passage {number} was corrected; what follows is learned anew")
            self.corrections.complete(ledger.records)
        for event in ledger.restore(translator):
            _warn([event])
            if interrupted:
                return
        left = enumerate(self.parts[len(ledger.records) :], len(ledger.records))
        if self.corrections and any(self.corrections.given(number, part) for number, part in left):
            say(f"{self.corrections.path} holds translations of passages to come: learned as they are")
        base, adapted = Tally(), Tally()
        with ScoreStatus(self.source.name, 0) as status:
            for part in self.parts[len(ledger.records) :]:
                if interrupted:
                    return
                passage = Passage(part.source, self._reference(part, len(ledger.records)))
                try:
                    events = ledger.translate(translator, passage)
                except typer.Abort:  # at the question about a draft
                    say("")
                    interrupted.append(signal.SIGINT)
                    return
                _warn(events)
                for event in events:
                    count(event, base, adapted)
                record = ledger.records[-1]
                if not self.quiet:
                    typer.echo(record.target + "\n")
                if self.corrections:
                    self.corrections.store(len(ledger.records) - 1, record)
                status.passages(len(ledger.records), len(self.parts), base, adapted)
        _warn(ledger.save(translator))
        if adapted.perplexity and base.perplexity:
            say(f"perplexity {compared(base.perplexity, adapted.perplexity)}")

    def _reference(self, part: "Block", number: int) -> str | None:
        """The given translation of a passage, a line a segment; None: it must be drafted."""
        if self.corrections and (corrected := self.corrections.given(number, part)):
            return corrected
        if self.given is None:
            return None
        lines = [self.given[place] for place in part.places]
        if all(lines):
            return "\n".join(lines)
        # Half of a translation would be learned as the whole of it.
        if any(lines):
            lacking = f"{lines.count('')} of its {len(lines)} segments have no reference"
            say(f"warning: passage {number}: {lacking}; the model translates all of it")
        return None

    def check(self, ledger: "Ledger") -> None:
        """See that what is translated already is of this source.

        Raises:
            InvalidText: it is of another one.
        """
        for number, (part, record) in enumerate(zip(self.parts, ledger.records, strict=False)):
            if part.source != record.source:
                raise InvalidText(
                    f"passage {number} of {self.source} is not what {ledger.folder} has translated; give the "
                    "same source, or another --session"
                )
        if len(ledger.records) > len(self.parts):
            raise InvalidText(
                f"{self.source} has {len(self.parts)} passages, {ledger.folder} has translated "
                f"{len(ledger.records)}; give the same source, or another --session"
            )


def _opened(folder: Path, translator: "Translator", settings: dict[str, Any]) -> "Ledger":
    from templora import header
    from templora.store import BUDGET
    from templora.tasks.ledger import Ledger

    session = translator.session
    described = session.base.describe()
    if not shelf.exists(folder):
        head = header.made(described, session.recipe, session.seed, BUDGET)
        return Ledger.create(folder, head, settings)
    ledger = Ledger(folder)
    try:
        ledger.check(described, settings, session.recipe, session.seed)
    except BaseException:
        ledger.close()
        raise
    return ledger


def _warn(events: "Iterable[Event]") -> None:
    from templora.events import Warned

    for event in events:
        if isinstance(event, Warned):
            say(f"warning: {event.message}")


def _write(job: _Job, document: "Document", ledger: "Ledger", languages: tuple[str, str]) -> None:
    """The whole document with what is translated so far, if anything is."""
    from templora.formats import bilingual
    from templora.tasks.passages import assembled

    if not ledger.records:
        return
    targets = [record.target for record in ledger.records]
    lines = assembled(job.parts, targets, len(document.segments), languages[1])
    lines = ["" if old else new for old, new in zip(job.kept, lines, strict=True)]
    whole = document.translated(lines, *languages)
    ready = partial(ledger.writes, job.out)
    bilingual.write(job.out, whole, job.source, ready=ready)
    place = shlex.quote(str(job.out))
    say(f"{len(targets)} of {len(job.parts)} passages are in {place}; the session is {ledger.folder}")


def _read(path: Path, languages: tuple[str, str]) -> "Document":
    from templora.formats import bilingual

    document = bilingual.read(path, languages)
    if document.guessed:
        say(f"{path} is not UTF-8; read as {document.guessed} (if that is wrong, convert it to UTF-8)")
    return document


def _translated(document: "Document") -> list[str]:
    """The translations that a file has already, each in one line as sources are; "" where there is none."""
    from templora.tasks.passages import in_one_line

    pairs = ((s.source.strip(), (s.target or "").strip()) for s in document.segments)
    return [in_one_line(target) if target != source else "" for source, target in pairs]


def _references(path: Path, segments: int, languages: tuple[str, str]) -> list[str]:
    """The translation of each segment in one line, as sources are; "" where there is none.

    Raises:
        InvalidText: they are not as many as the source's, or none is translated.
    """
    from templora.formats import bilingual
    from templora.tasks.passages import in_one_line

    found = _read(path, languages).segments
    if len(found) != segments:
        raise InvalidText(f"{path} has {len(found)} segments, the source {segments}; they must match")
    # In a file of one column the lines themselves are the translations; elsewhere they are the sources.
    alone = path.suffix.lower() not in bilingual.TOOLKIT and all(s.target is None for s in found)
    texts = [s.source if alone else s.target or "" for s in found]
    if not any(text.strip() for text in texts):
        raise InvalidText(f"{path} holds no translations; leave out --references, or give a file that does")
    return [in_one_line(text) if text.strip() else "" for text in texts]
