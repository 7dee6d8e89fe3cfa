"""Scoring: each token once, before it is learned; sums carried to the end; results for programs."""

import json
import math
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import templora
from templora.base import Base
from templora.bench import cost, pg19, sweep, tables
from templora.bench.checkpoint import Checkpoint
from templora.bench.results import Results
from templora.cli import app
from templora.errors import InvalidRecipe, InvalidText, OutputError
from templora.events import ChunkLearned, ChunkScored, RolledBack, Token
from templora.session import Session
from templora.tasks.score import Scores, score, scoring
from templora.testing import ByteTokenizer, tiny_llama

TEXT = (Path(__file__).parent.parent / "LICENSE").read_text("utf-8").strip()[:700]
SIZES = {"window": 32, "chunk": 16, "context": 32}
HOLLOW = json.dumps(
    [dict.fromkeys(("document", "tokens", "chunks", "learn_seconds", "seed"), 0) | {"config": {}}]
)


def test_every_token_is_scored_once_in_order_and_before_it_is_learned(base: Base) -> None:
    ids = base.encode(TEXT)
    events = list(scoring(base.session(seed=1, **SIZES), ids))
    covered = [t for e in events if isinstance(e, ChunkScored) for t in range(e.start, e.start + e.tokens)]
    assert covered == list(range(1, len(ids) + 1))  # 0 is the start token
    kinds = [(e.chunk, type(e)) for e in events if isinstance(e, ChunkScored | ChunkLearned)]
    assert kinds == sorted(kinds, key=lambda k: (k[0], k[1] is ChunkLearned))


def test_the_first_chunk_is_scored_by_the_base_alone(base: Base) -> None:
    first = next(iter(scoring(base.session(seed=1, **SIZES), base.encode(TEXT))))
    assert isinstance(first, ChunkScored)
    assert first.adapted_nll == first.base_nll


def test_perplexity_is_of_all_tokens_and_the_authors_statistic_stands_beside_it(base: Base) -> None:
    scores = score(base, TEXT, seed=1, **SIZES)
    nll = sum(c["adapted_nll"] for c in scores.chunks)
    tokens = len(base.encode(TEXT))
    assert scores.adapted.perplexity == pytest.approx(math.exp(nll / tokens))
    assert scores.adapted.bits_per_byte == pytest.approx(nll / math.log(2) / len(TEXT.encode()))
    weighted = sum(math.exp(c["adapted_nll"] / c["tokens"]) * c["tokens"] for c in scores.chunks) / tokens
    assert scores.mean_chunk_perplexity("adapted_nll") == pytest.approx(weighted)
    assert scores.mean_chunk_perplexity("adapted_nll") > scores.adapted.perplexity


def test_the_first_token_of_a_text_without_a_start_token_is_neither_scored_nor_are_its_bytes_counted() -> (
    None
):
    tokenizer = ByteTokenizer()
    tokenizer.bos_token = tokenizer.eos_token = None
    base = templora.load(model=tiny_llama(), tokenizer=tokenizer)
    scores = score(base, TEXT[:40], seed=1, **SIZES)
    assert scores.adapted.tokens == scores.adapted.bytes == 39
    assert score(base, "", seed=1, **SIZES).adapted.bytes == 0


@pytest.mark.parametrize("piece", [{"skip": -3}, {"tokens": -5}])
def test_a_piece_before_the_beginning_is_refused(base: Base, piece: dict[str, int]) -> None:
    with pytest.raises(InvalidText, match="give numbers of 0 or more"):
        score(base, TEXT, seed=1, **SIZES, **piece)


def test_skip_and_tokens_take_a_piece_of_the_text(base: Base) -> None:
    ids = base.encode(TEXT)
    piece = score(base, TEXT, seed=1, skip=100, tokens=50, **SIZES)
    whole = score(base, base.decode(ids[100:150]), seed=1, **SIZES)
    assert piece.chunks[0]["adapted_nll"] == whole.chunks[0]["adapted_nll"]
    assert piece.adapted.tokens == 50


