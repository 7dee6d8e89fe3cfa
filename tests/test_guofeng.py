"""`templora bench guofeng` on a small set of its own, and what its numbers mean."""

import json
import lzma
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from templora.bench import guofeng, quality
from templora.cli import app
from templora.errors import OutputError
from templora.testing import ByteTokenizer, tiny_llama

pytestmark = pytest.mark.slow
NAMES = [("苏绵", "Su Mian"), ("魏峰", "Wei Feng")]


def excerpt(number: int) -> dict[str, object]:
    zh, en = NAMES[number % 2]
    pairs = [
        {"zh": f"{zh}来了。", "en": f"{en} came."},
        {"zh": f"第{number}天", "en": f"Day {number} of the war"},
    ]
    return {"contexts": {"k1": [], "k3": []}, "inference": pairs}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A work of twelve passages and two last ones."""
    made = tmp_path / "set"
    made.mkdir()
    (made / "w.train.json").write_text(json.dumps([excerpt(n) for n in range(12)]), "utf-8")
    (made / "w.eval.json.xz").write_bytes(lzma.compress(json.dumps([excerpt(n) for n in (12, 13)]).encode()))
    return made


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_llama(initializer_range=0.2, max_position_embeddings=256).save_pretrained(folder)
    ByteTokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("score_only", [True, False])
def test_the_bench_measures_both_settings(score_only: bool, folder: Path, tiny: str, tmp_path: Path) -> None:
    line = ["bench", "guofeng", str(folder), "--model", tiny, "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*line, *(["--score-only"] if score_only else [])])
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "out" / "guofeng.json").read_text("utf-8"))
    settings = [(entry["work"], entry["pairs"], entry["free"]) for entry in found]
    free = [False] if score_only else [False, True]
    assert settings == [("w", k, f) for k in (1, 3) for f in free]
    for entry in found:
        assert all(chunk["base_nll"] > 0 for chunk in entry["scored"])
        assert len(entry["drafts"]) == (0 if score_only else 2)
        *quarters, whole = entry["by_position"]
        assert sum(row[1] for row in quarters) == whole[1]
    taught = [entry for entry in found if not entry["free"]]
    assert all(entry["by_position"][-1][3] < entry["by_position"][-1][2] for entry in taught)
    page = (tmp_path / "out" / "guofeng.md").read_text("utf-8")
    assert "the authors' statistic" in page
    assert ("BLEU" in page) is not score_only
    assert (tmp_path / "out" / "guofeng.png").stat().st_size > 10_000


def test_an_empty_folder_is_one_line(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["bench", "guofeng", str(tmp_path), "--out", str(tmp_path / "out")])
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
    assert "holds no NAME.train.json files" in done.stderr


def test_a_work_without_passages_is_one_line(folder: Path, tmp_path: Path) -> None:
    (folder / "x.train.json").write_text("[]", "utf-8")
    done = CliRunner().invoke(app, ["bench", "guofeng", str(folder), "--out", str(tmp_path / "out")])
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
    assert "x.train.json holds no passages; take it out" in done.stderr


@pytest.mark.parametrize(
    ("zh", "en", "lack"), [("他来了。", " ", "no English"), (" ", "He came.", "a passage without Chinese")]
)
def test_a_work_that_nothing_can_be_measured_on_is_one_line(
    zh: str, en: str, lack: str, folder: Path, tmp_path: Path
) -> None:
    passage = {"contexts": {}, "inference": [{"zh": zh, "en": en}]}
    (folder / "x.train.json").write_text(json.dumps([passage]), "utf-8")
    error = refusal(folder, tmp_path / "out")
    assert f"x.train.json holds {lack}; take it out" in error


def refusal(folder: Path, out: Path, *words: str | Path) -> str:
    """The one line that is said before a base is loaded."""
    line = ["bench", "guofeng", folder, "--out", out, "--model", "nowhere", *words]
    done = CliRunner().invoke(app, [str(word) for word in line])
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1), done.output
    return done.stderr


@pytest.mark.parametrize("name", ["guofeng.json", "guofeng.md", "guofeng.png"])
def test_results_of_another_run_are_kept(name: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / name).write_text("hours of work", "utf-8")
    assert f"{name} exists and is never overwritten; choose another --out" in refusal(folder, tmp_path)
    assert (tmp_path / name).read_text("utf-8") == "hours of work"


def test_what_quality_is_measured_with_is_looked_at_first(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert "cannot run no-python" in refusal(folder, out, "--comet-python", "no-python")
    assert "COMET failed in" in refusal(folder, out, "--comet-python", sys.executable)
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    assert "needs sacrebleu" in refusal(folder, out)


def test_works_are_told_apart_by_their_whole_names(folder: Path) -> None:
    (folder / "w.train.json.bak").write_text("no work", "utf-8")
    for name in ("1.a", "1.b", "[b]"):
        for part, passages in (("train", [0, 1, 2]), ("eval", [3])):
            text = json.dumps([excerpt(number) for number in passages])
            (folder / f"{name}.{part}.json").write_text(text, "utf-8")
    found = [(work.name, len(work.train), len(work.last)) for work in guofeng.works(folder, 2)]
    assert found == [("1.a", 2, 1), ("1.b", 2, 1), ("[b]", 2, 1), ("w", 2, 2)]


def test_where_a_model_writes_nothing_the_others_keep_their_tables() -> None:
    silent = guofeng.Outcome("w", 1, free=True)
    assert guofeng.line(silent) == "w, K = 1, own output: nothing was written"
    assert "Nothing was written" in guofeng.markdown([silent])
    assert guofeng.as_json(silent)["authors"] is None


def test_a_comet_that_fails_at_last_does_not_cost_the_rest(folder: Path, tiny: str, tmp_path: Path) -> None:
    out, python = tmp_path / "out", stand_in(tmp_path, "raise MemoryError('too large')")
    line = ["bench", "guofeng", folder, "--model", tiny, "--out", out, "--passages", "1", "--pairs", "1"]
    done = CliRunner().invoke(app, [*map(str, line), "--comet-python", str(python)])
    assert done.exit_code == 2
    assert "MemoryError: too large; see that" in done.stderr.splitlines()[-1]
    assert "BLEU" in (out / "guofeng.md").read_text("utf-8")
    assert (out / "guofeng.png").stat().st_size > 10_000


def stand_in(folder: Path, predict: str) -> Path:
    """A Python whose package stands for COMET's interface; COMET itself cannot be installed beside us."""
    (folder / "comet.py").write_text(
        "from types import SimpleNamespace as S\n"
        "download_model = lambda name: name\n"
        f"def predict(data, **_): {predict}\n"
        "load_from_checkpoint = lambda path: S(predict=predict)\n"
    )
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={folder} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return python


