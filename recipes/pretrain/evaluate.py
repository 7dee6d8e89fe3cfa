"""Bits per character of a base on the dev novels: the figure in the model card.

    python recipes/pretrain/evaluate.py src/templora/models/novelist --data ../shared/data

Protocol: each novel apart, the boundary token first, texts as they are. Windows of 2,048 tokens,
each beginning 1,024 after the last; a token is scored once, in the first window that holds it, so
that past a novel's first window every token sees at least 1,024 tokens before it. fp32 arithmetic.
The loss by position counts every position of every full window, so the bins
hold nearly, not exactly, the same tokens: a difference of 0.01 nats between them means nothing. What
a longer context is worth stands beside it: the same tokens with and without 1,024 more before them.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from data import encode, read_documents
from measure import LossCount, MatchedPositions, TextLengths
from model import token_losses
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM


def windows(tokens: int, window: int, stride: int) -> list[tuple[int, int, int]]:
    """Plan which tokens each window sees and scores.

    Args:
        tokens: targets in the text; target `i` is token `i + 1`.
        window: targets a window holds at most.
        stride: how much later the next window begins.

    Returns:
        (start, first scored, end) of each window; the scored parts cover every target once.
    """
    plan, scored, start = [], 0, 0
    while scored < tokens:
        end = min(start + window, tokens)
        plan.append((start, scored, end))
        scored, start = end, start + stride
    return plan


@torch.no_grad()
def score_novel(
    model: LlamaForCausalLM, stream: np.ndarray, window: int, count: LossCount, matched: MatchedPositions
) -> None:
    """Add one novel's losses to `count` and `matched`; `stream` begins with the boundary token."""
    ids = torch.from_numpy(stream.astype(np.int64)).to(model.device)
    before = None  # the losses of the window half a window earlier
    for start, first, end in windows(len(ids) - 1, window, window // 2):
        row = ids[start : end + 1][None]  # [1, window + 1]
        losses = token_losses(model, row)
        count.add(losses[:, first - start :], row[:, 1 + first - start :])
        if end - start == window:
            count.add_positions(losses)
            if before is not None:
                matched.add(before, losses[0])
            before = losses[0]


def main() -> None:
    """Read the command line, evaluate, print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--window", type=int, default=2048)
    args = parser.parse_args()
    started = time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = LlamaForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(device).eval()
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    count, matched = LossCount(TextLengths.of(tokenizer)), MatchedPositions(args.window // 2)
    for document in read_documents(args.data / "novels.dev.jsonl.xz"):
        # Without the closing boundary: the figure is about the text.
        score_novel(model, encode([document], tokenizer)[:-1], args.window, count, matched)
    seconds = round(time.monotonic() - started, 1)
    gains = {f"gain_of_{matched.earlier}_more_by_position": matched.report()}
    print(json.dumps({"window": args.window, **count.report(), **gains, "seconds": seconds}, indent=2))


if __name__ == "__main__":
    main()
