"""`templora score`: how much the adapter knows of a text, measured token by token."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from templora.bench.checkpoint import Checkpoint, digest
from templora.bench.results import Results
from templora.commands.inputs import load_base, load_recipe, text_of
from templora.commands.options import Batch, Context, Device, Dtype, Model, Pairs, RecipeName, Window
from templora.commands.running import INTERRUPTED, interruptible, one_line_errors, say
from templora.errors import InvalidText, OutputError, TemploraError
from templora.events import ChunkScored
from templora.recipe import fitted, refitted

if TYPE_CHECKING:
    from templora.base import Base
    from templora.recipe import Recipe

HELP = """
Measure perplexity: each token is scored by an adapter that has seen only earlier tokens.

**Examples**

    templora score novel.txt --tokens 20000

    templora score *.txt --recipe paper --window 1024 --json scores.json --plot scores.png

    templora score *.txt --batch 8 --json scores.json
"""


def score(
    files: Annotated[list[Path], typer.Argument(help="Texts, UTF-8, plain or .xz.")],
    tokens: Annotated[int | None, typer.Option(min=1, help="Score at most so many tokens of each.")] = None,
    skip: Annotated[int, typer.Option(min=0, help="Leave out so many tokens first.")] = 0,
    model: Model = "novelist",
    recipe: RecipeName = "default",
    set_: Pairs = None,
    window: Window = None,
    chunk: Annotated[int | None, typer.Option(help="Tokens scored, then learned.")] = None,
    context: Context = None,
    seed: Annotated[int, typer.Option(help="Of the adapter's start.")] = 0,
    base: Annotated[bool, typer.Option(help="Also score under the bare base.")] = True,
    json_: Annotated[Path | None, typer.Option("--json", help="For results; - is the screen.")] = None,
    plot: Annotated[Path | None, typer.Option(help="A picture: perplexity by position.")] = None,
    resume: Annotated[bool, typer.Option(help="Keep what --json holds; do the rest.")] = False,
    batch: Batch = 1,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Score texts."""
    with one_line_errors():
        to_screen = json_ == Path("-")
        if resume and (json_ is None or to_screen):
            raise OutputError("without a file of results there is nothing to resume; name it with --json")
        if json_ is not None and plot is not None and json_.resolve() == plot.resolve():
            raise OutputError(f"{json_} cannot hold results and a picture; choose two names")
        # What cannot be stored or drawn is said before hours of scoring.
        files = list(dict.fromkeys(files))  # each once, whether at once with others or after them
        results = Results(None if to_screen else json_, resume=resume, order=[*map(str, files)])
        if plot is not None:
            from templora.bench.plot import see_drawable

            see_drawable(plot, replace=resume)
        made = load_recipe(recipe, set_ or [], {"window": window, "chunk": chunk, "context": context})
        job = Job(load_base(model, dtype, device), made, seed, tokens, skip, base)
        before = len(results.done)
        with interruptible() as interrupted:
            failed = score_all(job, files, results, interrupted, batch)
        if results.path and len(results.done) == before and not (failed or interrupted):
            say(f"all of these were scored before; their results are in {results.path}")
        if to_screen:
            typer.echo(json.dumps(results.done, indent=1))
        if plot is not None and results.done:
            from templora.bench.plot import plot_by_position

            plot_by_position(results.done, plot)
        if interrupted:
            say("interrupted; go on with the same command and --resume" if results.path else "interrupted")
            raise typer.Exit(INTERRUPTED)
        if failed:
            raise typer.Exit(2)


