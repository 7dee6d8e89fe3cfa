"""The base with a window that holds the whole text, and no adapter: what one more token costs at a length.

The cache is filled up to that length with random keys and values, whose time and memory are those of real
ones; then tokens are written and timed one by one. Two decoders: the package's own and transformers'
`generate`.
"""

import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

from benchmarks import shapes
from benchmarks.measure import peak_mb
from benchmarks.plain import generate
from templora.base import Base
from templora.cache import on_top_of
from templora.decoder import Decoder
from templora.window import Plan, Span

WARM = 2  # tokens that are not counted


def states(base: Base, tokens: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Block, keys and values, [1, heads, tokens, head_dim], as if so many tokens had been seen."""
    config: Any = base.model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = (1, config.num_key_value_heads, tokens, width)
    for block in range(config.num_hidden_layers):
        keys, values = (torch.rand(shape, device=base.device, dtype=base.model.dtype) for _ in range(2))
        yield block, keys, values


def own(base: Base, length: int, tokens: int) -> list[float]:
    """Seconds of each of the last `tokens` of a text of `length`, with the package's decoder."""
    start = length - tokens
    decoder = Decoder(base, None, Plan(start, tokens, start, length), "reuse")
    for block, keys, values in states(base, start - 1):
        decoder.cache.update(keys, values, block)
    decoder.chunk = 0  # its window is cached
    ids, span = [1] * start, Span(0, 0, start, length)
    clocks = [time.perf_counter()]
    for _ in range(tokens):
        ids.append(int(decoder.logits(ids, span).argmax()))
        clocks.append(time.perf_counter())
    return gaps(clocks)


class Clock(BaseStreamer):
    """Notes when `generate` hands over a token."""

    def __init__(self) -> None:
        self.clocks: list[float] = []

    def put(self, value: Tensor) -> None:
        """A token, or at first the prompt."""
        self.clocks.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left over."""


def transformers(base: Base, length: int, tokens: int) -> list[float]:
    """The same with `generate`, as it comes."""
    start, cache, clock = length - tokens, DynamicCache(), Clock()
    for block, keys, values in states(base, start - 1):
        cache.update(keys, values, block)
    generate(base.model, [1] * start, tokens, streamer=clock, **on_top_of(base.model, cache))
    return gaps(clock.clocks)


def gaps(clocks: list[float]) -> list[float]:
    """Seconds between them, without the first few."""
    return [b - a for a, b in pairwise(clocks)][WARM:]


DECODERS: dict[str, Callable[[Base, int, int], list[float]]] = {"own": own, "generate": transformers}


def costs(shape: str, decoder: str, lengths: list[int], tokens: int) -> list[tuple[float, float]]:
    """(median seconds a token, peak memory in MB) at each length, rising; for a process of its own."""
    assert lengths == sorted(lengths), "a peak is the length's own only if it is the largest so far"
    base = shapes.base(shape, positions=max(lengths))
    return [(median(DECODERS[decoder](base, length, tokens)), peak_mb()) for length in lengths]


def total(lengths: list[int], seconds: list[float], length: int) -> float:
    """Seconds to write a whole text of `length`: what a token costs, added up over its length.

    Straight lines between the lengths that were measured; before the first, what it costs there.
    """
    spent, place, cost = 0.0, 0, seconds[0]
    for end, at_end in zip(lengths, seconds, strict=True):
        stop = min(end, length)
        at_stop = cost + (at_end - cost) * (stop - place) / (end - place) if end > place else at_end
        spent += (cost + at_stop) / 2 * (stop - place)
        if stop == length:
            break
        place, cost = end, at_end
    return spent


def crossover(lengths: list[int], seconds: list[float], other: float, step: int = 16) -> int | None:
    """The first length at which the whole text takes more than `other` seconds a token, if there is one."""
    for length in range(step, lengths[-1] + 1, step):
        if total(lengths, seconds, length) > other * length:
            return length
    return None
