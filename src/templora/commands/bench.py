"""`templora bench`: the paper's tables on books, and sweeps over recipes."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from templora.commands.inputs import load_base, load_recipe, text_of, translation_sizes
from templora.commands.options import Model, RecipeName
from templora.commands.running import make_folder, one_line_errors, say
from templora.commands.score import Job, Results, score_all
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
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Perplexity by position and by length, and the cost of a window (resumes where it was stopped)."""
    from templora.bench import pg19 as bench
    from templora.bench.cost import cost_table, costs
    from templora.bench.plot import plot_by_position, plot_costs
    from templora.recipe import load as recipe_of

    with one_line_errors():
        files = _books(folder)
        _folder(out)
        pages: list[str] = []
        groups: dict[str, list[dict[str, Any]]] = {}
        recipes: dict[str, Recipe] = {}
        for name in recipe or ["default"]:
            wishes: dict[str, Any] = {"window": window, "context": window}
            if name == "paper":
                wishes |= {"chunk": chunk, "dropout": 0.0}
            recipes[name] = recipe_of(name, wishes)
            job = Job(load_base(model, None, None), recipes[name], seed, tokens, 0, True)
            results = Results(out / f"{Path(name).stem}.json", resume=True)
            score_all(job, files, results, [])
            groups[Path(name).stem] = results.done
            seconds = sum(entry["learn_seconds"] for entry in results.done)
            pages += [
                f"## {name}",
                bench.tables(results.done),
                bench.quarters(results.done),
                f"Learning took {seconds:.0f} s.",
            ]
        plot_by_position(groups, out / "by-position.png")
        if cost_tokens:
            how = (text_of(files[0]), cost_tokens, cost_written, cost_rounds, say)
            rows = costs(model, next(iter(recipes.values())), *how)
            pages += ["## Cost of a window", cost_table(rows)]
            plot_costs(rows, out / "cost.png")
        (out / "tables.md").write_text("\n\n".join(pages) + "\n", "utf-8")
        say(f"tables, results and plot are in {out}")


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
        works = bench.works(folder)
        _folder(out)
        base = load_base(model, None, None)
        sizes = translation_sizes(window, chunk, base.positions)
        ready = load_recipe(recipe, [], sizes)
        outcomes: list[bench.Outcome] = []
        for work in works:
            for k in pairs or [1, 3]:
                for free in (False,) if score_only else (False, True):
                    done = bench.measure(
                        base, work, ready, k, passages, free=free, drafts=not score_only, seed=seed
                    )
                    outcomes.append(done)
                    before, after = bench.tally(done)
                    assert before.perplexity and after.perplexity
                    say(
                        f"{work.name}, K = {k}, {'own output' if free else 'references'}: perplexity "
                        f"base {before.perplexity:.2f}, adapter {after.perplexity:.2f}"
                    )
                    result = [bench.as_json(outcome) for outcome in outcomes]
                    (out / "guofeng.json").write_text(
                        json.dumps(result, indent=1, ensure_ascii=False), "utf-8"
                    )
                    (out / "guofeng.md").write_text(bench.markdown(outcomes) + "\n", "utf-8")
        if not score_only:  # last: COMET loads a model for each row
            rows = quality.table_of(outcomes, comet_python)
            (out / "guofeng.md").write_text(f"{bench.markdown(outcomes)}\n\n{rows}\n", "utf-8")
        bench.plot(outcomes, out / "guofeng.png")
        say(f"tables, results and plot are in {out}")


@app.command()
def sweep(
    config: Annotated[Path, typer.Argument(help="YAML: recipe, tokens, set, runs.")],
    texts: Annotated[list[Path], typer.Argument(help="Texts; .jsonl files hold one {title, text} a line.")],
    out: Annotated[Path, typer.Option(help="A Markdown file for the table.")],
    model: Model = "novelist",
) -> None:
    """Compare recipes on the same texts."""
    from templora.bench import sweep as bench

    with one_line_errors():
        plan = bench.read(config)
        loaded = [pair for path in texts for pair in _texts(path)]
        _new_file(out)
        outcomes: list[bench.Outcome] = []
        for outcome in bench.run(load_base(model, None, None), plan, loaded):
            outcomes.append(outcome)
            say(f"{outcome.keys or 'as it is'}: {100 * outcome.mean:+.2f} %, {outcome.learn_seconds:.0f} s")
            try:
                out.write_text(bench.markdown(outcomes) + "\n", "utf-8")
            except OSError as error:
                raise OutputError(f"cannot write {out}: {error.strerror}; choose another --out") from error


def _books(folder: Path) -> list[Path]:
    from templora.bench.pg19 import books

    files = books(folder) if folder.is_dir() else []
    if not files:
        raise InvalidText(f"{folder} holds no .txt or .txt.xz files; give a folder of books")
    return files


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
    return f"{row['title']} ({place})", row["text"]
