"""Causal attention in fp32 whose earlier keys come from a cache and get no gradient.

torch's cannot leave that out, and multiplies by MKL.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from templora.products import product

BLOCK = 128  # queries at a time: their scores stay in the core's own cache


class CausalAttention(torch.autograd.Function):
    """The queries are those of the last keys; earlier keys come from a cache and get no gradient.

    firsts: the first key that each text sees.

    Scores are made a block of queries at a time, and again on the way back: none are kept.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, firsts: tuple[int, ...]
    ) -> Tensor:
        texts, heads, queries, width = query.shape
        out = query.new_empty(texts, queries, heads, width)
        for text, group, rows, columns in _blocks(query, key, firsts):
            q, k, v = _of_block(query, key, value, text, group, rows, columns)
            mixed = product(_weights(q, k, scale), v.T)
            out[text, rows, group.heads] = mixed.view(*q.shape).transpose(0, 1)
        ctx.save_for_backward(query, key, value)
        ctx.scale, ctx.firsts = scale, firsts
        return out.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        slopes, scale = upstream[0], ctx.scale  # [texts, heads, queries, width]
        q_slope, k_slope, v_slope = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        old = key.shape[2] - query.shape[2]
        for text, group, rows, columns in _blocks(query, key, ctx.firsts):
            q, k, v = _of_block(query, key, value, text, group, rows, columns)
            weights = _weights(q, k, scale)  # [heads · rows, columns]
            slope = slopes[text, group.heads, rows].reshape(-1, q.shape[-1])
            score_slope = torch.ops.aten._softmax_backward_data(product(slope, v), weights, -1, torch.float32)
            q_slope[text, group.heads, rows] = product(score_slope, k.T).view(q.shape).mul_(scale)
            own, new = q.reshape(-1, q.shape[-1]), slice(old, columns.stop)
            first = old - columns.start
            v_slope[text, group.kv, new] += product(weights[:, first:].T, slope.T)
            k_slope[text, group.kv, new] += product(score_slope[:, first:].T, own.T).mul_(scale)
        return q_slope, k_slope, v_slope, None, None


class _Group(NamedTuple):
    """A head of the keys and the heads of the queries that look at it."""

    kv: int
    heads: slice


def _blocks(query: Tensor, key: Tensor, firsts: Sequence[int]) -> Iterator[tuple[int, _Group, slice, slice]]:
    """Text, group, queries, and the keys that the last of them sees."""
    shared, queries = query.shape[1] // key.shape[1], query.shape[2]
    for text, first in enumerate(firsts):
        for index in range(key.shape[1]):
            group = _Group(index, slice(index * shared, (index + 1) * shared))
            for start in range(0, queries, BLOCK):
                stop = min(start + BLOCK, queries)
                yield text, group, slice(start, stop), slice(first, key.shape[2] - queries + stop)


def _of_block(
    query: Tensor, key: Tensor, value: Tensor, text: int, group: _Group, rows: slice, columns: slice
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, [heads, rows, width], keys and values, [columns, width]."""
    return query[text, group.heads, rows], key[text, group.kv, columns], value[text, group.kv, columns]


def _weights(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """What each key counts, [heads · rows, columns]; the last of the rows sees every column.

    query: [heads, rows, width]. key: [columns, width].
    """
    heads, rows, width = query.shape
    scores = product(query.reshape(-1, width) * scale, key)
    later = torch.full((rows, rows), -torch.inf).triu_(1)
    scores.view(heads, rows, -1)[:, :, -rows:] += later
    return scores.softmax(-1)


def firsts_of(mask: Tensor) -> tuple[int, ...] | None:
    """The first key that each text sees; None where the mask is not a causal one from there on.

    Causal: the queries, which come last, see all keys up to their own and no other.
    mask: [texts or 1, queries, keys], bool.
    """
    _, queries, keys = mask.shape
    firsts = mask[:, -1].int().argmax(1)
    seen = torch.arange(keys) >= firsts.unsqueeze(1)  # [texts, keys]
    causal = torch.ones(queries, keys, dtype=torch.bool).tril_(keys - queries)
    old = int(firsts.max()) <= keys - queries
    return tuple(firsts.tolist()) if old and torch.equal(mask, causal & seen.unsqueeze(1)) else None
