"""Compare sampling settings by looking: 20 samples of 300 tokens each, and how repetitive they are.

    python recipes/pretrain/samples.py src/templora/models/novelist --data ../shared/data

For each setting: distinct-3 (distinct word triples / word triples of one sample) and repetition
(share of word 4-grams that the sample had before), means over the samples. The same on excerpts of
the dev novels stands beside them: the setting to choose is near the novels, not the one with the
least repetition. `--show N` prints N samples a setting.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
from pathlib import Path

import torch
from data import read_documents
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

SAMPLES, TOKENS = 20, 300
OPENINGS = (
    "It was late in the evening when the carriage stopped before the old house.",
    "“You cannot mean it,” said the young man, and he laid down his hat.",
    "The captain looked at the sea for a long time before he answered.",
    "My aunt had never forgiven the doctor, and she took care that he should know it.",
)


def word_runs(text: str, length: int) -> list[tuple[str, ...]]:
    """Return all runs of `length` words, lower-cased."""
    words = re.findall(r"\w+", text.lower())
    return [tuple(words[i : i + length]) for i in range(len(words) - length + 1)]


def distinct(text: str) -> float:
    """Return the share of distinct word triples."""
    runs = word_runs(text, 3)
    return len(set(runs)) / max(len(runs), 1)


def repetition(text: str) -> float:
    """Return the share of word 4-grams that occurred before in the same text."""
    runs = word_runs(text, 4)
    return 1 - len(set(runs)) / max(len(runs), 1)


def measure(texts: list[str]) -> dict[str, float]:
    """Return the mean of both measures over texts."""
    return {
        "distinct_3": round(sum(map(distinct, texts)) / len(texts), 4),
        "repetition_4": round(sum(map(repetition, texts)) / len(texts), 4),
    }


def excerpts(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return 20 excerpts of 300 tokens from the dev novels, from the middle parts of the books."""
    documents = read_documents(path)
    found = []
    for index in range(SAMPLES):
        text = documents[index % len(documents)].text
        start = len(text) * (index + 4) // (SAMPLES + 8)
        ids = tokenizer(text[start : start + 10 * TOKENS], add_special_tokens=False).input_ids
        found.append(tokenizer.decode(ids[:TOKENS]))
    return found


@torch.no_grad()
def generate(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, **setting: float) -> list[str]:
    """Return 20 samples, the openings not included, from seed 0."""
    texts = []
    torch.manual_seed(0)
    for opening in OPENINGS:
        ids = tokenizer(tokenizer.bos_token + opening, return_tensors="pt").input_ids
        out = model.generate(
            ids.repeat(SAMPLES // len(OPENINGS), 1),
            attention_mask=torch.ones(SAMPLES // len(OPENINGS), ids.shape[1], dtype=torch.long),
            do_sample=True, top_k=0, max_new_tokens=TOKENS, min_new_tokens=TOKENS, **setting,
        )  # fmt: skip
        texts += tokenizer.batch_decode(out[:, ids.shape[1] :])
    return texts


def main() -> None:
    """Read the command line; print one JSON line a setting, and samples when asked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.7, 0.8, 0.9, 1.0])
    parser.add_argument("--top-p", type=float, nargs="+", default=[1.0])
    parser.add_argument("--min-p", type=float, nargs="+", default=[0.0, 0.05])
    parser.add_argument("--repetition-penalties", type=float, nargs="+", default=[1.0])
    parser.add_argument("--show", type=int, default=0)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = LlamaForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    novels = excerpts(args.data / "novels.dev.jsonl.xz", tokenizer)
    print(json.dumps({"setting": "dev novels", **measure(novels)}), flush=True)
    for temperature, top_p, min_p, penalty in itertools.product(
        args.temperatures, args.top_p, args.min_p, args.repetition_penalties
    ):
        setting = {
            "temperature": temperature, "top_p": top_p, "min_p": min_p,
            "repetition_penalty": penalty,
        }  # fmt: skip
        texts = generate(model, tokenizer, **setting)
        print(json.dumps({**setting, **measure(texts)}), flush=True)
        for text in texts[:: max(1, SAMPLES // args.show)][: args.show] if args.show else []:
            print(f"---\n{text}\n---", flush=True)


if __name__ == "__main__":
    main()
