"""Each benchmark runs at toy size, and both of its sides compute the same; no time is asserted."""

import importlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM

import templora
from benchmarks import gpu
from benchmarks.names import kinds_of
from benchmarks.needs import Needs, recipe
from benchmarks.own_text import longest_repeat
from benchmarks.whole_window import crossover, total
from templora.testing import tiny_llama

ROOT = Path(__file__).parent.parent


Runs = Callable[..., dict[str, Any]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Runs]:
    """Runs a benchmark at toy size; its JSON. alone: in processes of its own, as a user does."""
    threads = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def runs(name: str, *options: str, alone: bool = False) -> dict[str, Any]:
        line = ["--toy", "--rounds", "1", "--out", str(tmp_path), *options]
        if alone:
            subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *line], cwd=ROOT, check=True)
        else:
            module = importlib.import_module(f"benchmarks.{name}")
            monkeypatch.setattr(sys, "argv", [name, *line])
            # A process for each side is most of the time at this size.
            monkeypatch.setattr(module, "in_child", lambda side, *args: side(*args), raising=False)
            module.main()
        return json.loads((tmp_path / f"{name}.json").read_text("utf-8"))

    yield runs
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["learn", "score", "write"])
def test_it_runs_and_both_sides_compute_the_same(name: str, run: Runs, tmp_path: Path) -> None:
    whole = run(name, alone=name == "learn")
    assert whole["machine"]["torch"]
    for result in whole["results"]:
        assert all(min(seconds) > 0 for seconds in result["seconds"].values())
        assert set(result["share_of_limit"]) == set(result["seconds"])
    assert (tmp_path / f"{name}.md").read_text("utf-8").startswith("| base |")
    assert (tmp_path / f"{name}.png").stat().st_size > 0


@pytest.mark.slow
def test_names_are_told_apart_by_how_long_ago_they_were_seen(run: Runs) -> None:
    text = "Anna came. The dog saw Anna, and Bob saw the dog; later Anna saw Bob."
    ends = list(range(1, len(text) + 1))  # a token a letter
    words = {(text[start:stop], start): kind for start, stop, kind in kinds_of(text, ends, 20)}
    names = [(word, kind) for (word, _), kind in words.items() if kind != "other words"]
    assert names == [
        ("Anna", "up to 16 windows ago"),
        ("Bob", "never"),
        ("Anna", "up to 16 windows ago"),
        ("Bob", "up to 16 windows ago"),
    ]
    assert words["Anna", 0] == "other words", "a sentence begins with any word"
    results = run("names")["results"]
    assert [r["words"] > 0 for r in results][-1]
    assert all(r["base"] >= 0 and r["adapted"] >= 0 for r in results)


@pytest.mark.slow
def test_bf16_products_come_to_the_same_nll(run: Runs) -> None:
    (result,) = run("precision")["results"]
    assert all(0 < abs(apart) < 1e-3 for apart in result["apart"].values())
    assert all(min(seconds) > 0 for seconds in result["seconds"].values())


@pytest.mark.slow
def test_writing_while_learning_runs(run: Runs) -> None:
    for result in run("parallel")["results"]:
        assert all(min(seconds) > 0 for seconds in result["seconds"].values())


@pytest.mark.slow
def test_several_texts_at_once_come_to_what_each_does_alone(run: Runs) -> None:
    results = run("batch")["results"]
    assert [(r["task"], r["texts"]) for r in results] == [
        ("score", 1),
        ("score", 3),
        ("write", 1),
        ("write", 3),
    ]
    for result in results:
        assert all(min(seconds) > 0 for seconds in result["seconds"].values())
        assert all(abs(apart) < 1e-4 for apart in result["apart"].values())


@pytest.mark.slow
def test_a_text_of_its_own_is_written_and_measured(run: Runs, tmp_path: Path) -> None:
    first = run("own_text", "--seeds", "1")["results"]
    sides = run("own_text", "--resume")["results"]
    assert [side for side in sides if side["seed"] == 1] == first
    assert [side["side"] for side in sides[::2]] == ["guard", "no guard", "no adapter"]
    assert [side["seed"] for side in sides] == [1, 2] * 3
    assert all(0 < part["distinct-4"] <= 1 for side in sides for part in side["parts"])
    assert (tmp_path / "own_text.png").stat().st_size > 0


