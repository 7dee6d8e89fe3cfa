"""`templora bench`: the paper's tables on books, and sweeps over recipes."""

import json
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from templora.bench.results import Results, put
from templora.commands.inputs import load_base, load_recipe, text_of, translation_sizes
from templora.commands.options import Batch, Model, RecipeName
from templora.commands.running import make_folder, one_line_errors, say
from templora.commands.score import Job, score_all
from templora.errors import InvalidText, OutputError

if TYPE_CHECKING:
    from templora.recipe import Recipe

app = typer.Typer(no_args_is_help=True, help="Benchmarks that you run on your own texts and models.")


@app.command()
def pg19(
    folder: Annotated[Path, typer.Argument(help="A folder of .txt or .txt.xz books.")],
    out: Annotated[Path, typer.Option(help="A folder for results, tables and the plot.")],
    model: Model = "novelist",
    recipe: Annotated[list[str] | None, typer.Option(help="May be repeated: compared side by side.")] = None,
    window: Annotated[int | None, typer.Option(help="Window and context of all recipes.")] = None,
    chunk: Annotated[int | None, typer.Option(help="Chunk of recipe paper; others keep their own.")] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Score at most so many of each book.")] = None,
    cost_tokens: Annotated[int, typer.Option(min=0, help="Tokens for the cost table; 0: none.")] = 0,
    cost_written: Annotated[int, typer.Option(min=1, help="Tokens written for it.")] = 512,
    cost_rounds: Annotated[int, typer.Option(min=1, help="How often each is timed.")] = 3,
    batch: Batch = 1,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Perplexity by position and by length, and the cost of a window (resumes where it was stopped)."""
    from templora.bench import pg19 as bench
    from templora.bench.cost import cost_table, costs
    from templora.bench.plot import plot_by_position, plot_costs
    from templora.recipe import load as recipe_of
    from templora.tasks.batch import together

    with one_line_errors():
        files = _books(folder)
        recipes: dict[str, Recipe] = {}
        for name in recipe or ["default"]:
            wishes: dict[str, Any] = {"window": window, "context": window}
            if name == "paper":
                wishes |= {"chunk": chunk, "dropout": 0.0}
            recipes[name] = recipe_of(name, wishes)
        _folder(out)
        stores = _stores(out, recipes, files)
        base = load_base(model, None, None)
        if batch > 1:  # what cannot run so is refused before hours of scoring
            for each in recipes.values():
                together(base, each, size=batch)
        pages: list[str] = []
        groups: dict[str, list[dict[str, Any]]] = {}
        failed = 0
        for name in recipes:
            job = Job(base, recipes[name], seed, tokens, 0, True)
            failed += score_all(job, files, stores[name], [], batch)
            groups[Path(name).stem] = done = _of_these(files, stores[name])
            seconds = sum(entry["learn_seconds"] for entry in done)
            pages += [f"## {name}", bench.tables(done), bench.quarters(done)]
            pages.append(f"Learning took {seconds:.0f} s.")
            _put_pages(out / "tables.md", pages)
        plot_by_position(groups, out / "by-position.png")
        if cost_tokens:
            book = Path(next(iter(groups.values()))[0]["document"])
            how = (text_of(book), cost_tokens, cost_written, cost_rounds, say)
            rows = costs(model, next(iter(recipes.values())), *how)
            _put_pages(out / "tables.md", [*pages, "## Cost of a window", cost_table(rows)])
            plot_costs(rows, out / "cost.png")
        say(f"tables, results and plot are in {out}")
        if failed:
            raise typer.Exit(2)


@app.command()
def guofeng(
    folder: Annotated[Path, typer.Argument(help="A folder of NAME.train.json(.xz), NAME.eval.json(.xz).")],
    out: Annotated[Path, typer.Option(help="A folder for results, tables and the plot.")],
    model: Model = "novelist",
    recipe: RecipeName = "default",
    pairs: Annotated[list[int] | None, typer.Option(help="Earlier passages in a prompt: K.")] = None,
    passages: Annotated[int | None, typer.Option(min=1, help="At most so many of each work.")] = None,
    score_only: Annotated[bool, typer.Option("--score-only", help="Generate nothing.")] = False,
    window: Annotated[int | None, typer.Option(help="Tokens of a prompt, at most.")] = None,
    chunk: Annotated[int | None, typer.Option(help="Tokens of a translation, at most.")] = None,
    comet_python: Annotated[Path | None, typer.Option(help="A Python that has COMET installed.")] = None,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """The paper's translation table: target perplexity by position, BLEU, chrF, consistency, COMET."""
    from templora.bench import guofeng as bench
    from templora.bench import quality

    with one_line_errors():
        works = bench.works(folder, passages)
        _folder(out)
        page, data, picture = (out / f"guofeng.{kind}" for kind in ("md", "json", "png"))
        for file in (page, data, picture):
            _new_file(file)
        if not score_only:
            quality.see_ready(comet_python)
        base = load_base(model, None, None)
        sizes = translation_sizes(load_recipe(recipe, [], {}), window, chunk, base.positions)
        ready = load_recipe(recipe, [], sizes)
        outcomes: list[bench.Outcome] = []
        for work, k, free in product(works, pairs or [1, 3], (False,) if score_only else (False, True)):
            done = bench.measure(base, work, ready, k, free=free, drafts=not score_only, seed=seed)
            outcomes.append(done)
            say(bench.line(done))
            result = [bench.as_json(outcome) for outcome in outcomes]
            put(data, json.dumps(result, indent=1, ensure_ascii=False))
            _put_pages(page, [bench.markdown(outcomes)])
        bench.plot(outcomes, picture)
        if not score_only:
            # COMET last, and BLEU before it: it loads a model for each row, and may fail in that.
            for python in dict.fromkeys((None, comet_python)):
                _put_pages(page, [bench.markdown(outcomes), quality.table_of(outcomes, python)])
        say(f"tables, results and plot are in {out}")


@app.command()
def sweep(
    config: Annotated[Path, typer.Argument(help="YAML: recipe, tokens, set, runs.")],
    texts: Annotated[list[Path], typer.Argument(help="Texts; .jsonl files hold one {title, text} a line.")],
    out: Annotated[Path, typer.Option(help="A Markdown file for the table.")],
    model: Model = "novelist",
    batch: Batch = 1,
) -> None:
    """Compare recipes on the same texts."""
    from templora.bench import sweep as bench

    with one_line_errors():
        plan = bench.read(config)
        loaded = [pair for path in texts for pair in _texts(path)]
        _new_file(out)
        outcomes: list[bench.Outcome] = []
        for outcome in bench.run(load_base(model, None, None), plan, loaded, batch=batch):
            outcomes.append(outcome)
            say(f"{outcome.keys or 'as it is'}: {100 * outcome.mean:+.2f} %, {outcome.learn_seconds:.0f} s")
            _put_pages(out, [bench.markdown(outcomes)])


def _books(folder: Path) -> list[Path]:
    from templora.bench.pg19 import books

    files = books(folder) if folder.is_dir() else []
    if not files:
        raise InvalidText(f"{folder} holds no .txt or .txt.xz files; give a folder of books")
    return files


def _stores(out: Path, recipes: Iterable[str], files: Iterable[Path]) -> dict[str, Results]:
    """Each recipe's results of those books, which may be there already.

    Raises:
        OutputError: two recipes would share theirs, or what is there is something else.
    """
    stores: dict[str, Results] = {}
    for name in recipes:
        path = out / f"{Path(name).stem}.json"
        if other := next((other for other, store in stores.items() if store.path == path), None):
            raise OutputError(f"the results of {other} and {name} would both be {path}; rename one of them")
        stores[name] = Results(path, resume=True, order=[*map(str, files)])
    return stores


def _of_these(files: Iterable[Path], results: Results) -> list[dict[str, Any]]:
    """The results of these files, in their order: an earlier run may have had others.

    Raises:
        InvalidText: there is none.
    """
    found = {entry["document"]: entry for entry in results.done}
    done = [found[str(file)] for file in files if str(file) in found]
    if not done:
        raise InvalidText("none of the books could be scored; mend what is said above")
    return done


def _put_pages(path: Path, pages: Iterable[str]) -> None:
    put(path, "\n\n".join(pages) + "\n")


def _folder(path: Path) -> None:
    """Get ready for tables and pictures: what cannot be drawn is said before hours of scoring."""
    from templora.bench.plot import canvas

    canvas()
    make_folder(path, "--out")


def _new_file(path: Path) -> None:
    """See that a file of that name can be made, before hours of scoring; nothing is left of the try.

    Raises:
        OutputError: it exists, or cannot be made.
    """
    make_folder(path.parent, "--out")
    try:
        path.open("x").close()
        path.unlink()
    except FileExistsError as error:
        raise OutputError(f"{path} exists and is never overwritten; choose another --out") from error
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}; choose another --out") from error


def _texts(path: Path) -> list[tuple[str, str]]:
    """The texts of a file, each with a name to speak of it.

    Raises:
        InvalidText: it cannot be read; the message names the line.
    """
    text = text_of(path)
    if ".jsonl" not in path.name:
        return [(str(path), text)]
    lines = enumerate(text.split("\n"), 1)
    return [_row(line, f"line {number} of {path}") for number, line in lines if line.strip()]


def _row(line: str, place: str) -> tuple[str, str]:
    try:
        row: Any = json.loads(line)
    except ValueError as error:
        raise InvalidText(f"{place} is not JSON ({error}); write one object a line") from error
    if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("title", "text")):
        raise InvalidText(
            f'{place} has no title or no text; write {{"title": "Dark", "text": "It was dark."}}'
        )
    title, text = row["title"], row["text"]
    if any("\ud800" <= character <= "\udfff" for character in title + text):
        raise InvalidText(f"{place} holds half a character (\\ud800 to \\udfff); write the whole of it")
    return f"{title} ({place})", text
