"""The pretraining recipe at toy size: it resumes exactly, covers its data, refuses what it must."""

from __future__ import annotations

import json
import lzma
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from pydantic import ValidationError
from tokenizers import Tokenizer

RECIPE = Path(__file__).parents[2] / "recipes" / "pretrain"
WORDS = [
    "the",
    "old",
    "captain",
    "looked",
    "at",
    "the",
    "grey",
    "sea",
    "and",
    "said",
    "nothing",
    "to",
    "his",
    "young",
    "friend",
]


@pytest.fixture(scope="module", autouse=True)
def recipe_on_path():
    """Import the scripts as they import each other, and forget them afterwards."""
    before = set(sys.modules)
    sys.path.insert(0, str(RECIPE))
    yield
    sys.path.remove(str(RECIPE))
    names = {path.stem for path in RECIPE.glob("*.py")}
    for name in (set(sys.modules) - before) & names:
        del sys.modules[name]


def text(seed: int, words: int = 4000) -> str:
    rng = np.random.default_rng(seed)
    return " ".join(rng.choice(WORDS, words))


def toy_config(**changes: object):
    from config import PretrainConfig

    settings = {
        "shape": {"vocabulary": 300, "layers": 1, "hidden": 32, "feed_forward": 64, "heads": 2},
        "stages": [{"progress": 0, "window": 16}, {"progress": 0.5, "window": 32}],
        "total_tokens": 512,
        "batch_tokens": 64,
        "evaluate_blocks": 2,
        "bf16": False,
    }
    return PretrainConfig.model_validate(settings | changes)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    from data import Document
    from vocabulary import train_tokenizer

    return train_tokenizer([Document("a", text(0) + " “Déjà vu,” he cried.")], 300)


def toy_run(folder: Path, tokenizer: Tokenizer):
    from data import Document, encode
    from train import Run

    stream = encode([Document("a", text(1)), Document("b", text(2))], tokenizer)
    folder.mkdir()
    return Run(toy_config(), folder, tokenizer, stream, stream, torch.device("cpu"))


def test_a_stopped_and_resumed_training_gives_the_same_losses(tmp_path, tokenizer):
    from train import train

    whole = train(toy_run(tmp_path / "whole", tokenizer))
    run = toy_run(tmp_path / "parts", tokenizer)
    parts = train(run, stop_after=3) + train(run)
    assert len(whole) == 8  # 512 tokens in batches of 64
    assert parts == whole
    assert whole[-1] < whole[0]


@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path):
    for name, seeds in (("train", range(6)), ("dev", range(6, 8))):
        rows = [json.dumps({"title": str(seed), "text": text(seed)}) for seed in seeds]
        with lzma.open(tmp_path / f"novels.{name}.jsonl.xz", "wt", encoding="utf-8") as file:
            file.write("\n".join(rows))
    config = toy_config(total_tokens=20 * 64, overlap_limit=0.99).model_dump()
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(config), "utf-8")
    logs = {}
    for processes in (1, 2):
        out = tmp_path / str(processes)
        line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
        line += [RECIPE / "train.py", "--config", tmp_path / "toy.yaml", "--data", tmp_path, "--out", out]
        subprocess.run([str(part) for part in line], check=True)
        logs[processes] = [json.loads(row) for row in (out / "log.jsonl").read_text("utf-8").splitlines()]
        assert (out / "export" / "model.safetensors").exists()
    (one, dev_one), (two, dev_two) = logs[1], logs[2]
    assert one["step"] == two["step"] == 20
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-3)
    assert dev_two["dev"]["nats_per_token"] == pytest.approx(dev_one["dev"]["nats_per_token"], rel=1e-3)


def test_the_exported_folder_loads_with_the_trained_weights_in_bf16(tmp_path, tokenizer):
    from model import build_model, export
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = build_model(toy_config(), boundary=0)
    export(model, tokenizer, tmp_path, None)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == torch.bfloat16
    assert loaded.config.max_position_embeddings == 32
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.bfloat16()), name
    read = AutoTokenizer.from_pretrained(tmp_path)
    assert read.decode(read("the old captain").input_ids) == "the old captain"
    assert read.bos_token == read.eos_token == "<|endoftext|>"


