"""The adapters of several texts on one base, side by side in one tensor.

Each text's `Adapter` keeps working as it does alone: its weights and gradient are a row here. What this adds
is one pass for all of them: a layer's own product runs once over the tokens of all texts, and the side paths
are one batched product. It knows nothing of texts but how many there are.
"""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from templora.adapter import Adapter
from templora.errors import UnsupportedModel
from templora.injection import standing_in
from templora.kernels import FEWEST, is_fast, rows_through, used
from templora.probe import is_watched
from templora.products import product, times


@dataclass(slots=True)
class Shape:
    """Of the pass that is running."""

    texts: int = 0
    tokens: int = 0


class Stack:
    """Room for the adapters of `size` texts; they lie in rows 0 to `texts`, without a hole.

    like: one of them, which says what layers and sizes there are.
    """

    def __init__(self, like: Adapter, size: int) -> None:
        self.adapters: list[Adapter] = []
        # Sites of its own: those of an adapter go when it is discarded.
        self._sites, self._turn = [replace(site) for site in like.sites], like.turn
        self.weights = like.flat.new_zeros((size, like.parameters))
        self.gradient = torch.zeros_like(self.weights)
        self._layers: dict[tuple[int, tuple[bool, ...]], list[nn.Module]] = {}
        self._shape = Shape()

    @property
    def texts(self) -> int:
        """How many there are now."""
        return len(self.adapters)

    def join(self, adapter: Adapter) -> None:
        """Take an adapter in, in the next row."""
        row = self.texts
        adapter.move(self.weights[row], self.gradient[row])
        self.adapters.append(adapter)

    def leave(self, row: int) -> None:
        """Give an adapter tensors of its own again; the last row moves to where it was."""
        gone = self.adapters[row]
        gone.move(gone.flat.clone(), torch.zeros_like(gone.gradient))
        last = self.adapters.pop()
        if last is not gone:
            last.move(self.weights[row], self.gradient[row])
            self.adapters[row] = last

    @contextmanager
    def attached(self, tokens: int) -> Generator[None]:
        """The model computes [texts, tokens] with each text's adapter, differentiably."""
        self._shape.texts, self._shape.tokens = self.texts, tokens
        with self._turn, standing_in(self._sites, self._modules()):
            yield

    def _modules(self) -> list[nn.Module]:
        """The layers for as many texts as there are."""
        # Those that someone watches must be called.
        calls = tuple(is_watched(site.original) for site in self._sites)
        key = (self.texts, calls)
        if key not in self._layers:
            self._layers[key] = [*self._make(self.texts, calls)]
        return self._layers[key]

    def _make(self, texts: int, calls: Sequence[bool]) -> Generator[nn.Module]:
        sizes = [site.a.numel() for site in self._sites] + [site.b.numel() for site in self._sites]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        for i, site in enumerate(self._sites):
            a = self._side(texts, starts[i], site.a.shape)
            b = self._side(texts, starts[len(self._sites) + i], site.b.shape)
            layer = StackedLinear if calls[i] else _kind(site.original)
            yield layer(site.original, a, b, site.scale, self._shape)

    def _side(self, texts: int, start: int, shape: torch.Size) -> nn.Parameter:
        """One matrix of every text, [texts, *shape], with its gradient: views."""
        columns = slice(start, start + shape.numel())
        # data: what a text does to its row between two passes is no business of autograd's.
        side = nn.Parameter(self.weights.data[:texts, columns].view(texts, *shape))
        side.grad = self.gradient[:texts, columns].view(texts, *shape)
        return side


class StackedLinear(nn.Module):
    """Stands in for any linear layer: y = layer(x) + scale · (x Aᵀ) Bᵀ, with each text's own A and B.

    a: [texts, rank, in], b: [texts, out, rank]; their `grad` must be there.
    """

    def __init__(
        self, layer: nn.Module, a: nn.Parameter, b: nn.Parameter, scale: float, shape: Shape
    ) -> None:
        super().__init__()
        self.layer, self.a, self.b, self.scale, self.shape = layer, a, b, scale, shape

    def forward(self, x: Tensor) -> Tensor:
        """[…, in] to […, out], where … is [texts, tokens] or both of the whole pass in one."""
        y: Tensor = self.layer(x)
        side: Any = _Side.apply(self._by_text(x).to(self.a.dtype), self.a, self.b, self.scale)
        return y + side.to(y.dtype).view(y.shape)

    def _by_text(self, x: Tensor) -> Tensor:
        """[texts, tokens, in]; refused where a layer does not get every token once, in order."""
        texts, tokens = self.shape.texts, self.shape.tokens
        if x.shape[:-1] != (texts * tokens,) and (x.dim() != 3 or x.shape[0] != texts):
            raise UnsupportedModel(
                f"a layer of this model sees {tuple(x.shape[:-1])} tokens, not {texts} texts of {tokens}; "
                "its texts must run one at a time: use batch 1"
            )
        return x.reshape(texts, -1, x.shape[-1])


