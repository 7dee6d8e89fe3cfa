"""A linear layer with its LoRA side path as one differentiable operation.

Same values and gradients as PEFT's layer without dropout, in fewer and larger steps: the scaled side path is
added where the layer's own product stands, and nothing of the layer's width is kept for the backward pass
but its input; and not even that where the input is a gate's product, which is made again. Where the layer
multiplies by a bf16 copy, a long pass keeps what comes in as rounded as that. Beside a layer of
16 bits the side path is fp32's, as PEFT's is, but what comes in is kept as it came, once for all the layers
that get it: PEFT keeps a copy in fp32 for each.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from templora.kernels import FEWEST, as_base, is_fast, rounded, rows_through, used
from templora.lean_attention import FEWEST as LONG
from templora.products import product, times

Kept = tuple[Tensor, Tensor | None]


class LoraLinear(nn.Module):
    """Stands in for a frozen `nn.Linear`: y = x Wᵀ + bias + scale · (x Aᵀ) Bᵀ.

    a: [rank, in], b: [out, rank], in the layer's own dtype, or fp32 beside one of 16 bits. Nothing else gets
    gradients.
    """

    def __init__(self, layer: nn.Linear, a: nn.Parameter, b: nn.Parameter, scale: float) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.a, self.b, self.scale = a, b, scale

    def forward(self, x: Tensor) -> Tensor:
        """[…, in] to […, out]."""
        return self._run(x, None)

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        """The same of x = silu(gate) · up, each […, in]."""
        return self._run(gate, up)

    def _run(self, x: Tensor, up: Tensor | None) -> Tensor:
        # The modes of `kernels` are asked once, not by each of the steps below, which at a single token takes
        # as long as the steps.
        with torch._C.DisableTorchFunction():  # pyright: ignore[reportPrivateUsage]
            if x.dtype != self.a.dtype:
                layer = self.weight, self.bias, self.a, self.b, self.scale
                if not torch.is_grad_enabled():
                    return _mixed(_input(x, up), *layer)[0]
                return _MixedLoraLinear.apply(x, up, *layer)  # pyright: ignore[reportReturnType]
            plain = x.dtype == torch.float32
            many = x.numel() >= FEWEST * x.shape[-1]
            way = _FastLoraLinear if plain and many and is_fast() else _LoraLinear
            weight = used(self.weight) if plain else self.weight
            copied = weight.dtype != x.dtype and x.numel() >= LONG * x.shape[-1] and torch.is_grad_enabled()
            kept = _rounded(x, up, weight.dtype) if copied else (x, up)
            layer = weight, self.bias, self.a, self.b, self.scale
            return way.apply(x, up, kept, *layer)  # pyright: ignore[reportReturnType]


class LoraBeside(nn.Module):
    """The same for a frozen layer that computes in a way of its own, such as one of 4 bits.

    a, b: as above, fp32. What the layer gives is not kept, nor what comes in but as it came.
    """

    def __init__(self, layer: nn.Module, a: nn.Parameter, b: nn.Parameter, scale: float) -> None:
        super().__init__()
        self.layer, self.a, self.b, self.scale = layer, a, b, scale

    def forward(self, x: Tensor) -> Tensor:
        """[…, in] to […, out]."""
        return _Beside.apply(self.layer(x), x, self.a, self.b, self.scale)  # pyright: ignore[reportReturnType]


class _LoraLinear(torch.autograd.Function):
    """x is what comes in, or with `up` the gate before its silu; kept: both as the backward pass is to have
    them; layer: weight, bias, a, b and scale."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, up: Tensor | None, kept: Kept, *layer: Any) -> Tensor:
        weight, bias, a, b, scale = layer
        rows = _rows(x, up)
        inner = rows @ a.T  # [rows, rank]
        y = rows_through(rows, weight, bias, _at_hand(kept, weight))
        y.addmm_(inner, b.T, alpha=scale)
        ctx.save_for_backward(*kept, inner, weight, a, b)
        ctx.scale = scale
        return _shaped(y, x)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, up, inner, weight, a, b = _as_it_came(*ctx.saved_tensors)
        (slope,) = upstream
        rows_slope = slope.reshape(-1, slope.shape[-1])
        inner_slope = rows_slope @ b
        # beta 0: the first argument gives the shape alone.
        a_slope = torch.addmm(a, inner_slope.T, _rows(x, up), beta=0, alpha=ctx.scale)
        b_slope = torch.addmm(b, rows_slope.T, inner, beta=0, alpha=ctx.scale)
        x_slope = up_slope = None
        if ctx.needs_input_grad[0]:
            x_slope = times(rows_slope, weight.T).addmm_(inner_slope, a, alpha=ctx.scale)
            x_slope, up_slope = _through_gate(x_slope.view(x.shape), x, up)
        return x_slope, up_slope, None, None, None, a_slope, b_slope, None


