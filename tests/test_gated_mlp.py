"""The lean MLP against the model's own: the same bits, less kept."""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import templora
from templora.adapter import Adapter
from templora.base import Base
from templora.gated_mlp import GatedMlp, gated_mlps
from templora.kernels import Fast
from templora.testing import ByteTokenizer, tiny_llama

TOKENS = 48


def adapted(**changes: Any) -> tuple[Base, Adapter]:
    """Every layer learns, and its side path is not zero."""
    base = templora.load(model=tiny_llama(**changes), tokenizer=ByteTokenizer())
    adapter = base.session(seed=1, window=64, context=64, chunk=16, first_block=0.0).adapter
    with torch.no_grad():
        adapter.flat.normal_(std=0.05, generator=torch.Generator().manual_seed(5))
    return base, adapter


def learned(base: Base, adapter: Adapter) -> tuple[Tensor, Tensor, int]:
    """NLL and gradient of a pass, and how many bytes it keeps until the backward pass."""
    ids, kept = [7 * i % 250 for i in range(TOKENS + 1)], dict[int, int]()

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    adapter.gradient.zero_()
    with adapter.attached():
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            nll = base.nll(ids[:-1], ids[1:])
        nll.mean().backward()
    return nll.detach(), adapter.gradient.clone(), sum(kept.values())


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_the_same_bits_and_less_kept(bias: bool, fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = adapted(mlp_bias=bias)
    with Fast() if fast else nullcontext():
        nll, gradient, kept = learned(base, adapter)
        monkeypatch.setattr("templora.gated_mlp.LoraLinear", str)  # so that it runs the model's own MLP
        plain_nll, plain_gradient, plain_kept = learned(base, adapter)
    assert torch.equal(nll, plain_nll)
    assert torch.equal(gradient, plain_gradient)
    assert gradient.abs().sum() > 0
    config = base.model.config
    wide = TOKENS * config.intermediate_size * 4 * config.num_hidden_layers
    assert plain_kept - kept >= 1.5 * wide  # two of four matrices; a bias' sum may share one


def test_only_an_mlp_that_computes_just_that() -> None:
    class Twice(nn.Module):
        """Of the same layers."""

        def __init__(self, mlp: Any) -> None:
            super().__init__()
            self.gate_proj, self.up_proj = mlp.gate_proj, mlp.up_proj
            self.act_fn, self.down_proj = mlp.act_fn, mlp.down_proj

        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    model: Any = tiny_llama()
    model.model.layers[0].mlp = Twice(model.model.layers[0].mlp)
    session = templora.load(model=model, tokenizer=ByteTokenizer()).session(
        seed=1, window=64, context=64, chunk=16, first_block=0.0
    )
    own = [site.original for site in gated_mlps(model, session.adapter.sites)]
    assert own == [block.mlp for block in model.model.layers[1:]]
    gelu: Any = tiny_llama(hidden_act="gelu")
    base = templora.load(model=gelu, tokenizer=ByteTokenizer())
    assert not list(gated_mlps(gelu, base.session(window=64, context=64, chunk=16).adapter.sites))


@pytest.mark.parametrize("place", ["mlp", "mlp.act_fn", "mlp.gate_proj", "mlp.down_proj"])
def test_a_hook_sees_what_it_always_saw(place: str) -> None:
    base, adapter = adapted()
    nll, gradient, _ = learned(base, adapter)
    seen = list[tuple[int, ...]]()
    block: Any = base.model.model.layers[0]  # pyright: ignore[reportAttributeAccessIssue]
    handle = block.get_submodule(place).register_forward_hook(
        lambda _m, _i, output: seen.append(tuple(output.shape))
    )
    again = learned(base, adapter)
    handle.remove()
    inner = place in ("mlp.act_fn", "mlp.gate_proj")
    width = base.model.config.intermediate_size if inner else base.model.config.hidden_size
    assert seen == [(1, TOKENS, width)]
    torch.testing.assert_close(again[:2], (nll, gradient))  # PEFT's layer, which calls the model's, rounds


class Clamped(nn.Module):
    """As some families do."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.act_fn = mlp.act_fn

    def forward(self, x: Tensor) -> Tensor:
        """[…, width], both ways."""
        return self.down_proj(self.act_fn(self.gate_proj(x).clamp(max=10)) * self.up_proj(x).clamp(-10, 10))


class Paired(Clamped):
    def forward(self, x: Tensor) -> Any:
        """Two results."""
        return super().forward(x), x


class Packed(nn.Linear):
    """Its weight is of bytes, as a quantised layer's."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False)
        self.weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)


@pytest.mark.parametrize("kind", [Clamped, Paired, Packed])
def test_an_mlp_that_does_anything_else_is_left_alone(kind: Any) -> None:
    base, adapter = adapted()
    block: Any = base.model.model.layers[0]  # pyright: ignore[reportAttributeAccessIssue]
    if kind is Packed:
        block.mlp.gate_proj, block.mlp.up_proj = Packed(block.mlp.gate_proj), Packed(block.mlp.up_proj)
    else:
        block.mlp = kind(block.mlp)
    sites = [replace(site, parent=block.mlp) for site in adapter.sites if site.name == "down_proj"][:1]
    assert not list(gated_mlps(base.model, sites))


def test_the_model_is_left_as_it_was() -> None:
    base, adapter = adapted()
    mlps = [block.mlp for block in base.model.model.layers]  # pyright: ignore[reportAttributeAccessIssue, reportGeneralTypeIssues]
    with adapter.attached():
        standing = [block.mlp for block in base.model.model.layers]  # pyright: ignore[reportAttributeAccessIssue, reportGeneralTypeIssues]
        assert all(isinstance(mlp, GatedMlp) for mlp in standing)
        with adapter.detached():
            ids = list(range(1, 20))
            inside = base.nll(ids[:-1], ids[1:])
    assert [block.mlp for block in base.model.model.layers] == mlps  # pyright: ignore[reportAttributeAccessIssue, reportGeneralTypeIssues]
    assert torch.equal(inside, base.nll(ids[:-1], ids[1:]))