@dataclass(frozen=True, slots=True)
class Job:
    """How each document is scored."""

    base: "Base"
    recipe: "Recipe"
    seed: int
    tokens: int | None
    skip: int
    score_base: bool

    def ids(self, text: str) -> list[int]:
        """The tokens of a text that are scored.

        Raises:
            InvalidText: there are none.
        """
        ids = self.base.encode(text)[self.skip : None if self.tokens is None else self.skip + self.tokens]
        if len(self.base.prefix_ids) + len(ids) < 2:  # the first of all is never scored
            raise InvalidText(f"no token is left to score after --skip {self.skip}; skip fewer")
        return ids

    @property
    def asked(self) -> dict[str, Any]:
        """What of each text is scored, and how."""
        return {"tokens": self.tokens, "skip": self.skip, "base": self.score_base}

    def said_of(self, ids: list[int]) -> dict[str, Any]:
        """The part of a text's result that says what was scored of it."""
        return {"asked": self.asked | {"text": digest(ids)}}

    def say_sizes(self) -> None:
        """Say, once for all texts, which sizes this base cannot hold.

        Raises:
            WindowTooLarge: they were asked for.
        """
        if sizes := refitted(self.recipe, fitted(self.recipe, self.base.positions)[1]):
            say(f"warning: this base has {self.base.positions} positions: {sizes}")

    def refuse(self, entry: dict[str, Any]) -> None:
        """See that a result of an earlier run may stand beside those of this one.

        Raises:
            OutputError: it was made in another way, or of another text.
        """
        earlier = {"model": entry["config"]["model"], "seed": entry["seed"], **entry["config"]["recipe"]}
        recipe = fitted(self.recipe, self.base.positions)[1].model_dump(mode="json")
        now = {"model": self.base.name, "seed": self.seed, **recipe}
        # Results of old do not say these.
        if "dtype" in entry["config"]:
            earlier, now = earlier | {"dtype": entry["config"]["dtype"]}, now | {"dtype": self.base.dtype}
        if "asked" in entry:
            earlier, now = earlier | entry["asked"], now | self.asked
        for name, value in now.items():
            if earlier.get(name) != value:
                raise OutputError(
                    f"{entry['document']} was scored with {name} {earlier.get(name)}, not {value}, before; "
                    "choose another file for the results, or repeat what was asked then"
                )
        if self._has_changed(entry):
            raise OutputError(
                f"{entry['document']} is no longer the text that was scored; choose another file for "
                "the results, or put the text back"
            )

    def _has_changed(self, entry: dict[str, Any]) -> bool:
        """Whether other tokens would be scored now. Where the text is gone, its result stays."""
        try:
            now = digest(self.ids(text_of(Path(entry["document"]))))
        except InvalidText:
            return False
        return entry.get("asked", {}).get("text", now) != now

    def run(
        self, name: str, text: str, interrupted: list[int], checkpoint: "Checkpoint"
    ) -> dict[str, Any] | None:
        """One document's result; None if it was interrupted, and then the checkpoint holds what is done."""
        from templora.bench.result import result
        from templora.report import ScoreStatus
        from templora.tasks.score import Scores, scoring

        session = self.base.session(self.recipe, seed=self.seed)
        ids = self.ids(text)
        scores = Scores.of(self.base, ids)
        checkpoint.begin(name, session, ids, score_base=self.score_base)
        spent = checkpoint.restore(session, scores)
        started = perf_counter() - spent
        try:
            with ScoreStatus(name, len(ids)) as status:
                for event in scoring(session, ids, score_base=self.score_base):
                    scores.take(event)
                    status.show(scores.base, scores.adapted)
                    # What became of a chunk follows its score; the session is past both already. And a rest
                    # is scored and not learned: it leaves no trace to go on from.
                    learns, full = session.recipe.learning_rate > 0, session.recipe.chunk
                    if isinstance(event, ChunkScored) and (learns or event.tokens < full):
                        continue
                    if interrupted or checkpoint.is_due:
                        try:
                            checkpoint.store(session, scores, perf_counter() - started)
                        except OutputError as error:  # it only spares time
                            say(f"warning: {error}; a run that is stopped begins this document anew")
                    if interrupted:
                        return None
            return result(name, scores, session, perf_counter() - started) | self.said_of(ids)
        finally:
            session.discard()


def score_all(job: Job, files: list[Path], results: Results, interrupted: list[int], size: int) -> int:
    """Score each file that is not done, `size` at once; returns how many could not be."""
    if size > 1:
        return _score_together(job, files, results, interrupted, size)
    failed, checkpoint = 0, Checkpoint(results.path, resume=results.resume)
    job.say_sizes()
    for file in files:
        if interrupted or results.has(str(file), job.refuse):
            continue
        try:
            entry = job.run(str(file), text_of(file), interrupted, checkpoint)
        except TemploraError as error:
            # One bad file must not cost the others their results.
            say(f"error: {error}")
            failed += 1
            continue
        if entry is not None:
            results.add(entry)
            checkpoint.clear()
            say(_line(entry))
    return failed


def _score_together(job: Job, files: list[Path], results: Results, interrupted: list[int], size: int) -> int:
    """Stopped, it goes on with the documents that were not done."""
    from templora.bench.result import result
    from templora.tasks.batch import scoring, together
    from templora.tasks.score import Scores

    open_: list[tuple[str, Scores, float]] = []
    said: list[dict[str, Any]] = []
    failed: list[Path] = []

    def documents() -> Iterator[list[int]]:
        for file in files:
            if results.has(str(file), job.refuse):
                continue
            try:
                ids = job.ids(text_of(file))
            except TemploraError as error:
                say(f"error: {error}")
                failed.append(file)
                continue
            open_.append((str(file), Scores.of(job.base, ids), perf_counter()))
            said.append(job.said_of(ids))
            yield ids

    batch = together(job.base, job.recipe, size=size, texts=len(files))
    job.say_sizes()
    for text, event in scoring(batch, documents(), seed=job.seed, score_base=job.score_base):
        if interrupted:
            break
        name, scores, started = open_[text.number]
        if event is not None:
            scores.take(event)
            continue
        entry = result(name, scores, text, perf_counter() - started) | said[text.number]
        text.discard()
        results.add(entry)
        say(_line(entry))
    else:
        # A run of single texts that was stopped may have left one; all that it could spare is done.
        Checkpoint(results.path, resume=results.resume).clear()
    return len(failed)


def _line(entry: dict[str, Any]) -> str:
    base, adapted = entry["base"], entry["adapted"]
    line = f"{entry['document']}: {entry['tokens']:,} tokens, "
    if base is None:
        return line + f"perplexity {adapted['perplexity']:.3f}"
    change = 100 * (adapted["perplexity"] / base["perplexity"] - 1)
    return (
        line
        + f"perplexity base {base['perplexity']:.3f}, adapter {adapted['perplexity']:.3f} ({change:+.2f} %)"
    )