class _FastLoraLinear(torch.autograd.Function):
    """The same with the products of `kernels`, for many rows in fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, up: Tensor | None, kept: Kept, *layer: Any) -> Tensor:
        weight, bias, a, b, scale = layer
        rows = _rows(x, up)
        inner = product(rows, a).mul_(scale)  # [rows, rank]
        y = product(inner, b, product(rows, weight, rounded=_at_hand(kept, weight)))
        if bias is not None:
            y += bias
        ctx.save_for_backward(*kept, inner, weight, a, b)
        ctx.scale = scale
        return _shaped(y, x)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, up, inner, weight, a, b = _as_it_came(*ctx.saved_tensors)
        slope = upstream[0].reshape(-1, upstream[0].shape[-1])
        inner_slope = product(slope, b.T).mul_(ctx.scale)
        a_slope = product(inner_slope.T, _rows(x, up).T)
        b_slope = product(inner.T, slope.T).T
        x_slope = up_slope = None
        if ctx.needs_input_grad[0]:
            x_slope = product(inner_slope, a.T, product(slope, weight.T))
            x_slope, up_slope = _through_gate(x_slope.view(x.shape), x, up)
        return x_slope, up_slope, None, None, None, a_slope, b_slope, None


class _MixedLoraLinear(torch.autograd.Function):
    """The same around a layer of 16 bits, the side path in fp32; what is summed is rounded once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, up: Tensor | None, *layer: Any) -> Tensor:
        weight, _, a, b, scale = layer
        y, inner = _mixed(_input(x, up), *layer)
        ctx.save_for_backward(x, up, inner, weight, a, b)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, up, inner, weight, a, b = ctx.saved_tensors
        slope = upstream[0].reshape(-1, upstream[0].shape[-1])
        exact = slope.to(b.dtype)
        inner_slope = exact @ b
        a_slope = torch.addmm(a, inner_slope.T, _rows(x, up).to(a.dtype), beta=0, alpha=ctx.scale)
        b_slope = torch.addmm(b, exact.T, inner, beta=0, alpha=ctx.scale)
        x_slope = up_slope = None
        if ctx.needs_input_grad[0]:
            own = (slope @ weight).to(a.dtype)
            x_slope = own.addmm_(inner_slope, a, alpha=ctx.scale).to(x.dtype)
            x_slope, up_slope = _through_gate(x_slope.view(x.shape), x, up)
        return x_slope, up_slope, None, None, a_slope, b_slope, None


class _Beside(torch.autograd.Function):
    """y + scale · (x Aᵀ) Bᵀ, rounded once."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        inner = x.reshape(-1, x.shape[-1]).to(a.dtype) @ a.T  # [rows, rank]
        ctx.save_for_backward(x, inner, a, b)
        ctx.scale = scale
        wide = torch.promote_types(y.dtype, b.dtype)
        rows = y.reshape(-1, y.shape[-1]).to(wide)
        return _shaped(rows.addmm(inner.to(wide), b.T.to(wide), alpha=scale).to(y.dtype), x)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, inner, a, b = ctx.saved_tensors
        (slope,) = upstream
        exact = slope.reshape(-1, slope.shape[-1]).to(b.dtype)
        inner_slope = (exact @ b).mul_(ctx.scale)
        a_slope = inner_slope.T @ x.reshape(-1, x.shape[-1]).to(a.dtype)
        b_slope = torch.addmm(b, exact.T, inner, beta=0, alpha=ctx.scale)
        x_slope = (inner_slope @ a).to(x.dtype).view(x.shape) if ctx.needs_input_grad[1] else None
        return slope, x_slope, a_slope, b_slope, None


def _mixed(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """What comes out of a layer of 16 bits with a side path of fp32, […, out], and that path's [rows, rank].

    An adapter that adds nothing leaves the base's bits.
    """
    inner = x.reshape(-1, x.shape[-1]).to(a.dtype) @ a.T
    y = as_base(x, weight, bias)
    rows = y.reshape(-1, y.shape[-1]).to(b.dtype)
    return _shaped(rows.addmm_(inner, b.T, alpha=scale).to(y.dtype), x), inner


def _shaped(y: Tensor, x: Tensor) -> Tensor:
    """[rows, out] as […, out], like x. No view: some models add to what a layer gives them, in place."""
    return y.resize_(*x.shape[:-1], y.shape[-1])


def _rounded(x: Tensor, up: Tensor | None, dtype: torch.dtype) -> Kept:
    return (rounded(x, dtype), None) if up is None else (x.to(dtype), up.to(dtype))


def _at_hand(kept: Kept, weight: Tensor) -> Tensor | None:
    """What comes in as it is multiplied by that weight, [rows, in], if that is what is kept."""
    x, up = kept
    return x.reshape(-1, x.shape[-1]) if up is None and x.dtype == weight.dtype else None


def _as_it_came(x: Tensor, up: Tensor | None, inner: Tensor, *layer: Tensor) -> tuple[Any, ...]:
    """What was kept, with x and up in fp32 again."""
    return x.to(inner.dtype), up if up is None else up.to(inner.dtype), inner, *layer


def _rows(x: Tensor, up: Tensor | None) -> Tensor:
    """What the layer's products are given, [rows, in]."""
    return _input(x, up).reshape(-1, x.shape[-1])


def _input(x: Tensor, up: Tensor | None) -> Tensor:
    return x if up is None else silu(x) * up


def _through_gate(slope: Tensor, gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The slopes of gate and up from that of their product, by the operations that torch takes."""
    if up is None:
        return slope, None
    return torch.ops.aten.silu_backward(slope * up, gate), slope * silu(gate)