def test_quality_is_sacrebleus_and_perfect_for_the_reference() -> None:
    text = ["Su Mian came and saw the sea.", "Wei Feng left the house at noon."]
    found = quality.scores(text, text)
    assert found["bleu"] == pytest.approx(100)
    assert found["chrf"] == pytest.approx(100)
    assert "version:" in found["bleu_signature"]
    assert quality.scores(["nothing like it", "at all"], text)["bleu"] < 5


def test_names_that_are_translated_alike() -> None:
    sources = [f"{NAMES[n % 2][0]}在第{n}天来了" for n in range(8)]
    names = quality.names_in(sources)
    assert {"苏绵", "魏峰"} <= {name[:2] for name in names}
    alike = [f"On day {n} {NAMES[n % 2][1]} came" for n in range(8)]
    assert quality.consistency(zip(sources, alike, strict=True), ["苏绵", "魏峰"]) == 1
    mixed = [t.replace("Su Mian", "So Men") if n == 2 else t for n, t in enumerate(alike)]
    assert quality.consistency(zip(sources, mixed, strict=True), ["苏绵", "魏峰"]) == pytest.approx(7 / 8)
    assert quality.consistency([], ["苏绵"]) is None


def test_comet_runs_in_a_python_of_its_own(tmp_path: Path) -> None:
    texts = (["苏绵"], ["Su Mian"], ["Su Mian"])
    with pytest.raises(OutputError, match=r"COMET failed in .*comet"):
        quality.comet(Path(sys.executable), *texts)
    with pytest.raises(OutputError, match="cannot run"):
        quality.comet(tmp_path / "no-python", *texts)
    python = stand_in(tmp_path, "return S(system_score=len(data[0]['mt']))")
    assert quality.comet(python, *texts) == 7.0
