"""`templora write --prompts`: several prompts at once, a file for each text."""

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from templora.commands.inputs import load_base, load_recipe, text_of
from templora.commands.opening import Wanted
from templora.commands.running import INTERRUPTED, compared, interruptible, make_folder, say
from templora.errors import InvalidRecipe, InvalidText, OutputError

if TYPE_CHECKING:
    from templora.events import End, Event
    from templora.text_file import TextFile

# Options of one text that mean nothing for several.
ALONE = ("prompt", "prompt_file", "read", "session", "out", "parallel")
LONGEST = 255  # bytes of a file's name, on nearly all disks


@dataclass(frozen=True, slots=True)
class Prompt:
    """name: of its file in the output folder, without a suffix."""

    name: str
    text: str


def prompts_of(path: Path) -> list[Prompt]:
    """The prompts in a file: JSON lines with "prompt" and perhaps "name", else one prompt a line.

    Raises:
        InvalidText: it is no such file; the message names the line.
    """
    # Not splitlines: JSON may hold other ends of lines than this one, and so may a prompt.
    lines = enumerate(text_of(path).split("\n"), 1)
    lines = [(number, line) for number, line in lines if line.strip()]
    width = len(str(len(lines)))
    found: list[Prompt] = []
    for count, (number, line) in enumerate(lines, 1):
        name, text = f"{count:0{width}}", line
        if path.name.removesuffix(".xz").endswith(".jsonl"):
            name, text = _from_json(line, name, f"line {number} of {path}")
        found.append(Prompt(name, text))
    names = [prompt.name for prompt in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InvalidText(f"{path} has two prompts named {twice!r}; give each a name of its own")
    return found


def write_all(
    wanted: Wanted,
    path: Path,
    folder: Path | None,
    size: int,
    wishes: dict[str, Any],
    *,
    resume: bool,
    json: bool,
) -> None:
    """Continue every prompt in that file, `size` at once. wishes: for `write_batch`. resume: those that an
    earlier run has not finished.

    Raises:
        InvalidText, InvalidRecipe, OutputError: before anything is written.
    """
    if refused := [f"--{n.replace('_', '-')}" for n in ALONE if n in wanted.given]:
        raise InvalidRecipe(f"--prompts writes new texts into --out-dir; leave out {', '.join(refused)}")
    if folder is None:
        raise OutputError("--prompts needs --out-dir, a folder for the texts")
    files = _Files(folder, prompts_of(path), resume=resume)
    if not (prompts := files.prompts):
        say(f"all of these were written before; they are in {folder}")
        return
    base = load_base(wanted.model, wanted.dtype, wanted.device)
    recipe = load_recipe(wanted.recipe, wanted.pairs, wanted.sizes)
    from templora.sampling import Sampling
    from templora.tasks.batch import write_batch

    sampling = Sampling.of(base.model.generation_config, **wishes.pop("draw"))
    texts = [prompt.text for prompt in prompts]
    events = write_batch(base, texts, recipe=recipe, size=size, seed=wanted.seed, sampling=sampling, **wishes)
    make_folder(folder, "--out-dir")
    with ExitStack() as stack:
        stack.callback(files.close)
        interrupted = stack.enter_context(interruptible())
        for number, event in events:
            files.take(number, event)
            _show(prompts[number].name, event, json=json)
            if interrupted:
                say(f"interrupted; all that was written is in {folder}")
                say("go on with the same command and --resume")
                raise typer.Exit(INTERRUPTED)
    say(f"saved to {folder}")


class _Files:
    """A file for each text, that begins with its prompt; NAME.tmp until the text has ended.

    prompts: those whose texts have not. With resume they are begun anew, and come out as they would have.

    Raises:
        OutputError: one of them exists, or could not be made.
    """

    def __init__(self, folder: Path, prompts: Sequence[Prompt], *, resume: bool) -> None:
        self._folder, self._resume = folder, resume
        try:
            done = [prompt for prompt in prompts if self._path(prompt).exists()]
            there = [path for p in prompts for path in (self._path(p), self._part(p)) if path.exists()]
        except OSError as error:  # such as names that are too long for this disk
            raise OutputError(
                f"cannot write in {folder}: {error.strerror}; choose another --out-dir"
            ) from error
        if there and not resume:
            raise OutputError(
                f"{there[0]} exists and is never overwritten; add --resume to write those that are not "
                "finished, or choose another --out-dir"
            )
        if other := next((p for p in done if not _begins(self._path(p), p.text)), None):
            raise OutputError(f"{self._path(other)} does not begin with its prompt; choose another --out-dir")
        self.prompts = [prompt for prompt in prompts if prompt not in done]
        self._open: dict[int, tuple[TextFile, ExitStack]] = {}

    def take(self, number: int, event: "Event") -> None:
        """Something has happened to that text."""
        from templora.events import End
        from templora.text_file import TextFile

        prompt = self.prompts[number]
        if number not in self._open:
            stack = ExitStack()
            if self._resume:
                self._part(prompt).unlink(missing_ok=True)
            file = stack.enter_context(TextFile(self._part(prompt)))
            file.echo(prompt.text)
            self._open[number] = file, stack
        file, stack = self._open[number]
        file.take(event)
        if isinstance(event, End):
            del self._open[number]
            stack.close()
            self._part(prompt).replace(self._path(prompt))

    def close(self) -> None:
        """Close those whose texts have not ended."""
        for _, stack in self._open.values():
            stack.close()

    def _path(self, prompt: Prompt) -> Path:
        return self._folder / f"{prompt.name}.txt"

    def _part(self, prompt: Prompt) -> Path:
        return self._folder / f"{prompt.name}.tmp"


def _begins(path: Path, prompt: str) -> bool:
    start = prompt.encode()
    try:
        with path.open("rb") as file:
            return file.read(len(start)) == start
    except OSError as error:
        raise OutputError(f"cannot read {path}: {error.strerror}; choose another --out-dir") from error


def _show(name: str, event: "Event", *, json: bool) -> None:
    """One event a line to stdout, with the text's name; or what is worth saying to stderr."""
    from templora.events import End, Warned

    if json:
        print(_line(name, event), flush=True)
    elif isinstance(event, End):
        say(f"{name}: {_summary(event)}")
    elif isinstance(event, Warned):
        say(f"warning: {name}: {event.message}")


def _line(name: str, event: "Event") -> str:
    return json.dumps({"name": name, **event.as_dict()}, ensure_ascii=False)


def _summary(end: "End") -> str:
    line = f"{end.tokens:,} tokens"
    if not (end.adapted_perplexity and end.base_perplexity):
        return line
    return f"{line}, perplexity {compared(end.base_perplexity, end.adapted_perplexity)}"


def _from_json(line: str, name: str, place: str) -> tuple[str, str]:
    try:
        entry: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InvalidText(f"{place} is not JSON ({error}); write one object a line") from error
    text = entry.get("prompt") if isinstance(entry, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise InvalidText(f'{place} has no prompt; write {{"prompt": "It was a dark night"}}')
    InvalidText.check(text, place)
    given = entry.get("name")
    return (name if given is None else _file_name(given, place)), text


def _file_name(given: Any, place: str) -> str:
    name = str(given)
    if isinstance(given, bool) or not isinstance(given, str | int | float) or not name.strip():
        raise InvalidText(f'{place}: the name {given!r} cannot be a file\'s; write a word, such as "dark"')
    if Path(name).name != name:
        raise InvalidText(f"{place}: the name {name!r} cannot be a file's; leave out slashes")
    if "\0" in name or any("\ud800" <= c <= "\udfff" for c in name):
        raise InvalidText(f"{place}: the name {name!r} cannot be a file's; leave out what no name may hold")
    if (size := len(f"{name}.txt".encode())) > LONGEST:
        raise InvalidText(
            f"{place}: the name {name[:20]!r}… is too long for a file's: {size} bytes with .txt; shorten it"
        )
    return name
