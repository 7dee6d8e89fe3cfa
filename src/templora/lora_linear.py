"""A linear layer with its LoRA side path as one differentiable operation.

Same values and gradients as PEFT's layer without dropout, in fewer and larger steps: the scaled side path is
added where the layer's own product stands, and nothing of the layer's width is kept for the backward pass
but its input.
"""

from typing import Any

import torch
from torch import Tensor, nn

from templora.kernels import FEWEST, is_fast, product


class LoraLinear(nn.Module):
    """Stands in for a frozen `nn.Linear`: y = x Wᵀ + bias + scale · (x Aᵀ) Bᵀ.

    a: [rank, in], b: [out, rank], in the layer's own dtype; the only parameters that get gradients.
    """

    def __init__(self, layer: nn.Linear, a: nn.Parameter, b: nn.Parameter, scale: float) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.a, self.b, self.scale = a, b, scale

    def forward(self, x: Tensor) -> Tensor:
        """[…, in] to […, out]."""
        if is_fast() and x.numel() >= FEWEST * x.shape[-1] and x.dtype == self.a.dtype == torch.float32:
            return _FastLoraLinear.apply(x, self.weight, self.bias, self.a, self.b, self.scale)  # pyright: ignore[reportReturnType]
        return _LoraLinear.apply(x, self.weight, self.bias, self.a, self.b, self.scale)  # pyright: ignore[reportReturnType]


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        inner = rows @ a.T  # [rows, rank]
        y = rows @ weight.T if bias is None else torch.addmm(bias, rows, weight.T)
        y.addmm_(inner, b.T, alpha=scale)
        ctx.save_for_backward(rows, inner, weight, a, b)
        ctx.scale = scale
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        rows, inner, weight, a, b = ctx.saved_tensors
        (slope,) = upstream
        rows_slope = slope.reshape(-1, slope.shape[-1])
        inner_slope = rows_slope @ b
        # beta 0: the first argument gives the shape alone.
        a_slope = torch.addmm(a, inner_slope.T, rows, beta=0, alpha=ctx.scale)
        b_slope = torch.addmm(b, rows_slope.T, inner, beta=0, alpha=ctx.scale)
        x_slope = None
        if ctx.needs_input_grad[0]:
            x_slope = (rows_slope @ weight).addmm_(inner_slope, a, alpha=ctx.scale)
            x_slope = x_slope.view(*slope.shape[:-1], -1)
        return x_slope, None, None, a_slope, b_slope, None


class _FastLoraLinear(torch.autograd.Function):
    """The same with the products of `kernels`, for many rows in fp32."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        inner = product(rows, a).mul_(scale)  # [rows, rank]
        y = product(inner, b, product(rows, weight))
        if bias is not None:
            y += bias
        ctx.save_for_backward(rows, inner, weight, a, b)
        ctx.scale = scale
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        rows, inner, weight, a, b = ctx.saved_tensors
        slope = upstream[0].reshape(-1, upstream[0].shape[-1])
        inner_slope = product(slope, b.T).mul_(ctx.scale)
        a_slope = product(inner_slope.T, rows.T)
        b_slope = product(inner.T, slope.T).T
        x_slope = None
        if ctx.needs_input_grad[0]:
            x_slope = product(inner_slope, a.T, product(slope, weight.T))
            x_slope = x_slope.view(*upstream[0].shape[:-1], -1)
        return x_slope, None, None, a_slope, b_slope, None