def test_one_novel_in_so_many_is_held_out_of_the_stream(tmp_path, tokenizer):
    from data import Document, encode, hold_out, load_stream

    novels = [Document(str(seed), text(seed, 60)) for seed in range(7)]
    kept, held = hold_out(novels, 3)
    assert [d.title for d in kept] == ["0", "1", "3", "4", "6"] and [d.title for d in held] == ["2", "5"]
    assert hold_out(novels, None) == (novels, [])
    with lzma.open(tmp_path / "novels.jsonl.xz", "wt", encoding="utf-8") as file:
        file.write("\n".join(json.dumps(vars(novel)) for novel in novels))
    stream = load_stream(tmp_path / "novels.jsonl.xz", [], tokenizer, tmp_path / "train.npy", 0.01, 3)
    assert np.array_equal(stream, encode(kept, tokenizer))


def test_a_pass_takes_each_block_once_whatever_the_window():
    from data import Batches

    stream = np.arange(32 * 101 + 1, dtype=np.uint16)
    batches = Batches(stream, longest=32, seed=0)
    pass_tokens = 64 * 32
    for window in (8, 32):
        rows = [batches.take(taken, 64, window) for taken in range(0, pass_tokens, 64)]
        inputs = torch.cat(rows)[:, :-1].flatten()
        assert len(inputs) == pass_tokens == len(set(inputs.tolist()))
        assert torch.equal(rows[0][:, 1:], rows[0][:, :-1] + 1)


def test_every_target_is_scored_once_with_half_a_window_before_it():
    from evaluate import windows

    assert windows(10, 4, 2) == [(0, 0, 4), (2, 4, 6), (4, 6, 8), (6, 8, 10)]
    assert windows(3, 4, 2) == [(0, 0, 3)]
    assert windows(5, 4, 2) == [(0, 0, 4), (2, 4, 5)]


def test_a_longer_context_is_judged_on_the_same_tokens():
    from measure import MatchedPositions

    matched = MatchedPositions(earlier=1024)
    for noise in (0.0, 1.0):  # a chapter that is harder throughout must not count
        losses = torch.full((2048,), 3.0 + noise)
        losses[1280:1536] -= 0.5  # where 256 to 512 tokens stand before it in the later window
        matched.add(losses, torch.full((2048,), 3.0 + noise))
    assert matched.report() == {"0-256": [0, 0], "256-512": [0.5, 0], "512-1024": [0, 0]}


def test_token_lengths_add_up_to_the_text(tokenizer):
    from measure import TextLengths

    sentence = "the “Déjà” captain\n"
    ids = tokenizer.encode(sentence).ids
    lengths = TextLengths.of(tokenizer)
    assert lengths.byte_counts[ids].sum() == len(sentence.encode())
    assert lengths.character_counts[ids].sum() == len(sentence)
    assert lengths.byte_counts[tokenizer.token_to_id("<|endoftext|>")] == 0


def test_a_document_with_a_page_of_an_unseen_text_is_found():
    from overlap import overlaps

    unseen = " ".join(f"word{i}" for i in range(500))
    page = "Here it begins: " + unseen[1000:2000].upper().replace(" ", ", ")
    other = " ".join(f"other{i}" for i in range(500))
    copied, free = overlaps([("copied", page), ("free", other)], [unseen])
    assert copied.share > 0.8
    assert free.shared == 0
    assert free.runs == 488


def test_an_unknown_key_and_a_window_that_does_not_fit_are_refused():
    with pytest.raises(ValidationError, match="learning_rate"):
        toy_config(learning_rate=1)
    with pytest.raises(ValidationError, match="window 24 must divide"):
        toy_config(stages=[{"progress": 0, "window": 24}, {"progress": 0.5, "window": 32}])


def test_the_committed_configurations_are_valid_and_the_rate_ends_at_zero():
    from config import load_config

    for path in RECIPE.glob("*.yaml"):
        config = load_config(path)
        assert config.longest == 2048
        assert config.rate_at(0) == 0
        assert config.rate_at(config.decay_from) == 1
        assert config.rate_at(1) == 0
