"""One token through a block of a Llama, compiled by numba when it is first run, and kept on disk.

Plain loops: a token's products read each weight once, so they take as long as the memory does, and what
stands between them takes next to nothing where no call of Python's or torch's is around it. The interpreter's
lock is free meanwhile, so another thread can learn. All arrays are fp32; a bias that is not there is empty.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit
from numba.core.caching import NullCache
from numpy.typing import NDArray

Array = NDArray[np.float32]
# Sums may be taken in any order, so in vectors; infinities and what is not a number stay what they are, and
# what is divided by zero becomes that.
OPTIONS: dict[str, Any] = {
    "nogil": True,
    "error_model": "numpy",
    "fastmath": {"reassoc", "contract", "nsz", "arcp"},
}


def _compiled(function: Callable[..., None]) -> Callable[..., None]:
    try:
        return njit(cache=True, **OPTIONS)(function)
    except RuntimeError:  # there is no folder to keep it in
        return njit(**OPTIONS)(function)


@_compiled
def norm(x: Array, weight: Array, epsilon: Any, y: Array) -> None:
    """RMSNorm; x, weight and y: [width]."""
    squares = np.float32(0)
    for i in range(len(x)):
        squares += x[i] * x[i]
    scale = np.float32(1) / np.float32(math.sqrt(squares / np.float32(len(x)) + epsilon))
    for i in range(len(x)):
        y[i] = weight[i] * (x[i] * scale)


@_compiled
def through(weight: Array, bias: Array, x: Array, y: Array) -> None:
    """y = weight x + bias. weight: [out, in]; four rows at a time, so that x is read for four."""
    whole = len(weight) // 4 * 4
    for i in range(0, whole, 4):
        first, second, third, fourth = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
        for j in range(len(x)):
            first += weight[i, j] * x[j]
            second += weight[i + 1, j] * x[j]
            third += weight[i + 2, j] * x[j]
            fourth += weight[i + 3, j] * x[j]
        y[i], y[i + 1], y[i + 2], y[i + 3] = first, second, third, fourth
    for i in range(whole, len(weight)):
        total = np.float32(0)
        for j in range(len(x)):
            total += weight[i, j] * x[j]
        y[i] = total
    for i in range(len(bias)):
        y[i] += bias[i]


@_compiled
def turn(x: Array, cos: Array, sin: Array, y: Array) -> None:
    """A head's halves by the angles of a position; all [head_dim]."""
    half = len(x) // 2
    for j in range(half):
        y[j] = x[j] * cos[j] - x[half + j] * sin[j]
        y[half + j] = x[half + j] * cos[half + j] + x[j] * sin[half + j]


@_compiled
def attend(query: Array, keys: Array, values: Array, weights: Array, y: Array) -> None:
    """What one head sees. query, y: [head_dim]; keys, values: [tokens, head_dim]; weights: [tokens], room."""
    through(keys, np.empty(0, np.float32), query, weights)
    highest = weights[0]
    for t in range(len(weights)):
        highest = max(highest, weights[t])
    total = np.float32(0)
    for t in range(len(weights)):
        weights[t] = math.exp(weights[t] - highest)
    for t in range(len(weights)):
        total += weights[t]
    for j in range(len(y)):
        y[j] = 0
    for t in range(len(weights)):
        for j in range(len(y)):
            y[j] += weights[t] * values[t, j]
    for j in range(len(y)):
        y[j] /= total


@_compiled
def attention(x: Array, layers: Any, angles: Any, kept: Any, seen: Any, scale: Any, y: Array) -> None:
    """Self-attention of the newest token, whose key and value are put into the last place that it sees.

    x, y: [width]. layers: weight and bias of q, k, v, o. angles: cosines and sines, [head_dim] each.
    kept: keys and values, [heads, capacity, head_dim] each. seen: the places [first, stop) of these.
    """
    (q, q_bias), (k, k_bias), (v, v_bias), (o, o_bias) = layers
    cos, sin = angles
    (keys, values), (first, stop) = kept, seen
    shared, _, width = keys.shape
    query, key = np.empty(len(q), np.float32), np.empty(len(k), np.float32)
    value = np.empty(len(v), np.float32)
    through(q, q_bias, x, query)
    through(k, k_bias, x, key)
    through(v, v_bias, x, value)
    for i in range(shared):
        turn(key[i * width : (i + 1) * width], cos, sin, keys[i, stop - 1])
        for j in range(width):
            values[i, stop - 1, j] = value[i * width + j]
    heads, mixed = len(query) // width, np.empty_like(query)
    turned, weights = np.empty(width, np.float32), np.empty(stop - first, np.float32)
    for i in range(heads):
        turn(query[i * width : (i + 1) * width], cos, sin, turned)
        for j in range(width):
            turned[j] *= scale
        own_keys, own_values = keys[i * shared // heads, first:stop], values[i * shared // heads, first:stop]
        attend(turned, own_keys, own_values, weights, mixed[i * width : (i + 1) * width])
    through(o, o_bias, mixed, y)


@_compiled
def mlp(x: Array, layers: Any, y: Array) -> None:
    """silu(gate x) · up x, through down. x, y: [width]. layers: weight and bias of gate, up, down."""
    (gate, gate_bias), (up, up_bias), (down, down_bias) = layers
    inner, other = np.empty(len(gate), np.float32), np.empty(len(up), np.float32)
    through(gate, gate_bias, x, inner)
    through(up, up_bias, x, other)
    for i in range(len(inner)):  # exp overflows where a gate is shut: 1 / (1 + inf) is 0
        inner[i] /= np.float32(1) + np.float32(math.exp(-inner[i]))
    for i in range(len(inner)):  # by itself: in another order it would be 0 · inf
        inner[i] *= other[i]
    through(down, down_bias, inner, y)


@_compiled
def block(
    x: Array,
    norms: Any,
    epsilons: Any,
    seeing: Any,
    thinking: Any,
    angles: Any,
    kept: Any,
    seen: Any,
    scale: Any,
) -> None:
    """One block, in place. x: [width].

    norms, epsilons: of both parts. seeing, thinking: the layers of `attention` and `mlp`. All else: as there.
    """
    h, y = np.empty_like(x), np.empty_like(x)
    norm(x, norms[0], epsilons[0], h)
    attention(h, seeing, angles, kept, seen, scale, y)
    for i in range(len(x)):
        x[i] += y[i]
    norm(x, norms[1], epsilons[1], h)
    mlp(h, thinking, y)
    for i in range(len(x)):
        x[i] += y[i]


@_compiled
def head(x: Array, weight: Array, epsilon: Any, layer: Any, y: Array) -> None:
    """The last norm and the output layer. x: [width]; layer: weight and bias; y: [vocab]."""
    h = np.empty_like(x)
    norm(x, weight, epsilon, h)
    through(layer[0], layer[1], h, y)


def ready() -> None:
    """Compile `block` and `head`, or load what was kept of them, by a token through two numbers."""
    try:
        _run()
    except Exception:  # what was kept is damaged, or the disk is full
        for function in (norm, through, turn, attend, attention, mlp, block, head):
            function._cache = NullCache()  # pyright: ignore[reportFunctionMemberAccess]
        _run()


def _run() -> None:
    x, weight, none, one = np.ones(2, np.float32), np.ones((2, 2), np.float32), np.empty(0, np.float32), 1
    layer, kept, scale = (weight, none), np.ones((1, 1, 2), np.float32), np.float32(one)
    block(x, (x, x), (scale, scale), (layer,) * 4, (layer,) * 3, (x, x), (kept, kept), (0, one), scale)
    head(x, x, scale, layer, x.copy())
