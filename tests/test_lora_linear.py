"""The fused layer against PEFT's, and its gradients against finite differences."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from templora.lora_linear import LoraBeside, LoraLinear


def layers(bias: bool, dtype: torch.dtype) -> tuple[LoraLinear, Linear]:
    torch.manual_seed(0)
    frozen = nn.Linear(6, 5, bias=bias, dtype=dtype).requires_grad_(False)
    config = LoraConfig(r=3, lora_alpha=2)
    theirs = Linear(frozen, "a", config=config, r=3, lora_alpha=2).to(dtype)
    nn.init.normal_(theirs.lora_B["a"].weight)
    a, b = (nn.Parameter(part["a"].weight.detach().clone()) for part in (theirs.lora_A, theirs.lora_B))
    return LoraLinear(frozen, a, b, theirs.scaling["a"]), theirs


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(6,), (4, 6), (2, 3, 6)])
def test_values_and_gradients_are_those_of_peft(bias: bool, shape: tuple[int, ...]) -> None:
    ours, theirs = layers(bias, torch.float32)
    x = torch.randn(shape)
    slopes: list[list[Tensor]] = []
    values: list[Tensor] = []
    for layer, a, b in (
        (ours, ours.a, ours.b),
        (theirs, theirs.lora_A["a"].weight, theirs.lora_B["a"].weight),
    ):
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        values.append(y.detach())
        slopes.append(list(torch.autograd.grad(y.sin().sum(), (leaf, a, b))))
    assert torch.allclose(*values, atol=1e-6)
    for mine, other in zip(*slopes, strict=True):
        assert torch.allclose(mine, other, atol=1e-6)
    frozen = [p for p in ours.parameters() if not p.requires_grad]
    assert len(frozen) == 1 + bias
    assert all(p.grad is None for p in frozen)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(6,), (1, 1, 6), (2, 20, 6)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_beside_a_layer_of_16_bits_the_side_path_is_fp32(
    bias: bool, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    ours, theirs = layers(bias, torch.float32)
    for weight in theirs.base_layer.parameters():  # and ours, which are the same
        weight.data = weight.data.to(dtype)
    x = torch.randn(shape).to(dtype)
    slopes: list[list[Tensor]] = []
    values: list[Tensor] = []
    for layer, a, b in (
        (ours, ours.a, ours.b),
        (theirs, theirs.lora_A["a"].weight, theirs.lora_B["a"].weight),
    ):
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        assert y.dtype == dtype
        with torch.no_grad():
            assert torch.equal(layer(x), y)  # what is written is what is learned
        values.append(y.detach())
        slopes.append(list(torch.autograd.grad(y.float().sin().sum(), (leaf, a, b))))
    rounding = 2 * torch.finfo(dtype).eps
    assert torch.allclose(*values, rtol=rounding, atol=rounding)
    for mine, other in zip(*slopes, strict=True):
        assert mine.dtype == other.dtype
        assert torch.allclose(mine, other, rtol=4 * rounding, atol=4 * rounding)


def test_beside_a_layer_of_16_bits_what_comes_in_is_kept_once() -> None:
    ours, _ = layers(True, torch.float32)
    for name in ("weight", "bias"):
        getattr(ours, name).data = getattr(ours, name).data.bfloat16()
    x = torch.randn(4, 6).bfloat16().requires_grad_()
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        ours(x)
    known = {t.data_ptr() for t in (x, ours.weight, ours.a, ours.b)}
    assert [t.shape for t in kept if t.data_ptr() not in known] == [(4, 3)]  # the side path's narrow part


def four_bits(dtype: torch.dtype) -> nn.Module:
    """A layer of 4 bits that computes in that type."""
    bitsandbytes: Any = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    layer = bitsandbytes.nn.Linear4bit(64, 128, bias=True, compute_dtype=dtype, quant_type="nf4")
    return layer.to("cpu").to(dtype).requires_grad_(False)


def transposed(dtype: torch.dtype) -> nn.Module:
    """GPT-2's kind of layer."""
    torch.manual_seed(0)
    return Conv1D(128, 64).to(dtype).requires_grad_(False)


@pytest.mark.parametrize("make", [four_bits, transposed])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 64), (2, 20, 64)])
def test_beside_a_layer_of_another_kind_it_is_pefts_with_less_kept(
    make: Callable[[torch.dtype], nn.Module], dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    holder: Any = nn.ModuleDict({"layer": make(dtype)})
    holder.is_loaded_in_4bit = make is four_bits
    turned = make is transposed
    get_peft_model(holder, LoraConfig(r=8, lora_alpha=4, target_modules=["layer"], fan_in_fan_out=turned))
    theirs = holder["layer"]
    a, b = (part["default"].weight for part in (theirs.lora_A, theirs.lora_B))
    a.data, b.data = a.data.float(), torch.randn_like(b, dtype=torch.float)
    ours = LoraBeside(theirs.base_layer, a, b, theirs.scaling["default"])
    x = torch.randn(shape).to(dtype)
    found, kept = list[list[Tensor]](), list[int]()
    for layer in (ours, theirs):
        leaf, sizes = x.clone().requires_grad_(), dict[int, int]()

        def keep(tensor: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y = layer(leaf)
        assert y.dtype == dtype
        kept.append(sum(sizes.values()))
        found.append([y.detach(), *torch.autograd.grad(y.float().sin().sum(), (leaf, a, b))])
    rounding = 8 * torch.finfo(dtype).eps
    for mine, other in zip(*found, strict=True):
        assert mine.dtype == other.dtype
        torch.testing.assert_close(mine, other, rtol=rounding, atol=rounding * float(other.abs().max()))
    assert kept[0] <= kept[1]
    if dtype != torch.float32 and shape[1] > 1:
        assert kept[1] - kept[0] >= x.nbytes  # PEFT's copy of what comes in


def test_gradients_hold_against_finite_differences() -> None:
    ours, _ = layers(True, torch.float64)
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)

    def computed(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return torch.func.functional_call(ours, {"a": a, "b": b}, (x,))

    assert torch.autograd.gradcheck(computed, (x, ours.a, ours.b))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("beside", [True, False])
def test_a_model_may_add_to_what_comes_out_in_place(dtype: torch.dtype, beside: bool) -> None:
    ours, theirs = layers(False, torch.float32)
    theirs.base_layer.weight.data = theirs.base_layer.weight.data.to(dtype)
    if beside:
        ours = LoraBeside(theirs.base_layer, ours.a, ours.b, ours.scale)
    x = torch.randn(1, 4, 6).to(dtype)
    y = ours(x)
    y += 1
    y.float().sum().backward()
    torch.testing.assert_close(y, ours(x) + 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_an_adapter_that_adds_nothing_leaves_the_bits_of_a_layer_of_any_kind(dtype: torch.dtype) -> None:
    layer, x = transposed(dtype), torch.randn(2, 3, 64).to(dtype)
    a, b = nn.Parameter(torch.randn(8, 64)), nn.Parameter(torch.zeros(128, 8))
    assert torch.equal(LoraBeside(layer, a, b, 0.5)(x), layer(x))
