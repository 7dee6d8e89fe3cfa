"""One token through a Llama as numpy arrays: what `step` computes, up to rounding, in less time.

A token's products read each weight once, so they take as long as the memory does; torch's (MKL's) fall short
of that, and with more than one thread far short, and numpy's own library does not. Its calls cost less, too.
It runs what stands in the model's places now, as `step` does, and leaves to `step` what it cannot run.
"""

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from templora import kernels
from templora.cache import WindowCache, WindowLayer
from templora.step import Step
from templora.step import step_of as exact_step_of

MOST_THREADS = 4  # of numpy's library: for products this small, more of them wait longer than they work
PLACES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
Array = NDArray[np.float32]


class ArrayStep:
    """Makes the logits after one token, as the `Step` it is given. Make it with `step_of`."""

    def __init__(self, step: Step) -> None:
        self.exact, self._model = step, step.model
        self._turns: tuple[Array, Array] | None = None  # cosines and sines, [positions, width]

    def __call__(self, token: int, position: int, cache: WindowCache) -> Tensor:
        """Run it on top of `cache`, which grows; [vocab]."""
        model = self._model
        if not (all(map(_is_array, _layers(model))) and all(map(_has_room, cache.layers))):
            return self.exact(token, position, cache)
        x: Array = _of(model.model.embed_tokens.weight)[token].copy()  # [width]
        turns = self._turn(position)
        with np.errstate(over="ignore"):  # in the exponential of a gate that is shut: 1 / (1 + inf) is 0
            for block, layer in zip(self.exact.blocks, cache.layers, strict=True):
                assert isinstance(layer, WindowLayer)
                x += _attention(block.self_attn, _norm(block.input_layernorm, x), turns, layer)
                h, own = _norm(block.post_attention_layernorm, x), block.mlp._modules
                gate = _through(own["gate_proj"], h)
                gate /= 1 + np.exp(-gate)
                gate *= _through(own["up_proj"], h)
                x += _through(own["down_proj"], gate)
        return torch.from_numpy(_through(model._modules["lm_head"], _norm(model.model.norm, x)))

    def _turn(self, position: int) -> tuple[Array, Array]:
        if self._turns is None or position >= len(self._turns[0]):
            cos, sin = self.exact.turns(position)
            self._turns = cos[:, 0].numpy(), sin[:, 0].numpy()
        return self._turns[0][position], self._turns[1][position]


@torch.no_grad()
def step_of(model: PreTrainedModel) -> "ArrayStep | Step | None":
    """The fastest short cut for this model on this machine; None where there is none."""
    exact = exact_step_of(model)
    if exact is None or not pays() or not all(map(_is_array, _layers(model))):
        return exact
    return ArrayStep(exact)


def pays() -> bool:
    """Whether numpy is the faster one: decided by the machine and its threads, never by a clock."""
    asked = os.environ.get("OPENBLAS_NUM_THREADS") or os.environ.get("OMP_NUM_THREADS") or ""
    return kernels.is_wide() and (int(asked) if asked.isdigit() else os.cpu_count() or 1) <= MOST_THREADS


def _layers(model: Any) -> Iterator[nn.Module]:
    """What stands in the places of its linear layers."""
    for block in model.model.layers:
        for part in (block.self_attn._modules, block.mlp._modules):
            yield from (part[name] for name in PLACES if name in part)
    yield model._modules["lm_head"]


def _is_array(layer: nn.Module) -> bool:
    return type(layer) is nn.Linear and layer._parameters["weight"].dtype == torch.float32  # pyright: ignore


def _has_room(layer: object) -> bool:
    """A layer that has never held a key does not know their shape yet."""
    return isinstance(layer, WindowLayer) and layer.is_initialized


def _attention(attention: Any, x: Array, turns: tuple[Array, Array], layer: WindowLayer) -> Array:
    own, width = attention._modules, attention.head_dim
    q, k, v = (_through(own[name], x).reshape(-1, width) for name in ("q_proj", "k_proj", "v_proj"))
    keys, values = (kept.numpy()[0] for kept in layer.grow())  # [heads, tokens, width]
    _rotate(k, turns, keys[:, -1])
    values[:, -1] = v
    heads = np.empty((len(keys), len(q) // len(keys), width), np.float32)  # those that share keys together
    _rotate(q, turns, heads.reshape(q.shape))
    heads *= attention.scaling
    weights = heads @ keys.transpose(0, 2, 1)  # [heads, shared, tokens]
    weights -= weights.max(-1, keepdims=True)
    np.exp(weights, out=weights)
    mixed = weights @ values
    mixed /= weights.sum(-1, keepdims=True)
    return _through(own["o_proj"], mixed.reshape(-1))


def _rotate(x: Array, turns: tuple[Array, Array], out: Array) -> None:
    """Turn each head's halves by the angles of a position; [heads, width] all."""
    (cos, sin), half = turns, x.shape[-1] // 2
    np.multiply(x, cos, out=out)
    out[:, :half] -= x[:, half:] * sin[:half]
    out[:, half:] += x[:, :half] * sin[half:]


def _norm(norm: Any, x: Array) -> Array:
    return _of(norm._parameters["weight"]) * (x * (x.dot(x) / len(x) + norm.variance_epsilon) ** -0.5)


def _through(layer: nn.Module, x: Array) -> Array:
    own = layer.__dict__["_parameters"]
    y: Array = _of(own["weight"]).dot(x)
    if own["bias"] is not None:
        y += _of(own["bias"])
    return y


def _of(weight: Tensor) -> Array:
    return weight.numpy(force=True)  # force: also where it requires a gradient; a view all the same
