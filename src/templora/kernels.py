"""Faster products and attention for passes over many tokens on the CPU; the same values up to rounding.

torch's fp32 products are MKL's, which leaves half of an AMD core's vector unit idle; oneDNN, inside torch as
well, uses all of it. And torch's attention gives the keys of a cache gradients that nobody asks for. Those
with frozen weights may be bf16's, see `half`. `fast()` puts others in their place while a pass runs, by what
torch calls a function mode: no model, no module and no other thread is touched. It knows nothing of adapters.
A base of bf16 has one of its own, on Intel: see `half.as_vector`.
"""

import threading
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from templora.causal_attention import CausalAttention, firsts_of
from templora.half import Halves, as_vector, intel
from templora.products import product, times
from templora.repeated import Repeats, shared

FEWEST = 16  # rows
LARGE = 1 << 20  # numbers of a layer's weight, in the mean, for which fewer rows pay as well

_here = threading.local()  # a function mode is its thread's own, and so is what is said of it


@cache
def pays() -> bool:
    """Whether this machine's MKL holds back: decided by what it is, never by a clock, so that runs repeat."""
    measured = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return measured and not intel() and torch.backends.mkldnn.is_available()


def pays_for_few(model: nn.Module) -> bool:
    """Whether its layers are so large that also a pass over a few tokens gains.

    There the product of one row is faster, too, and uses all threads where MKL's has one; but a function mode
    takes a fifth of a millisecond a block.
    """
    layers = [module.weight for module in model.modules() if type(module) is nn.Linear]
    sizes = [weight.numel() for weight in layers if weight.dtype == torch.float32]
    return sum(sizes) >= LARGE * max(1, len(sizes))


def fast(
    rows: int,
    device: torch.device,
    dtype: torch.dtype,
    *,
    halves: Halves | None = None,
    few: bool = False,
    repeats: bool = True,
) -> AbstractContextManager[object]:
    """For one pass over that many tokens; does nothing where it would not pay.

    dtype: of the base. halves: products with these weights are bf16's; over few tokens only where these are a
    large base's. few: whether fp32's pay there as well. repeats: as for `Fast`.
    """
    many = rows >= FEWEST
    copies = halves if halves and (many or halves.large) else None
    wide = pays() and (many or few)
    one = rows == 1 and dtype == torch.bfloat16 and as_vector()
    pays_here = device.type == "cpu" and (wide or copies or one)
    return Fast(copies, wide=wide, repeats=repeats) if pays_here else nullcontext()


def is_fast() -> bool:
    """Whether the pass that runs now takes fp32's products from oneDNN."""
    return any(mode.wide for mode in _entered())


def used(weight: Tensor) -> Tensor:
    """What the pass that runs now multiplies by in that weight's place: itself, or its copy in bf16."""
    for mode in _entered():
        if mode.halves is not None:
            return mode.halves.of(weight)
    return weight


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in that dtype, made once for all the layers in a row that are given it in the pass that runs now."""
    entered = _entered()
    return entered[-1].rounded(x, dtype) if entered else x.to(dtype)


def rows_through(rows: Tensor, weight: Tensor, bias: Tensor | None, rounded: Tensor | None = None) -> Tensor:
    """rows weightᵀ + bias in fp32, [rows, out].

    weight: [out, in], or what is `used` in its place. rounded: as for `times`.
    """
    if not rows.dtype == weight.dtype == torch.float32 or not is_fast():
        return times(rows, weight, bias, rounded)
    y = product(rows, weight)
    return y if bias is None else y.add_(bias)


def as_base(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x weightᵀ + bias, to the bit as a frozen layer of the base gives it in the pass that runs now."""
    y = _linear(x, weight, bias) if _entered() else None
    return functional.linear(x, weight, bias) if y is None else y


