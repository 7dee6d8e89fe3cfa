"""bf16 products in an fp32 base's place: near to those, for its frozen layers alone, nothing else touched."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import templora
from templora import half, kernels, merging, products
from templora.events import ChunkScored
from templora.gated_mlp import LAYERS
from templora.half import Halves, wanted
from templora.kernels import Fast, used
from templora.lean_attention import FEWEST as LONG
from templora.lora_linear import LoraLinear
from templora.parallel import twin_of
from templora.products import times
from templora.testing import ByteTokenizer, tiny_llama

PROSE = "The tide came in twice that night, and twice the keeper rowed out to look for the boy. " * 6
SIZES: dict[str, Any] = {"window": 48, "context": 48, "chunk": 32, "seed": 3}
ROUNDING = 2**-7  # of a number that was rounded to bf16, times another


@pytest.fixture(autouse=True)
def small_weights_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The models of these tests are tiny."""
    monkeypatch.setattr(half, "SMALLEST", 1)


def rows(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def near(a: Tensor, b: Tensor) -> bool:
    return not torch.equal(a, b) and float((a - b).norm()) < ROUNDING * float(b.norm())


def sides(layer: nn.Linear) -> tuple[nn.Parameter, nn.Parameter]:
    """A and B of rank 4."""
    return nn.Parameter(rows(4, layer.in_features) / 50), nn.Parameter(rows(layer.out_features, 4) / 50)


def base(**changes: Any) -> templora.Base:
    return templora.load(model=tiny_llama(**changes), tokenizer=ByteTokenizer())


def scores(precision: str, recipe: str = "default", **changes: Any) -> list[float]:
    session = base().session(recipe, precision=precision, **SIZES | changes)
    return [e.adapted_nll for e in session.reading(PROSE) if isinstance(e, ChunkScored)]


@pytest.mark.parametrize("bias", [True, False])
def test_a_product_is_fp32s_up_to_rounding(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, shift = rows(40, 24), rows(16, 24), rows(16) if bias else None
    exact = functional.linear(x, weight, shift)
    assert torch.equal(times(x, weight, shift), exact)
    assert near(times(x, weight.bfloat16(), shift), exact)
    assert near(times(rows(40, 16), weight.bfloat16().T), rows(40, 16) @ weight)
    for vector in (True, False):
        monkeypatch.setattr(products, "as_vector", lambda vector=vector: vector)
        assert near(
            times(rows(1, 24), weight.bfloat16(), shift), functional.linear(rows(1, 24), weight, shift)
        )
    assert times(x, weight.bfloat16()).dtype == torch.float32


def test_only_frozen_fp32_layers_have_copies_and_the_output_layer_has_none() -> None:
    model = tiny_llama(tie_word_embeddings=True)
    model.requires_grad_(False)
    halves, layer = Halves(model), model.model.layers[0].mlp.up_proj
    assert halves.of(layer.weight).dtype == torch.bfloat16
    assert halves.of(layer.weight) is halves.of(layer.weight), "made once"
    for kept in (model.lm_head.weight, model.model.norm.weight, layer.weight.detach().clone()):
        assert halves.of(kept) is kept
    layer.weight.requires_grad_(True)
    assert halves.of(layer.weight) is layer.weight
    assert not Halves(model.bfloat16())


def test_a_copy_is_made_anew_when_its_weight_was_changed() -> None:
    model = tiny_llama()
    model.requires_grad_(False)
    halves, layer = Halves(model), model.model.layers[0].mlp.up_proj
    halves.of(layer.weight)
    layer.weight.add_(1.0)
    assert torch.equal(halves.of(layer.weight), layer.weight.bfloat16())
    layer.weight.data = layer.weight.detach() * 2
    assert torch.equal(halves.of(layer.weight), layer.weight.bfloat16())


def test_a_learner_beside_its_writer_shares_the_copies() -> None:
    whole = base()
    twin, name = twin_of(whole, "mend it"), "model.layers.0.mlp.up_proj.weight"
    learns, writes = twin.model.get_parameter(name), whole.model.get_parameter(name)
    assert twin.halves.of(learns) is whole.halves.of(writes)
    assert twin.halves.of(learns).dtype == torch.bfloat16


@pytest.mark.parametrize("wide", [True, False])
def test_a_layer_takes_its_copy_while_such_a_pass_runs(wide: bool) -> None:
    model = tiny_llama()
    model.requires_grad_(False)
    layer: nn.Linear = model.model.layers[0].mlp.up_proj
    found: list[list[Tensor]] = []
    for mode in (None, Fast(Halves(model), wide=wide)):
        x = rows(2, 20, layer.in_features).requires_grad_()
        if mode is None:
            y = layer(x)
        else:
            with mode:
                assert used(layer.weight).dtype == torch.bfloat16
                assert kernels.is_fast() is wide
                y, short = layer(x), layer(x[0, :1])
            assert near(short.detach(), layer(x[0, :1]).detach()), "one row, in a pass over more"
        found.append([y.detach(), *torch.autograd.grad(y.sin().sum(), x)])
    assert used(layer.weight) is layer.weight
    assert all(near(ours, exact) for exact, ours in zip(*found, strict=True))


@pytest.mark.parametrize("wide", [True, False])
def test_a_long_pass_keeps_what_is_rounded_once(wide: bool) -> None:
    model = tiny_llama()
    model.requires_grad_(False)
    gate, up, down = (getattr(model.model.layers[0].mlp, name) for name in LAYERS)
    parts = [LoraLinear(layer, *sides(layer), 2.0) for layer in (gate, up, down)]
    kept: list[list[Tensor]] = []

    def learned(count: int, copies: Halves | None) -> list[Tensor]:
        x = rows(count, gate.in_features).unsqueeze(0).requires_grad_()
        kept.append([])
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: (kept[-1].append(t), t)[1], lambda t: t)
        with Fast(copies, wide=wide) if copies or wide else nullcontext(), hooks:
            y = parts[2].gated(parts[0](x), parts[1](x))
        learn = [x, *(side for part in parts for side in (part.a, part.b))]
        return list(torch.autograd.grad(y.sin().sum(), learn))

    def inputs() -> list[Tensor]:
        """What is kept of a width of one of the layers."""
        return [t for t in kept[-1] if t.ndim == 3 and t.shape[-1] in {gate.in_features, down.in_features}]

    for count in (LONG - 1, LONG):
        exact, ours = learned(count, None), learned(count, Halves(model))
        assert all(near(a, b) for a, b in zip(ours, exact, strict=True))
        wanted = torch.bfloat16 if count == LONG else torch.float32
        assert {t.dtype for t in inputs()} == {wanted}
        # What gate and up are given is kept once for both.
        assert len({t.untyped_storage().data_ptr() for t in inputs()}) == 3


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("recipe", ["default", "paper"])
def test_a_text_is_scored_and_learned_nearly_as_in_fp32(
    recipe: str, wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "pays", lambda: wide)
    changes: dict[str, Any] = {"dropout": 0.0, "learning_rate": 1e-3}
    exact, ours = (scores(precision, recipe, **changes) for precision in ("fp32", "bf16"))
    assert len(exact) > 10
    assert ours != exact, "bf16 did not run"
    assert ours == pytest.approx(exact, rel=2e-3)
    still = scores("fp32", recipe, **changes | {"learning_rate": 0.0})
    assert still[-1] - exact[-1] > 10 * abs(ours[-1] - exact[-1]), "learning must be far more than rounding"


def test_several_texts_at_once_are_scored_as_each_alone() -> None:
    texts = [PROSE, PROSE[9:200]]
    found: dict[str, list[float]] = {}
    for precision in ("fp32", "bf16"):
        changes = SIZES | {"precision": precision}
        batched = templora.score_batch(base(), texts, size=2, lockstep=True, **changes)
        alone = [templora.score(base(), text, **changes) for text in texts]
        found[precision] = [scores.adapted.nll for scores in batched]
        assert found[precision] == pytest.approx([scores.adapted.nll for scores in alone], rel=2e-3)
    assert found["bf16"] != found["fp32"], "bf16 did not run"


@pytest.mark.parametrize("bias", [True, False])
def test_one_row_is_one_of_many(bias: bool) -> None:
    x, weight, shift = rows(3, 24), rows(16, 24).bfloat16(), rows(16) if bias else None
    alone = torch.cat([times(row.unsqueeze(0), weight, shift) for row in x])
    assert torch.allclose(alone, times(x, weight, shift), rtol=ROUNDING)


@pytest.mark.parametrize("large", [True, False])
def test_a_large_base_writes_from_its_copies_and_a_small_one_does_not(
    large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(half, "LARGE", 1 if large else 1 << 28)
    monkeypatch.setattr(merging, "LARGEST", 0)  # a large one has no merged copy
    found: dict[str, list[Tensor]] = {}
    for precision in ("fp32", "bf16"):
        session = base().session(precision=precision, **SIZES)
        session.extend(session.base.encode(PROSE[:9]), PROSE[:9])
        found[precision] = []
        for token in session.base.encode("abc"):
            found[precision].append(session.decoder.logits(session.ids, session.plan.span(0)))
            session.ids.append(token)
    for exact, ours in zip(found["fp32"], found["bf16"], strict=True):
        assert near(ours, exact) if large else torch.equal(ours, exact)


@pytest.mark.parametrize("large", [True, False])
def test_several_texts_at_once_take_the_copies_where_each_alone_would(
    large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(half, "LARGE", 1 if large else 1 << 28)
    monkeypatch.setattr(merging, "LARGEST", 0 if large else 1 << 30)
    sizes: set[int] = set()  # of the passes that take them
    real = kernels.fast

    def fast(rows: int, *of: Any, **how: Any) -> Any:
        found = real(rows, *of, **how)
        if isinstance(found, Fast) and found.halves:
            sizes.add(rows)
        return found

    monkeypatch.setattr(kernels, "fast", fast)
    prompts = [PROSE[:60], PROSE[9:80]]
    list(templora.write_batch(base(), prompts, tokens=4, size=2, lockstep=True, precision="bf16", **SIZES))
    assert max(sizes) > 2, "chunks"
    assert (2 in sizes) is large, "a token of each text"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("cache", ["reuse", "recompute", "base"])
@pytest.mark.parametrize("sinks", [0, 4])
def test_at_rate_zero_base_and_adapter_have_the_same_bits_and_the_base_keeps_its_own(
    precision: str, cache: str, sinks: int
) -> None:
    model = base()
    before = model.fingerprint()
    changes = SIZES | {"precision": precision, "cache": cache, "sinks": sinks}
    session = model.session(learning_rate=0.0, **changes)
    for event in session.reading(PROSE, score_base=True):
        assert isinstance(event, ChunkScored)
        assert event.adapted_nll == event.base_nll
    assert session.base.fingerprint() == before


@pytest.mark.parametrize(
    ("cpu", "has", "vector"),
    [
        ("vendor_id : GenuineIntel\nflags : fpu avx512_bf16 amx_bf16", True, True),
        ("vendor_id : AuthenticAMD\nflags : fpu avx512_bf16", True, False),
        ("vendor_id : GenuineIntel\nflags : fpu avx2", False, False),
        ("", False, False),
    ],
)
def test_what_a_cpu_says_of_itself_decides(
    cpu: str, has: bool, vector: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for asked in (half.native, half.intel):
        asked.cache_clear()
    monkeypatch.setattr(half, "_cpu", lambda: cpu)
    assert (half.native(), half.as_vector(), half.intel()) == (has, vector, "AMD" not in cpu)
    for asked in (half.native, half.intel):
        asked.cache_clear()


def test_auto_is_what_the_machine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    for has in (True, False):
        monkeypatch.setattr(half, "native", lambda has=has: has)
        assert wanted("auto") is has
    assert wanted("bf16")
    assert not wanted("fp32")