def test_the_longest_repeat_is_what_a_plain_search_finds() -> None:
    assert longest_repeat([1, 2, 3, 4, 1, 2, 3, 5]) == 3
    assert longest_repeat([7] * 5) == 4
    assert longest_repeat([1, 2, 3]) == 0


@pytest.mark.slow
def test_the_roofline_runs(run: Runs) -> None:
    (result,) = run("roofline")["results"]
    assert all(rate > 0 for rate in result["rates"].values())


@pytest.mark.slow
def test_long_texts_run(run: Runs, tmp_path: Path) -> None:
    results = run("long_window")
    (text,), (window,) = results["text"], results["window"]
    for kind in ("write", "learn"):
        assert set(text[kind]["seconds"]) == {"short", "long"}
        assert text[kind]["learned"]["short"] == text[kind]["learned"]["long"] > 0
    assert [point["length"] for point in window["points"]] == [32, 64, 128]
    assert (tmp_path / "long_window.png").stat().st_size > 0


@pytest.mark.slow
def test_every_part_of_the_gpu_benchmark_runs_on_a_cpu(run: Runs) -> None:
    parts = run("gpu")["parts"]
    assert [name for name, part in parts.items() if "failed" in part or "skipped" in part] == []


def test_no_part_is_started_when_the_budget_is_used(run: Runs) -> None:
    parts = run("gpu", "--budget-minutes", "0")["parts"]
    assert all("skipped" in part for part in parts.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu"])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with pytest.raises(SystemExit) as stopped:
        gpu.main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"benchmarks.gpu: {gpu.NO_GPU}\n"


def spelled_out() -> LlamaForCausalLM:
    """A model whose attention is made of products that torch counts."""
    model = tiny_llama(num_hidden_layers=4)
    model.set_attn_implementation("eager")
    return model


def test_the_work_of_a_forward_pass_is_what_torch_counts() -> None:
    model, tokens = spelled_out(), 16
    needs = Needs(model.config, recipe("paper"))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.arange(tokens).unsqueeze(0))
    # Spelled out, attention computes the half that is masked as well.
    masked = needs.attention(tokens, 0, needs.blocks)
    assert counter.get_total_flops() == needs.forward(tokens, 0, tokens, adapter=False).flops + masked


@pytest.mark.parametrize("changes", [{}, {"first_block": 0.5, "head": 0.5}])
def test_the_work_of_a_learning_step_is_what_torch_counts(changes: dict[str, float]) -> None:
    base, tokens = templora.load(model=spelled_out()), 16
    # With dropout PEFT's layers stand in; torch does not count what ours add up in place.
    adapter = base.session("paper", window=16, context=16, chunk=16, dropout=0.1, **changes).adapter
    needs = Needs(base.model.config, recipe("paper", **changes))
    with FlopCounterMode(display=False) as counter, adapter.attached():
        base.model(torch.arange(tokens).unsqueeze(0)).logits.logsumexp(-1).sum().backward()
    passes = [needs.forward(tokens, 0, tokens, adapter=True), needs.backward(tokens, 0)]
    masked = needs.attention(tokens, 0, needs.blocks) + 2 * needs.attention(tokens, 0, needs.adapted)
    assert counter.get_total_flops() == sum(work.flops for work in passes) + masked


def test_what_a_text_costs_is_added_up_over_its_length() -> None:
    lengths, seconds = [100, 200, 400], [1.0, 2.0, 4.0]  # a hundredth of the length, from 100 on
    assert total(lengths, seconds, 50) == 50
    assert total(lengths, seconds, 200) == 100 + 150
    assert total(lengths, seconds, 300) == 100 + 150 + 250
    assert total(lengths, seconds, 400) == 100 + 150 + 600


def test_the_crossover_is_the_first_length_that_costs_more() -> None:
    lengths, seconds = [100, 200, 400], [1.0, 2.0, 4.0]
    assert crossover(lengths, seconds, 1.25, step=100) == 300
    assert crossover(lengths, seconds, 9.0) is None