class Fast(TorchFunctionMode):
    """While it is entered, linear layers, and causal attention in fp32, take the ways below.

    halves: as for `fast`. wide: fp32's own products are oneDNN's, and attention is the one below.
    repeats: whether `Repeated` may stand for what the model repeats.
    """

    def __init__(self, halves: Halves | None = None, *, wide: bool = True, repeats: bool = True) -> None:
        super().__init__()
        self.halves, self.wide = halves, wide
        # The mask that was looked at last, and from which key on each text sees all up to its own place.
        self._seen: tuple[Tensor, tuple[int, ...] | None] | None = None
        # What was rounded last: kept, so that nothing else comes to lie where it lies.
        self._rounded: tuple[Tensor, int, Tensor] | None = None
        self._repeats = Repeats() if repeats else None

    def __enter__(self) -> "Fast":
        _entered().append(self)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        _entered().pop()
        super().__exit__(*error)
        self._seen = self._rounded = None

    def rounded(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """See the function of that name."""
        if self._rounded is not None:
            last, version, copy = self._rounded
            if last.is_set_to(x) and version == x._version and copy.dtype == dtype:
                return copy
        copy = x.detach().to(dtype)
        self._rounded = x.detach(), x._version, copy
        return copy

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor | None:
        """None where it is not plain causal attention in fp32."""
        key, value, is_shared = shared(query, key, value)
        texts, queries, keys = query.shape[0], query.shape[-2], key.shape[-2]
        plain = (
            query.ndim == key.ndim == 4
            and key.shape == value.shape
            and texts == key.shape[0]
            and query.shape[1] % key.shape[1] == 0
            and (enable_gqa or is_shared or query.shape[1] == key.shape[1])
            and {query.dtype, key.dtype, value.dtype} == {torch.float32}
            and dropout_p == 0
            and queries >= FEWEST
        )
        if not plain:
            return None
        firsts = self._firsts(attn_mask, texts, queries, keys)
        if firsts is None and is_causal and queries == keys:
            firsts = (0,) * texts
        if firsts is None:
            return None
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        return CausalAttention.apply(query, key, value, scale, firsts)  # pyright: ignore[reportReturnType]

    def _firsts(self, mask: Tensor | None, texts: int, queries: int, keys: int) -> tuple[int, ...] | None:
        """As `firsts_of`, for each of the texts."""
        if mask is None or mask.dtype != torch.bool or mask.shape[1:] != (1, queries, keys):
            return None
        if self._seen is None or self._seen[0] is not mask:
            self._seen = mask, firsts_of(mask.squeeze(1))
        firsts = self._seen[1]
        return firsts * texts if firsts is not None and len(firsts) == 1 else firsts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, result = kwargs or {}, None
        if func is functional.linear:
            result = _linear(*args, **kwargs)
        elif self.wide and func is functional.scaled_dot_product_attention:
            result = self._attention(*args, **kwargs)
        elif self.wide and self._repeats:
            result = self._repeats.watched(func, args, kwargs)
        return func(*args, **kwargs) if result is None else result


def _entered() -> "list[Fast]":
    """The modes of this thread."""
    if not hasattr(_here, "entered"):
        _here.entered = []
    return _here.entered


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """None where the weight learns, or anything else is not as usual."""
    frozen = not weight.requires_grad and (bias is None or not bias.requires_grad)
    if x.dtype == weight.dtype == torch.bfloat16 and frozen and x.numel() == x.shape[-1] and as_vector():
        row = torch.mv(weight, x.reshape(-1)).view(*x.shape[:-1], -1)
        return row if bias is None else row + bias
    plain = x.dtype == weight.dtype == torch.float32 and x.ndim >= 2 and weight.ndim == 2
    if not frozen or not plain or not x.numel():  # an expert may get no token at all
        return None
    chosen, rows = used(weight), x.reshape(-1, x.shape[-1])
    if chosen is weight and not is_fast():
        return None
    through: Any = _Linear.apply if torch.is_grad_enabled() else product
    y: Tensor = through(rows, chosen).view(*x.shape[:-1], -1)
    return y if bias is None else y + bias


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return product(x, weight)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return product(upstream[0], weight.T), None
