"""`templora bench pg19`: tables of the books that are there, and what has been scored is never lost."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from templora.cli import app

TEXT = (Path(__file__).parent.parent / "LICENSE").read_text("utf-8").strip()[:700]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two books."""
    monkeypatch.chdir(tmp_path)
    Path("books").mkdir()
    for name in ("a", "b"):
        Path(f"books/{name}.txt").write_text(TEXT, "utf-8")
    return tmp_path


def pg19(books: str, model: Path | str, *words: str) -> Result:
    line = ["bench", "pg19", books, "--out", "out", "--model", str(model), "--window", "32"]
    return CliRunner().invoke(app, [*line, *words])


def refusal(done: Result) -> str:
    """The last line, an error."""
    assert done.exit_code == 2, done.output
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: ")
    return line


def counted() -> list[str]:
    """The tokens in the first row of each recipe's first table."""
    parts = Path("out/tables.md").read_text("utf-8").split("### All tokens")[1:]
    return [part.strip().splitlines()[2].split("|")[2].strip() for part in parts]


@pytest.mark.slow
def test_tables_results_and_a_plot_are_written(folder: Path, here: Path) -> None:
    words = [
        "--tokens",
        "400",
        "--recipe",
        "paper",
        "--recipe",
        "default",
    ]  # whose chunk this base cannot hold
    words += ["--cost-tokens", "200", "--cost-written", "40", "--cost-rounds", "2"]
    done = pg19("books", folder, *words)
    assert done.exit_code == 0, done.output
    page = Path("out/tables.md").read_text("utf-8")
    assert "By position, the paper's bins" in page
    assert "s per 1,000 tokens" in page
    assert all(Path("out", name).stat().st_size > 10_000 for name in ("by-position.png", "cost.png"))
    assert len(json.loads(Path("out/paper.json").read_text("utf-8"))) == 2


def test_several_books_at_once_come_to_the_same(folder: Path, here: Path) -> None:
    words = ["--tokens", "60", "--recipe", "default"]
    assert pg19("books", folder, *words).exit_code == 0
    page = Path("out/tables.md").read_text("utf-8").split("Learning took")[0]
    Path("out").rename("alone")
    assert pg19("books", folder, *words, "--batch", "2").exit_code == 0
    assert Path("out/tables.md").read_text("utf-8").split("Learning took")[0] == page


def test_tables_are_of_the_books_that_are_there(folder: Path, here: Path) -> None:
    words = ["--tokens", "40", "--recipe", "paper", "--recipe", "default", "--chunk", "32"]
    assert pg19("books", folder, *words).exit_code == 0
    assert counted() == ["80", "80"]
    Path("books/b.txt").rename("b.txt")
    assert pg19("books", folder, *words).exit_code == 0
    assert counted() == ["40", "40"]
    Path("books/c.txt").write_bytes(b"\xff\xfe")
    damaged = pg19("books", folder, *words)
    assert damaged.exit_code == 2 and damaged.stderr.count("c.txt is not UTF-8") == 2
    assert counted() == ["40", "40"]
    Path("books/c.txt").unlink()
    Path("books").rename("others")
    assert pg19("others", folder, *words).exit_code == 0
    assert counted() == ["40", "40"]
    kept = json.loads(Path("out/default.json").read_text("utf-8"))
    assert [entry["document"] for entry in kept] == ["books/a.txt", "books/b.txt", "others/a.txt"]


def test_recipes_that_would_share_their_results_are_refused_before_the_first_book(here: Path) -> None:
    for name in ("r1", "r2"):
        Path(name).mkdir()
        Path(name, "x.yaml").write_text("window: 32\n", "utf-8")
    error = refusal(pg19("books", "nowhere", "--recipe", "r1/x.yaml", "--recipe", "r2/x.yaml"))
    assert "the results of r1/x.yaml and r2/x.yaml would both be out/x.json; rename one of them" in error


@pytest.mark.parametrize("name", ["tables.md", "by-position.png"])
def test_a_page_or_a_picture_that_cannot_be_written_is_one_line(name: str, folder: Path, here: Path) -> None:
    Path("out", name).mkdir(parents=True)
    error = refusal(pg19("books", folder, "--tokens", "40"))
    assert f"cannot write out/{name}: " in error
    assert {path.name for path in Path("out").iterdir()} == {"default.json", "tables.md", name}
    assert len(json.loads(Path("out/default.json").read_text("utf-8"))) == 2


def test_a_folder_of_which_no_book_could_be_scored_is_said(folder: Path, here: Path) -> None:
    for path in Path("books").iterdir():
        path.write_text("", "utf-8")
    done = pg19("books", folder, "--cost-tokens", "100")
    assert "none of the books could be scored; mend what is said above" in refusal(done)
    assert done.stderr.count("is empty") == 2


@pytest.mark.slow
def test_a_first_book_that_is_empty_does_not_cost_the_tables(folder: Path, here: Path) -> None:
    Path("books/0.txt").write_text("", "utf-8")
    done = pg19("books", folder, "--tokens", "40", "--cost-tokens", "40", "--cost-rounds", "1")
    assert done.exit_code == 2, "the tables are not of all books"
    assert counted() == ["80"]
    assert "s per 1,000 tokens" in Path("out/tables.md").read_text("utf-8")
