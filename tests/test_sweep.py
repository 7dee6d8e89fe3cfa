"""`templora bench sweep`: no text is lost, and what cannot work is said before the first run."""

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from templora.cli import app

TEXT = (Path(__file__).parent.parent / "LICENSE").read_text("utf-8").strip()[:300]
PLAN = "set: {window: 32, chunk: 16, context: 32}\nruns:\n  - {}\n"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("plan.yaml").write_text(PLAN, "utf-8")
    Path("k.txt").write_text(TEXT, "utf-8")
    return tmp_path


def sweep(*words: str | Path) -> Result:
    return CliRunner().invoke(app, ["bench", "sweep", *map(str, words)])


def refusal(done: Result) -> str:
    """The one line that an error is."""
    assert done.exit_code == 2, done.output
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def test_texts_of_the_same_name_are_all_scored(folder: Path, here: Path) -> None:
    Path("A").mkdir()
    Path("A/k.txt").write_text(TEXT[::-1], "utf-8")
    Path("two.jsonl").write_text('{"title": "k", "text": "It was dark."}\n' * 2, "utf-8")
    done = sweep("plan.yaml", "k.txt", "A/k.txt", "two.jsonl", "--out", "new/table.md", "--model", folder)
    assert done.exit_code == 0, done.output
    (row,) = Path("new/table.md").read_text("utf-8").splitlines()[2:]
    assert len(row.split("|")[3].split()) == 4
    before = Path("new/table.md").read_bytes()
    error = refusal(sweep("plan.yaml", "k.txt", "--out", "new/table.md", "--model", folder))
    assert "new/table.md exists and is never overwritten; choose another --out" in error
    assert Path("new/table.md").read_bytes() == before


def test_a_run_that_cannot_run_so_is_refused_before_the_first(folder: Path, here: Path) -> None:
    Path("plan.yaml").write_text(f"{PLAN}  - {{dropout: 0.1}}\n", "utf-8")
    words = ["plan.yaml", "k.txt", "--out", "table.md", "--model", folder]
    assert "set dropout=0, or batch 1" in refusal(sweep(*words, "--batch", "2"))
    assert sweep(*words).exit_code == 0


@pytest.mark.parametrize(
    ("out", "reason"),
    [
        ("k.txt/table.md", "cannot make k.txt: File exists"),
        (f"{'x' * 300}.md", "File name too long; choose another --out"),
        (".", "exists and is never overwritten"),
    ],
)
def test_a_table_that_cannot_be_written_is_said_at_the_start(out: str, reason: str, here: Path) -> None:
    assert reason in refusal(sweep("plan.yaml", "k.txt", "--out", out, "--model", "nowhere"))


def test_the_disk_is_full_in_one_line(folder: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    done = sweep("plan.yaml", "k.txt", "--out", "table.md", "--model", folder)
    assert done.exit_code == 2
    assert "error: cannot write table.md: No space left on device" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        (b"seed: x\nruns: [{}]", "seed is 'x'; write a whole number"),
        (b"\xff\xfeseed", "is not a sweep"),
        (b"set: [1]\nruns: [{}]", "set is [1]; write a map"),
        (b"tokens: many\nruns: [{}]", "tokens is 'many'; write a number"),
        (b"tokens: 0\nruns: [{}]", "tokens is 0; write a number"),
        (b"window: 256\nruns: [{}]", "unknown key of plan.yaml 'window'; known are recipe, tokens"),
        (b"runs: []", "has no runs"),
        (b"runs:\n  - {epochs: []}", "has no runs"),
        (b"runs: 3", "is not a sweep"),
        (b"runs: [", "is not a sweep"),
        (b"", "is not a sweep"),
    ],
)
def test_a_plan_that_cannot_be_read_is_one_line(plan: bytes, reason: str, here: Path) -> None:
    Path("plan.yaml").write_bytes(plan)
    error = refusal(sweep("plan.yaml", "k.txt", "--out", "table.md", "--model", "nowhere"))
    assert "plan.yaml" in error
    assert reason in error


def test_a_key_without_a_value_is_left_out(folder: Path, here: Path) -> None:
    Path("plan.yaml").write_text("recipe:\nset:\nseed:\ntokens:\nruns:\n  - {window: 32, chunk: 16}\n")
    done = sweep("plan.yaml", "k.txt", "--out", "table.md", "--model", folder)
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    ("runs", "reason"),
    [
        ("[{}, {seed: 1}]", "unknown recipe key 'seed'"),
        ("[{}, {epochs: many}]", "recipe key epochs"),
        ("[{}, {window: 4096}]", "window"),
    ],
)
def test_no_run_is_begun_when_a_later_one_cannot_work(
    runs: str, reason: str, folder: Path, here: Path
) -> None:
    Path("plan.yaml").write_text(f"runs: {runs}")
    assert reason in refusal(sweep("plan.yaml", "k.txt", "--out", "table.md", "--model", folder))
    assert not Path("table.md").exists()


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"text": "It was dark."}', "line 2 of texts.jsonl has no title or no text"),
        ('{"title": 3, "text": "It was dark."}', "line 2 of texts.jsonl has no title or no text"),
        ("[]", "line 2 of texts.jsonl has no title or no text"),
        ("{", "line 2 of texts.jsonl is not JSON"),
        (r'{"title": "k", "text": "It \ud83d was."}', "line 2 of texts.jsonl holds half a character"),
        (r'{"title": "\udc00", "text": "It was."}', "line 2 of texts.jsonl holds half a character"),
    ],
)
def test_a_line_that_holds_no_text_is_named(line: str, reason: str, here: Path) -> None:
    Path("texts.jsonl").write_text(f'{{"title": "k", "text": "It was dark."}}\n{line}\n', "utf-8")
    assert reason in refusal(sweep("plan.yaml", "texts.jsonl", "--out", "table.md", "--model", "nowhere"))


def test_a_text_that_is_too_short_is_named_before_the_first_run(folder: Path, here: Path) -> None:
    Path("texts.jsonl").write_text('{"title": "none", "text": ""}\n', "utf-8")
    done = sweep("plan.yaml", "k.txt", "texts.jsonl", "--out", "table.md", "--model", folder)
    assert "none (line 1 of texts.jsonl) is too short" in refusal(done)


def test_a_run_may_be_of_a_recipe_of_its_own(folder: Path, here: Path) -> None:
    Path("plan.yaml").write_text(
        "set: {window: 32, chunk: 16, context: 32, dropout: 0}\nruns:\n  - {recipe: [default, paper]}\n"
        "  - {recipe: default, learning_rate: 0, magnitude_rate: 0}\n",
        "utf-8",
    )
    done = sweep("plan.yaml", "k.txt", "--out", "table.md", "--model", folder)
    assert done.exit_code == 0, done.output
    rows = [row.split(" | ") for row in Path("table.md").read_text("utf-8").splitlines()[2:]]
    changes = {run.removeprefix("| "): change for run, change, *_ in rows}
    assert changes.keys() == {
        "recipe default",
        "recipe paper",
        "recipe default, learning_rate 0, magnitude_rate 0",
    }
    assert len(set(changes.values())) == 3, "each learns in its own way"
    Path("plan.yaml").write_text("runs:\n  - {}\n  - {recipe: papre}\n", "utf-8")
    assert "papre" in refusal(sweep("plan.yaml", "k.txt", "--out", "other.md", "--model", folder))
