"""The products x weightᵀ that `kernels` puts in the place of torch's own."""

import torch
from torch import Tensor

from templora.half import as_vector


def times(x: Tensor, weight: Tensor, bias: Tensor | None = None, rounded: Tensor | None = None) -> Tensor:
    """x weightᵀ + bias in x's dtype.

    x: [rows, in]; weight: [out, in], in x's dtype or a bf16 copy. rounded: x as that copy is, if at hand.
    """
    if weight.dtype != x.dtype:
        rounded = x.to(weight.dtype) if rounded is None else rounded
        one = len(x) == 1 and as_vector()
        product = torch.mv(weight, rounded[0]).unsqueeze(0) if one else rounded @ weight.T
        y = product.to(x.dtype)
        return y if bias is None else y.add_(bias)
    return x @ weight.T if bias is None else torch.addmm(bias, x, weight.T)


def product(x: Tensor, weight: Tensor, added: Tensor | None = None, rounded: Tensor | None = None) -> Tensor:
    """x weightᵀ + added, fp32.

    x: [rows, in]; weight: [out, in], fp32 or a bf16 copy; both in any layout. added: [rows, out]. rounded: as
    for `times`.
    """
    if weight.dtype != x.dtype:
        y = times(x, weight, rounded=rounded)
        return y if added is None else y.add_(added)
    x = x.contiguous()
    if not weight.T.is_contiguous():  # one of the two it must be: elsewhere oneDNN is a hundred times slower
        weight = weight.contiguous()
    if added is None:
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return torch.ops.mkldnn._linear_pointwise.binary(x, added, weight, None, "add")
