"""DRY, "don't repeat yourself": a penalty on each token that would carry a repetition on.

The idea, its formula and its names are those of text-generation-webui and llama.cpp. Where the last n
tokens stand elsewhere in what is seen, the token that followed them there loses
multiplier · base^(n - allowed length) of its logit, from n = allowed length on: a word may come again as
often as it likes, a sentence hardly. There are no sequence breakers: they are for the roles of a chat, and
the loops of a novel run through its dialogue.

A text can evade that: leaders of dots or underscores, with a word of any kind between them, never repeat
themselves for long, and a base that sees a window of nothing else goes on with it for ever. So where what is
seen says little, by the entropy of its tokens, each loses by its share of it as well, until that is prose.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor

LONGEST = 50  # tokens: by then a penalty is beyond every logit
LEAST_ENTROPY = 0.65  # of what n different tokens have; 512 tokens of a novel have above 0.76
ENOUGH = 64  # tokens, before that says anything
CROWDED = 60.0  # what a token loses of its logit if it is all that is seen


class DryLogitsProcessor(LogitsProcessor):
    """As transformers' processors: input_ids [batch, seen], scores [batch, vocab]."""

    def __init__(self, multiplier: float, base: float, allowed_length: int) -> None:
        self.multiplier, self.base, self.allowed_length = multiplier, base, allowed_length

    def __call__(self, input_ids: Any, scores: Any) -> Tensor:
        """Scores less the penalties; what carries no repetition on stays as it is, bit for bit."""
        scores = scores.clone()
        for row, ids in enumerate(input_ids.cpu().numpy()):
            repeats = {token: n for token, n in repetitions(ids).items() if n >= self.allowed_length}
            if repeats:
                tokens = torch.tensor(list(repeats), device=scores.device)
                lengths = torch.tensor(list(repeats.values()), device=scores.device, dtype=torch.float32)
                penalties = self.multiplier * self.base ** (lengths - self.allowed_length)
                scores[row, tokens] -= penalties.to(scores.dtype)
            if len(ids) >= ENOUGH and (lacking := 1 - _entropy(ids) / LEAST_ENTROPY) > 0:
                shares = np.bincount(ids, minlength=scores.shape[1]) / len(ids)
                scores[row] -= torch.from_numpy(CROWDED * lacking * shares).to(scores)
        return scores


def _entropy(ids: np.ndarray) -> float:
    """Of the tokens' distribution, as a share of what so many different ones would have."""
    counts = np.unique(ids, return_counts=True)[1]
    return 1 - float(counts @ np.log(counts)) / (len(ids) * np.log(len(ids)))


def repetitions(ids: Sequence[int] | np.ndarray) -> dict[int, int]:
    """Of each token that has followed what the text now ends with: how many tokens before it are the same.

    The most where there are several places; LONGEST at most.
    """
    ids = np.asarray(ids)
    last = len(ids) - 1
    found = dict[int, int]()
    ends = np.flatnonzero(ids[:last] == ids[last]) if last > 0 else ids[:0]
    for length in range(1, LONGEST + 1):
        if not len(ends):
            break
        found |= dict.fromkeys(ids[ends + 1].tolist(), length)
        ends = ends[ends >= length]
        ends = ends[ids[ends - length] == ids[last - length]]
    return found