class StackedFloatLinear(StackedLinear):
    """The same around a frozen fp32 `nn.Linear`, as one operation; see `lora_linear`."""

    layer: nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        """[…, in] to […, out], where … is [texts, tokens] or both of the whole pass in one."""
        rows, layer = self._by_text(x), self.layer
        way = _FastStacked if is_fast() and rows.shape[1] >= FEWEST else _Stacked
        y: Any = way.apply(rows, used(layer.weight), layer.bias, self.a, self.b, self.scale)
        return y.view(*x.shape[:-1], -1)


class _Stacked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        inner = torch.bmm(x, a.transpose(1, 2))  # [texts, tokens, rank]
        rows = x.reshape(-1, x.shape[-1])
        y = rows_through(rows, weight, bias)
        y.resize_(*x.shape[:-1], y.shape[-1])  # no view, see `lora_linear`
        y.baddbmm_(inner, b.transpose(1, 2), alpha=scale)
        ctx.save_for_backward(x, inner, weight, a, b)
        ctx.scale, ctx.gradients = scale, (a.grad, b.grad)
        return y

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, inner, weight, a, b = ctx.saved_tensors
        slope = upstream[0].contiguous()  # [texts, tokens, out]
        inner_slope = _add_gradients(ctx, slope, x, inner, b)
        x_slope = None
        if ctx.needs_input_grad[0]:
            x_slope = times(slope.view(-1, slope.shape[-1]), weight.T).view(x.shape)
            x_slope.baddbmm_(inner_slope, a, alpha=ctx.scale)
        return x_slope, None, None, None, None, None


class _FastStacked(torch.autograd.Function):
    """The same with the products of `kernels`, for many tokens of each text: side paths one by one."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        inner = torch.stack([product(own, down) for own, down in zip(x, a, strict=True)]).mul_(scale)
        y = product(x.reshape(-1, x.shape[-1]), weight)
        y.resize_(*x.shape[:-1], y.shape[-1])  # [texts, tokens, out]
        for own, up, out in zip(inner, b, y, strict=True):
            out.copy_(product(own, up, out))
        if bias is not None:
            y += bias
        ctx.save_for_backward(x, inner, weight, a, b)
        ctx.scale, ctx.gradients = scale, (a.grad, b.grad)
        return y

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, inner, weight, a, b = ctx.saved_tensors
        slope = upstream[0].contiguous()  # [texts, tokens, out]
        x_slope = None
        if ctx.needs_input_grad[0]:
            x_slope = product(slope.view(-1, slope.shape[-1]), weight.T).view(x.shape)
        a_gradient, b_gradient = ctx.gradients
        for text in range(len(x)):
            inner_slope = product(slope[text], b[text].T).mul_(ctx.scale)
            a_gradient[text] += product(inner_slope.T, x[text].T)
            b_gradient[text] += product(inner[text].T, slope[text].T).T
            if x_slope is not None:
                x_slope[text] = product(inner_slope, a[text].T, x_slope[text])
        return x_slope, None, None, None, None, None


class _Side(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        inner = torch.bmm(x, a.transpose(1, 2))  # [texts, tokens, rank]
        ctx.save_for_backward(x, inner, a, b)
        ctx.scale, ctx.gradients = scale, (a.grad, b.grad)
        return torch.bmm(inner, b.transpose(1, 2)).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, inner, a, b = ctx.saved_tensors
        inner_slope = _add_gradients(ctx, upstream[0], x, inner, b)
        x_slope = torch.bmm(inner_slope, a).mul_(ctx.scale) if ctx.needs_input_grad[0] else None
        return x_slope, None, None, None


def _add_gradients(ctx: Any, slope: Tensor, x: Tensor, inner: Tensor, b: Tensor) -> Tensor:
    """Add A's and B's gradients to where they belong; returns that of `inner` before scaling.

    Not left to autograd: these are the largest tensors of a pass, and it would make each of them twice.
    """
    inner_slope = torch.bmm(slope, b)
    a_gradient, b_gradient = ctx.gradients
    a_gradient.baddbmm_(inner_slope.transpose(1, 2), x, alpha=ctx.scale)
    b_gradient.baddbmm_(slope.transpose(1, 2), inner, alpha=ctx.scale)
    return inner_slope


def _kind(layer: nn.Module) -> type[StackedLinear]:
    exact = type(layer) is nn.Linear and layer.weight.dtype == torch.float32
    return StackedFloatLinear if exact else StackedLinear