def test_two_runs_with_the_same_seed_are_identical_but_for_times(base: Base) -> None:
    def nlls(seed: int) -> list[tuple[float, float]]:
        return [(c["adapted_nll"], c["base_nll"]) for c in score(base, TEXT[:300], seed=seed, **SIZES).chunks]

    assert nlls(1) == nlls(1)
    assert nlls(1) != nlls(2)


def run(*words: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(w) for w in words])
    return result.exit_code, result.stderr


def test_the_command_writes_results_resumes_and_survives_a_bad_file(folder: Path, tmp_path: Path) -> None:
    good, other, bad = tmp_path / "good.txt", tmp_path / "other.txt", tmp_path / "bad.txt"
    good.write_text(TEXT, "utf-8")
    other.write_text(TEXT[::-1], "utf-8")
    bad.write_bytes(b"\xff\xfe\x00")
    out, picture = tmp_path / "scores.json", tmp_path / "scores.png"
    out.symlink_to(tmp_path / "kept.json")
    options = ["--model", folder, "--window", "32", "--chunk", "16", "--context", "32", "--json", out]
    code, errors = run("score", good, bad, *options, "--plot", picture)
    assert code == 2
    assert len([line for line in errors.splitlines() if line.startswith("error:")]) == 1
    (entry,) = json.loads(out.read_text("utf-8"))
    assert entry["document"] == str(good)
    assert entry.keys() >= {"tokens", "base", "adapted", "chunks", "seconds", "learn_seconds", "peak_rss_mb"}
    assert entry.keys() >= {"config", "versions", "git", "seed"}
    assert out.is_symlink() and len(json.loads((tmp_path / "kept.json").read_text("utf-8"))) == 1
    assert picture.stat().st_size > 10_000
    assert run("score", good, *options)[0] == 2, "results must not be overwritten"
    code, errors = run("score", good, other, *options, "--resume")
    assert code == 0
    assert str(good) not in errors, "a finished document was done again"
    assert [e["document"] for e in json.loads(out.read_text("utf-8"))] == [str(good), str(other)]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--plot", "{tmp}/no/x.png"], "no folder {tmp}/no for x.png; make it"),
        (["--plot", "{tmp}/x.jpgg"], "x.jpgg is no kind of picture; choose a name that ends in .png"),
        (["--plot", "{tmp}"], "{tmp} is a folder, not a picture"),
        (["--json", "{tmp}/no/x.json"], "no folder {tmp}/no; make it"),
        (["--resume"], "there is nothing to resume; name it with --json"),
        (["--resume", "--json", "-"], "there is nothing to resume; name it with --json"),
    ],
)
def test_what_cannot_be_stored_or_drawn_is_refused_before_a_base_is_loaded(
    words: list[str], reason: str, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text(TEXT, "utf-8")
    given = [word.format(tmp=tmp_path) for word in words]
    code, errors = run("score", tmp_path / "a.txt", "--model", "nowhere", *given)
    assert code == 2 and errors.count("\n") == 1
    assert reason.format(tmp=tmp_path) in errors


def test_a_picture_that_cannot_be_drawn_does_not_cost_the_results(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT, "utf-8")
    (tmp_path / "x.png").symlink_to(tmp_path / "no" / "x.png")
    words = ["score", "a.txt", "--tokens", "40", "--json", "-", "--plot", "x.png"]
    words = [str(tmp_path / word) if "." in word else word for word in words]
    done = CliRunner().invoke(app, [*words, "--model", str(folder)])
    assert done.exit_code == 2 and "cannot write" in done.stderr.splitlines()[-1]
    assert [entry["tokens"] for entry in json.loads(done.stdout)] == [40]


@pytest.mark.parametrize("batch", ["1", "2"])
def test_a_text_that_is_named_twice_is_scored_once(folder: Path, tmp_path: Path, batch: str) -> None:
    first, other, out = tmp_path / "a.txt", tmp_path / "b.txt", tmp_path / "d.json"
    first.write_text(TEXT, "utf-8")
    other.write_text(TEXT[::-1], "utf-8")
    words = ["--model", folder, "--window", "32", "--tokens", "40", "--json", out, "--batch", batch]
    assert run("score", first, first, other, *words)[0] == 0
    assert sorted(e["document"] for e in json.loads(out.read_text("utf-8"))) == [str(first), str(other)]


SMALL = ("--window", "32", "--chunk", "16", "--context", "32")


def written(folder: Path) -> Path:
    """The text in a file."""
    (folder / "a.txt").write_text(TEXT, "utf-8")
    return folder / "a.txt"


def test_results_and_picture_do_not_share_a_file(folder: Path, tmp_path: Path) -> None:
    text = written(tmp_path)
    same = tmp_path / "same.png"
    code, said = run("score", text, "--model", folder, "--json", same, "--plot", same)
    assert code == 2
    assert "choose two names" in said


def test_a_picture_keeps_its_name(folder: Path, tmp_path: Path) -> None:
    text = written(tmp_path)
    (tmp_path / "scores.png").write_text("precious")
    code, _ = run("score", text, "--model", folder, "--tokens", "40", *SMALL, "--plot", tmp_path / "scores")
    assert code == 0
    assert (tmp_path / "scores.png").read_text() == "precious"
    assert (tmp_path / "scores").read_bytes().startswith(b"\x89PNG")


def test_a_disk_that_is_full_costs_the_checkpoint_and_not_the_document(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = written(tmp_path)
    monkeypatch.setattr("templora.bench.checkpoint.EVERY", 0.0)
    # What stands where the checkpoint is to be written.
    (tmp_path / ".r.json.checkpoint.part").mkdir()
    code, said = run(
        "score", text, "--model", folder, "--tokens", "80", *SMALL, "--json", tmp_path / "r.json"
    )
    assert code == 0, said
    assert "begins this document anew" in said
    assert json.loads((tmp_path / "r.json").read_text())


def test_texts_that_end_together_leave_no_checkpoint_of_one_that_was_stopped_alone(
    folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text(TEXT, "utf-8")
    left = tmp_path / ".d.json.checkpoint"
    left.write_bytes(b"half of a.txt")
    words = ["--model", folder, "--tokens", "40", "--json", tmp_path / "d.json", "--batch", "2", "--resume"]
    assert run("score", tmp_path / "a.txt", *words)[0] == 0
    assert not left.exists()


def test_without_the_base_nothing_is_said_of_it(base: Base) -> None:
    """The guard's own looks at some chunks are no figure of the text."""
    scores = score(base, TEXT, seed=1, score_base=False, **SIZES)
    assert scores.base.tokens == 0 and scores.adapted.tokens > 0
    reading = base.session(seed=1, **SIZES).read(TEXT)
    assert reading.base_perplexity is None and reading.adapted_perplexity is not None


def test_results_go_to_the_screen_if_asked(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT, "utf-8")
    words = ["score", str(tmp_path / "a.txt"), "--model", str(folder), "--json", "-"]
    (entry,) = json.loads(CliRunner().invoke(app, words).stdout)
    assert entry["tokens"] > 0


def test_what_the_guard_did_is_told(base: Base) -> None:
    scores = score(base, TEXT[:320] + "so " * 100, seed=1, window=64, context=64, chunk=32)
    told = [c["guard"] for c in scores.chunks if "guard" in c]
    assert scores.guarded == {"repetition": len(told)}
    assert len(told) >= 2
    assert all(c["start"] >= 320 for c in scores.chunks if "guard" in c)
    again = Scores()
    again.restore(scores.chunks)
    assert again.guarded == scores.guarded
    scores.take(RolledBack(chunk=9, version=3, rate=0.5))
    assert scores.guarded["rolled_back"] == 1


def chunk(start: int, base: float, adapted: float) -> dict[str, float]:
    return {"start": start, "tokens": 100, "base_nll": base, "adapted_nll": adapted, "learn_seconds": 0.0}


def test_bins_add_sums_and_divide_once() -> None:
    results = [
        {"tokens": 300, "chunks": [chunk(0, 100, 100), chunk(100, 300, 200), chunk(200, 100, 50)]},
        {"tokens": 100, "chunks": [chunk(0, 300, 100)]},
    ]
    (_, base, adapted), (_, late, _) = tables.by_position(results, [(0, 150), (150, None)])
    assert base.perplexity == pytest.approx(math.exp(700 / 300))
    assert adapted.perplexity == pytest.approx(math.exp(400 / 300))
    assert late.tokens == 100
    (_, short, _), (_, long, _) = tables.by_length(results, [(0, 200), (200, None)])
    assert (short.tokens, long.tokens) == (100, 300)
    assert "| 0–150K | 400 |" in tables.markdown(tables.by_position(results, [(0, 150_000)]), "position")
    four = [{"tokens": 400, "chunks": [chunk(1, 100, 100), chunk(101, 1, 1), chunk(301, 100, 50)]}]
    assert pg19.quarters(four) == "First quarter +0.0 %, last quarter -39.3 %."
    last = {"tokens": 401, "chunks": [chunk(1, 100, 100), chunk(401, 100, 50)]}  # of one token
    assert pg19.quarters([last]) == "First quarter +0.0 %, last quarter -39.3 %."
    assert pg19.quarters(results) == "Too short for quarters."


def test_windows_double_up_to_the_largest_that_leaves_room_to_go_on() -> None:
    assert cost.windows(2048, 64) == [128, 256, 512, 1024, 1536]
    assert cost.windows(128, 64) == [64]


def test_a_sweep_runs_every_combination_and_puts_the_best_on_top(base: Base, tmp_path: Path) -> None:
    config = tmp_path / "sweep.yaml"
    config.write_text(
        "set: {window: 32, chunk: 16, context: 32}\nruns:\n  - {learning_rate: [0, 0.01]}\n  - {}\n"
    )
    plan = sweep.read(config)
    assert plan.runs == [{"learning_rate": 0}, {"learning_rate": 0.01}, {}]
    texts = [("one", TEXT[:300]), ("two", TEXT[300:600])]
    outcomes = list(sweep.run(base, plan, texts))
    assert [o.changes for o in sweep.run(base, plan, texts, batch=2)] == [o.changes for o in outcomes]
    assert outcomes[0].changes == [0.0, 0.0]
    lines = sweep.markdown(outcomes).splitlines()[2:]
    means = [float(line.split("|")[2].strip().removesuffix(" %")) for line in lines]
    assert means == sorted(means)
    config.write_text("nothing: here\n")
    with pytest.raises(InvalidRecipe, match="runs"):
        sweep.read(config)


@pytest.mark.parametrize(
    "changes", [{}, {"cache": "recompute"}, {"dropout": 0.1, "epochs": 2}, {"learning_rate": 0.5}]
)
def test_a_session_put_back_at_any_chunk_goes_on_bit_for_bit(base: Base, changes: dict[str, float]) -> None:
    ids = base.encode(TEXT)[:400]
    whole = list(scoring(base.session(seed=1, **SIZES, **changes), ids))
    scored = [e for e in whole if isinstance(e, ChunkScored)]
    for stop in (1, 7, 20):
        first = base.session(seed=1, **SIZES, **changes)
        loop = scoring(first, ids)
        before = 0
        while before < stop:
            before += isinstance(next(loop), ChunkScored)
        other = base.session(seed=1, **SIZES, **changes)
        other.load_state(first.state())
        rest = [e for e in scoring(other, ids) if isinstance(e, ChunkScored)]
        assert rest == scored[stop:]


def test_a_written_text_put_back_in_mid_chunk_goes_on_bit_for_bit(base: Base) -> None:
    def written(session: Session, tokens: int) -> list[int]:
        return [e.id for e in session.write(tokens) if isinstance(e, Token)]

    sizes = SIZES | {"learning_rate": 0.01}
    whole = written(base.session(seed=1, **sizes), 100)
    first = base.session(seed=1, **sizes)
    start = written(first, 41)
    other = base.session(seed=1, **sizes)
    other.load_state(first.state())
    assert start + written(other, 59) == whole


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--tokens", "90"], "tokens 60, not 90"),
        (["--skip", "3"], "skip 0, not 3"),
        (["--no-base"], "base True, not False"),
        (["--seed", "5"], "seed 0, not 5"),
        (["--set", "rank=8"], "rank 64, not 8"),
    ],
)
def test_results_of_different_runs_are_not_mixed(
    folder: Path, tmp_path: Path, more: list[str], named: str
) -> None:
    book, out = tmp_path / "book.txt", tmp_path / "scores.json"
    book.write_text(TEXT, "utf-8")
    words = ["score", book, "--model", folder, "--window", "32", "--json", out, "--resume"]
    assert run(*words, "--tokens", "60")[0] == 0
    before = out.read_text("utf-8")
    assert run(*words, "--tokens", "60")[0] == 0
    code, errors = run(*words, "--tokens", "60", *more)
    assert code == 2 and named in errors
    assert out.read_text("utf-8") == before


def test_a_checkpoint_of_other_tokens_is_not_gone_on_from(base: Base, tmp_path: Path) -> None:
    def begun(ids: list[int], score_base: bool = True) -> tuple[Checkpoint, Session]:
        made, session = Checkpoint(tmp_path / "scores.json", resume=True), base.session(seed=1, **SIZES)
        made.begin("book.txt", session, ids, score_base=score_base)
        return made, session

    ids = base.encode(TEXT)
    first, session = begun(ids)
    scores = Scores.of(base, ids)
    for event in islice(scoring(session, ids), 6):
        scores.take(event)
    first.store(session, scores, 3.0)
    for other in (begun(ids[:-1]), begun(ids, score_base=False)):
        fresh = Scores.of(base, ids)
        assert other[0].restore(other[1], fresh) == 0.0
        assert not fresh.chunks and not other[1].ids
    again, session = begun(ids)
    assert again.restore(session, Scores.of(base, ids)) == 3.0
    assert session.ids


def test_a_file_with_nothing_to_score_does_not_cost_the_others(folder: Path, tmp_path: Path) -> None:
    for name, text in (("a", TEXT[:5]), ("b", TEXT)):
        (tmp_path / f"{name}.txt").write_text(text, "utf-8")
    words = ["--model", folder, "--skip", "20", "--json", tmp_path / "out.json"]
    for batch in ("1", "2"):
        code, errors = run("score", tmp_path / "a.txt", tmp_path / "b.txt", *words, "--batch", batch)
        assert (
            errors.count(
                "warning: this base has 128 positions: chunk 64 → 62, context 1024 → 62, window 1024 → 62"
            )
            == 1
        )
        assert code == 2 and "no token is left to score after --skip 20" in errors
        (entry,) = json.loads((tmp_path / "out.json").read_text("utf-8"))
        assert entry["document"].endswith("b.txt")
        (tmp_path / "out.json").unlink()


@pytest.mark.parametrize("content", ["[{", "3", '[{"no": 1}]', "[1]", "{}", HOLLOW])
def test_a_file_that_holds_no_results_is_named(folder: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "a.txt").write_text(TEXT, "utf-8")
    (tmp_path / "out.json").write_text(content, "utf-8")
    code, errors = run(
        "score", tmp_path / "a.txt", "--model", folder, "--json", tmp_path / "out.json", "--resume"
    )
    assert code == 2 and "out.json does not hold results" in errors
    assert (tmp_path / "out.json").read_text("utf-8") == content


@pytest.mark.slow
def test_a_run_that_is_killed_resumes_to_the_result_of_one_that_was_not(folder: Path, tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text((Path(__file__).parent.parent / "LICENSE").read_text("utf-8"), "utf-8")
    options = [
        "--model",
        str(folder),
        "--window",
        "32",
        "--chunk",
        "16",
        "--context",
        "32",
        "--tokens",
        "6000",
    ]

    def command(out: Path) -> list[str]:
        # Checkpoints come every 20 seconds; a test cannot wait for that.
        program = "from templora import bench, cli; bench.checkpoint.EVERY = 0.2; cli.main()"
        return [sys.executable, "-c", program, "score", str(book), *options, "--json", str(out), "--resume"]

    subprocess.run(command(tmp_path / "whole.json"), check=True, capture_output=True)
    killed, checkpoint = tmp_path / "killed.json", tmp_path / ".killed.json.checkpoint"
    for _ in range(3):
        before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        process = subprocess.Popen(command(killed), stderr=subprocess.DEVNULL)
        while process.poll() is None and (not checkpoint.exists() or checkpoint.stat().st_mtime_ns == before):
            time.sleep(0.01)
        process.kill()
        assert process.wait() == -signal.SIGKILL, "it was done before it could be killed"
    subprocess.run(command(killed), check=True, capture_output=True)
    (whole,), (resumed,) = (json.loads(p.read_text("utf-8")) for p in (tmp_path / "whole.json", killed))
    times = {"learn_seconds"}
    strip = [[{k: v for k, v in c.items() if k not in times} for c in e["chunks"]] for e in (whole, resumed)]
    assert strip[0] == strip[1]
    assert whole["adapted"] == resumed["adapted"]
    assert whole["base"] == resumed["base"]


def scored(folder: Path, tmp_path: Path, *words: str) -> tuple[int, str]:
    """A text with results in r.json."""
    sizes = ["--window", "32", "--chunk", "16"]
    return run("score", tmp_path / "a.txt", *words, "--model", folder, *sizes, "--json", tmp_path / "r.json")


def test_a_text_that_was_changed_is_not_taken_for_the_one_that_was_scored(
    folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text(TEXT[:100], "utf-8")
    assert scored(folder, tmp_path)[0] == 0
    code, said = scored(folder, tmp_path, "--resume")
    assert (code, "all of these were scored before" in said) == (0, True)
    (tmp_path / "a.txt").write_text(TEXT[:120], "utf-8")
    code, said = scored(folder, tmp_path, "--resume")
    assert (code, "is no longer the text that was scored" in said) == (2, True)
    (tmp_path / "a.txt").unlink()
    assert scored(folder, tmp_path, "--resume")[0] == 0


def test_a_result_of_another_dtype_does_not_stand_beside_it(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT[:100], "utf-8")
    assert scored(folder, tmp_path)[0] == 0
    code, said = scored(folder, tmp_path, "--resume", "--dtype", "bfloat16")
    assert (code, "was scored with dtype float32, not bfloat16" in said) == (2, True)


def test_two_runs_into_one_file_keep_the_results_of_both(tmp_path: Path) -> None:
    entry = {
        "tokens": 1,
        "chunks": [],
        "learn_seconds": 0.5,
        "seed": 0,
        "config": {"model": "", "recipe": {}},
    }
    runs = [Results(tmp_path / "r.json", resume=False) for _ in range(2)]
    for name, results in zip("ab", runs, strict=True):
        results.add(entry | {"document": name})
    runs[0].add(entry | {"document": "c"})
    stored = json.loads((tmp_path / "r.json").read_text("utf-8"))
    assert sorted(one["document"] for one in stored) == ["a", "b", "c"]
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


def test_results_that_cannot_be_written_are_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="choose another place for it"):
        Results(tmp_path / ("x" * 300), resume=False)


def test_a_picture_that_is_there_is_not_overwritten(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT[:100], "utf-8")
    (tmp_path / "p.png").write_bytes(b"precious")
    code, said = scored(folder, tmp_path, "--plot", str(tmp_path / "p.png"))
    assert (code, "p.png exists and is never overwritten" in said) == (2, True)
    assert (tmp_path / "p.png").read_bytes() == b"precious"
    (tmp_path / "p.png").unlink()
    for words in ([], ["--resume"]):
        assert scored(folder, tmp_path, "--plot", str(tmp_path / "p.png"), *words)[0] == 0


def test_lines_that_end_as_on_windows_are_scored_as_any_others(folder: Path, tmp_path: Path) -> None:
    found: list[Any] = []
    for end in (b"\n", b"\r\n", b"\r"):
        (tmp_path / "a.txt").write_bytes(TEXT[:300].encode().replace(b"\n", end))
        assert scored(folder, tmp_path)[0] == 0
        found.append(json.loads((tmp_path / "r.json").read_text("utf-8"))[0]["adapted"])
        (tmp_path / "r.json").unlink()
    assert "\n" in TEXT[:300]
    assert found[0] == found[1] == found[2]


def test_a_rest_that_is_never_learned_is_counted_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after it, at rate 0."""
    (tmp_path / "a.txt").write_text(TEXT[:100], "utf-8")
    still = ["--set", "learning_rate=0"]
    assert scored(folder, tmp_path, *still)[0] == 0
    whole = json.loads((tmp_path / "r.json").read_text("utf-8"))[0]
    (tmp_path / "r.json").unlink()
    monkeypatch.setattr("templora.bench.checkpoint.EVERY", 0.0)
    monkeypatch.setattr("templora.bench.results.Results.add", lambda *_: (_ for _ in ()).throw(KeyError))
    scored(folder, tmp_path, *still)
    monkeypatch.undo()
    assert (tmp_path / ".r.json.checkpoint").exists()
    (tmp_path / "r.json").write_text("[]", "utf-8")
    assert scored(folder, tmp_path, *still, "--resume")[0] == 0
    again = json.loads((tmp_path / "r.json").read_text("utf-8"))[0]
    assert again["chunks"] == whole["chunks"]


@pytest.mark.parametrize("parts", [[], {}, {"key": ["x"]}, 7])
def test_a_checkpoint_that_is_none_is_not_gone_on_from(base: Base, tmp_path: Path, parts: Any) -> None:
    session, ids = base.session(seed=1, **SIZES), base.encode(TEXT)
    torch.save(parts, tmp_path / ".r.json.checkpoint")
    checkpoint = Checkpoint(tmp_path / "r.json", resume=True)
    checkpoint.begin("a", session, ids, score_base=True)
    assert checkpoint.restore(session, Scores.of(base, ids)) == 0.0
    assert session.ids == []


def test_the_commit_is_of_this_package_not_of_what_it_lies_in(tmp_path: Path) -> None:
    """As where a project keeps its virtual environment inside."""
    source = Path(templora.__file__).parent / "bench" / "result.py"
    package = tmp_path / "project" / ".venv" / "templora"
    package.mkdir(parents=True)
    (package / "result.py").write_bytes(source.read_bytes())
    (tmp_path / "project" / "novel.txt").write_text("x")
    me = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "novel.txt"], [*me, "commit", "-qm", "begin"]):
        subprocess.run(["git", *words], cwd=tmp_path / "project", check=True)
    ask = "import result; print(result.git_commit())"
    asked = [sys.executable, "-c", ask]
    done = subprocess.run(asked, cwd=package, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "None"
    subprocess.run(["git", "add", "-f", ".venv"], cwd=tmp_path / "project", check=True)
    done = subprocess.run(asked, cwd=package, capture_output=True, text=True, check=True)
    assert len(done.stdout.strip().rstrip("+")) == 40
