"""`templora translate`: a book from one language to another, learned on the way."""

import shlex
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from templora.commands.inputs import load_base, load_recipe, translation_sizes
from templora.commands.opening import exists
from templora.commands.options import Device, Dtype, Model, Pairs, RecipeName
from templora.commands.reviewing import Folder, ask, terms_of
from templora.commands.running import INTERRUPTED, interruptible, one_line_errors, say
from templora.errors import InvalidText, OutputError

if TYPE_CHECKING:
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

        folder = session or out.with_name(f"{out.name}.session")
        # A source that is not there is the reader's to complain about.
        is_source = out.exists() and source.exists() and out.samefile(source)
        if is_source or (out.exists() and not exists(folder)):
            raise OutputError(f"{out} exists and is never overwritten; choose another --out")
        bilingual.check(out, source)
        document = bilingual.read(source, (from_, to))
        sources = [segment.source for segment in document.segments]
        if not any(text.strip() for text in sources):
            raise InvalidText(f"{source} holds no text; give a file that does")
        given = None if references is None else _references(references, len(sources), (from_, to))
        base = load_base(model, dtype, device)
        sizes = translation_sizes(window, chunk, base.positions)
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
        parts = blocks(sources, from_, count, budget, split=given is None)
        settings = {
            "from": from_,
            "to": to,
            "template": prompt_template,
            "pairs": context_pairs,
            "passage": budget,
            "terms": translator.terms,
        }
        ledger = _opened(folder, translator, settings)
        stack.callback(ledger.close)
        ledger.writes_to(out)
        job = _Job(source, out, parts, given, Folder(corrections) if corrections else None, quiet)
        interrupted = stack.enter_context(interruptible())
        for _ in job.run(ledger, translator, interrupted):
            pass
        _write(job, document, [record.target for record in ledger.records], (from_, to))
        done = len(ledger.records)
        say(f"{done} of {len(parts)} passages are in {shlex.quote(str(out))}; the session is {folder}")
        if interrupted:
            say("interrupted; go on with the same command")
            raise typer.Exit(INTERRUPTED)


@dataclass(frozen=True, slots=True)
class _Job:
    """What to translate and where to; given: a translation of each segment, "" where there is none."""

    source: Path
    out: Path
    parts: "list[Block]"
    given: list[str] | None
    corrections: Folder | None
    quiet: bool

    def run(self, ledger: "Ledger", translator: "Translator", interrupted: list[int]) -> Iterator[None]:
        """Passage after passage, until all are done or someone asks to stop."""
        from templora.events import ChunkScored, Warned
        from templora.metrics import Tally, count
        from templora.report import ScoreStatus
        from templora.tasks.translate import Passage

        self._check(ledger)
        if self.corrections:
            for number, target in self.corrections.changed(ledger.records):
                ledger.correct(number, target)
                say(f"passage {number} was corrected; what follows is learned anew")
            self.corrections.complete(ledger.records)
        for event in ledger.restore(translator):
            if isinstance(event, Warned):
                say(f"warning: {event.message}")
        base, adapted = Tally(), Tally()
        with ScoreStatus(self.source.name, 0) as status:
            for part in self.parts[len(ledger.records) :]:
                if interrupted:
                    return
                passage = Passage(part.source, self._reference(part, len(ledger.records)))
                for event in ledger.translate(translator, passage):
                    if isinstance(event, Warned):
                        say(f"warning: {event.message}")
                    if isinstance(event, ChunkScored):
                        count(event, base, adapted)
                record = ledger.records[-1]
                if not self.quiet:
                    typer.echo(record.target + "\n")
                if self.corrections:
                    self.corrections.store(len(ledger.records) - 1, record)
                status.passages(len(ledger.records), len(self.parts), base, adapted)
                yield
        ledger.save(translator)
        if adapted.perplexity and base.perplexity:
            change = 100 * (adapted.perplexity / base.perplexity - 1)
            say(f"perplexity base {base.perplexity:.2f}, adapter {adapted.perplexity:.2f} ({change:+.1f} %)")

    def _reference(self, part: "Block", number: int) -> str | None:
        """The given translation of a passage, a line a segment; None: it must be drafted."""
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

    def _check(self, ledger: "Ledger") -> None:
        for number, (part, record) in enumerate(zip(self.parts, ledger.records, strict=False)):
            if part.source != record.source:
                raise InvalidText(
                    f"passage {number} of {self.source} is not what {ledger.folder} has translated; give the "
                    "same source, or another --session"
                )


def _opened(folder: Path, translator: "Translator", settings: dict[str, Any]) -> "Ledger":
    from templora import header
    from templora.store import BUDGET
    from templora.tasks.ledger import Ledger

    session = translator.session
    described = session.base.describe()
    if not exists(folder):
        head = header.made(described, session.recipe, session.seed, BUDGET)
        return Ledger.create(folder, head, settings)
    ledger = Ledger(folder)
    try:
        ledger.check(described, settings, session.recipe, session.seed)
    except BaseException:
        ledger.close()
        raise
    return ledger


def _write(job: _Job, document: Any, targets: list[str], languages: tuple[str, str]) -> None:
    """The whole document with what is translated so far."""
    from templora.formats import bilingual
    from templora.tasks.passages import assembled

    lines = assembled(job.parts, targets, len(document.segments), languages[1])
    bilingual.write(job.out, document.translated(lines, *languages), job.source, overwrite=True)


def _references(path: Path, segments: int, languages: tuple[str, str]) -> list[str]:
    """The translation of each segment in one line, as sources are; "" where there is none.

    Raises:
        InvalidText: they are not as many as the source's, or none is translated.
    """
    from templora.formats import bilingual

    found = bilingual.read(path, languages).segments
    if len(found) != segments:
        raise InvalidText(f"{path} has {len(found)} segments, the source {segments}; they must match")
    # In a file of one column the lines themselves are the translations; elsewhere they are the sources.
    alone = path.suffix.lower() not in bilingual.TOOLKIT and all(s.target is None for s in found)
    texts = [s.source if alone else s.target or "" for s in found]
    if not any(text.strip() for text in texts):
        raise InvalidText(f"{path} holds no translations; leave out --references, or give a file that does")
    return [" ".join(text.split()) for text in texts]
