"""transformers' logits processors on one text's scores: theirs, bit for bit, without what costs most of them.

Two of those that `sampling` uses look at the whole vocabulary anew with each token, and their list inspects
signatures. Here those two take a shorter way to the same scores; any other processor, or list, runs itself.
"""

from collections.abc import Callable, Sequence
from math import inf
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from templora.dry import DryLogitsProcessor

BLIND = {
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    MinPLogitsWarper,
}  # they do not look at the text
KNOWN = {
    *BLIND,
    RepetitionPenaltyLogitsProcessor,
    DryLogitsProcessor,
}  # they take what every processor takes and no more


def filtered(processors: LogitsProcessorList, visible: Sequence[int], scores: Tensor) -> Tensor:
    """What the processors make of the scores, [1, vocab]; visible: ids of the tokens seen."""
    kinds = {type(processor) for processor in processors}
    seen = [] if kinds <= BLIND else visible
    ids: Any = torch.tensor([seen], dtype=torch.long, device=scores.device)  # [1, seen]
    if type(processors) is not LogitsProcessorList or not kinds <= KNOWN:
        return processors(ids, scores)  # pyright: ignore[reportArgumentType]
    for processor in processors:
        way = WAYS.get(type(processor))
        made = way(processor, scores) if way else None
        scores = processor(ids, scores) if made is None else made  # pyright: ignore[reportArgumentType]
    return scores


def _suppressed(processor: Any, scores: Tensor) -> Tensor | None:
    """None where an id is no place in the vocabulary, which theirs passes over, and where there is none."""
    banned: Tensor = processor.suppress_tokens
    if not banned.numel() or banned.device != scores.device:
        return None
    if int(banned.min()) < 0 or int(banned.max()) >= scores.shape[-1]:
        return None
    return scores.index_fill(-1, banned, -inf)


def _nucleus(processor: Any, scores: Tensor) -> Tensor | None:
    """The values are sorted by numpy, without their places, which takes a tenth of the time and less.

    None where a place would decide, among scores that are equal, or where scores are not as usual.
    """
    plain = scores.device.type == "cpu" and scores.dtype == torch.float32 and not scores.requires_grad
    if not plain or processor.min_tokens_to_keep != 1 or processor.filter_value != -inf:
        return None
    values = torch.from_numpy(np.sort(scores.numpy(), axis=-1))
    away = values.softmax(dim=-1).cumsum(dim=-1) <= 1 - processor.top_p
    away[..., -1] = False
    count = int(away.sum())
    smaller = scores < values[0, count]
    return scores.masked_fill(smaller, -inf) if int(smaller.sum()) == count else None


WAYS: dict[type, Callable[[Any, Tensor], Tensor | None]] = {
    SuppressTokensLogitsProcessor: _suppressed,
    TopPLogitsWarper: _nucleus,
}
