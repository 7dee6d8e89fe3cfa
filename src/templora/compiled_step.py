"""One token through a Llama, compiled: what `step` computes, up to rounding, in half of the time and more.

A token's products read each weight once, so they take as long as the memory does; torch's (MKL's) fall short
of that, and what torch and Python do around them takes a small model as long again. It runs what stands in
the model's places now, as `step` does, and leaves to `step` what it cannot run.
"""

import platform
import warnings
from collections.abc import Iterator
from functools import cache as once
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from templora.cache import WindowCache
from templora.cache_layers import WindowLayer
from templora.step import Step
from templora.step import step_of as exact_step_of

MOST_THREADS = 4  # it has one; torch, with more than so many, reads a larger model's weights faster
SMALL = 1 << 24  # numbers of a model for which one thread is enough, however many there are
SEEING = ("q_proj", "k_proj", "v_proj", "o_proj")
THINKING = ("gate_proj", "up_proj", "down_proj")
Array = NDArray[np.float32]


class CompiledStep:
    """Makes the logits after one token, as the `Step` it is given. Make it with `step_of`."""

    def __init__(self, step: Step) -> None:
        self.exact, self._model = step, step.model
        # What its loops, which do not look where they read, may expect of the layers' weights.
        self._shapes: list[tuple[int, ...]] = [_weight(layer).shape for layer in _layers(step.model)]
        self._turns: tuple[Array, Array] | None = None  # cosines and sines, [positions, head_dim]
        self._none = np.empty(0, np.float32)

    def __call__(self, token: int, position: int, cache: WindowCache) -> Tensor:
        """Run it on top of `cache`, which grows; [vocab]."""
        model = self._model
        arrays = all(map(_is_array, _layers(model), self._shapes))
        runs = arrays and all(map(_has_room, cache.layers))
        compiled = _compiled() if runs else None
        if compiled is None:
            return self.exact(token, position, cache)
        x: Array = _of(model.model.embed_tokens.weight)[token].copy()  # [width]
        angles = self._angles(position)
        for block, layer in zip(self.exact.blocks, cache.layers, strict=True):
            assert isinstance(layer, WindowLayer) and layer.keys is not None and layer.values is not None
            layer.grow()
            norms = block.input_layernorm, block.post_attention_layernorm
            compiled.block(
                x,
                tuple(_of(norm.weight) for norm in norms),
                tuple(np.float32(norm.variance_epsilon) for norm in norms),
                self._arrays(block.self_attn, SEEING),
                self._arrays(block.mlp, THINKING),
                angles,
                (layer.keys.numpy()[0], layer.values.numpy()[0]),
                (layer.first, layer.stop),
                np.float32(block.self_attn.scaling),
            )
        last, (head,) = model.model.norm, self._arrays(model, ("lm_head",))
        logits = np.empty(len(head[0]), np.float32)
        compiled.head(x, _of(last.weight), np.float32(last.variance_epsilon), head, logits)
        return torch.from_numpy(logits)

    def _angles(self, position: int) -> tuple[Array, Array]:
        if self._turns is None or position >= len(self._turns[0]):
            cos, sin = self.exact.turns(position)
            self._turns = cos[:, 0].numpy(), sin[:, 0].numpy()
        return self._turns[0][position], self._turns[1][position]

    def _arrays(self, module: nn.Module, names: tuple[str, ...]) -> tuple[tuple[Array, Array], ...]:
        """Weight and bias of each of its layers."""
        layers = (module.__dict__["_modules"][name].__dict__["_parameters"] for name in names)
        return tuple(
            (_of(own["weight"]), self._none if own["bias"] is None else _of(own["bias"])) for own in layers
        )


@torch.no_grad()
def step_of(model: PreTrainedModel) -> "CompiledStep | Step | None":
    """The fastest short cut for this model on this machine; None where there is none."""
    exact = exact_step_of(model)
    if exact is None or not pays(model):
        return exact
    usual = all(weight.dtype == torch.float32 and weight.is_contiguous() for weight in model.parameters())
    return CompiledStep(exact) if usual and all(_is_array(layer) for layer in _layers(model)) else exact


def pays(model: nn.Module) -> bool:
    """Whether it is the faster one: decided by the machine and its threads, never by a clock."""
    few = torch.get_num_threads() <= MOST_THREADS
    return measured() and (few or sum(weight.numel() for weight in model.parameters()) <= SMALL)


def measured() -> bool:
    """Whether the processor is of the kind that it was measured on."""
    return platform.machine() in ("x86_64", "AMD64")


@once
def _compiled() -> Any:
    """The compiled functions; None where numba does not run. Made late: the first time takes seconds."""
    try:
        import numba

        from templora import compiled

        if getattr(numba.config, "DISABLE_JIT", 0):
            return None
        compiled.ready()
    except Exception as error:  # not there, not made for the numpy that is, …
        if not isinstance(error, ModuleNotFoundError):
            warnings.warn(f"numba does not run here, so writing is slower: {error}", stacklevel=1)
        return None
    return compiled


def _layers(model: Any) -> Iterator[nn.Module]:
    """What stands in the places of its linear layers."""
    for block in model.model.layers:
        for part, names in ((block.self_attn, SEEING), (block.mlp, THINKING)):
            yield from (part._modules[name] for name in names)
    yield model._modules["lm_head"]


def _is_array(layer: nn.Module, shape: tuple[int, ...] | None = None) -> bool:
    """Whether the loops can run it. shape: its weight's, where that is known."""
    if type(layer) is not nn.Linear:
        return False
    weight, bias = _weight(layer), layer.__dict__["_parameters"]["bias"]
    return (
        weight.dtype == torch.float32
        and weight.is_contiguous()
        and shape in (None, weight.shape)
        and (bias is None or (bias.dtype == torch.float32 and bias.shape == weight.shape[:1]))
    )


def _weight(layer: nn.Module) -> Tensor:
    return layer.__dict__["_parameters"]["weight"]


def _has_room(layer: object) -> bool:
    """A layer that has never held a key does not know their shape yet."""
    return isinstance(layer, WindowLayer) and layer.is_initialized


def _of(weight: Tensor) -> Array:
    return weight.numpy(force=True)  # force: also where it requires a gradient; a view all the same
