"""Any causal LM of transformers: it writes, it learns, and afterwards it is what it was, bit for bit.

What is computed through the cache is compared with the plainest way: PEFT loads the saved adapter into a
second copy of the model, which runs the visible tokens at once and returns all logits.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from peft.functional import inject_adapter_in_model
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    BartConfig,
    BartForCausalLM,
    BertConfig,
    BertLMHeadModel,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    RobertaConfig,
    RobertaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import templora
from templora.base import Base
from templora.errors import UnsupportedModel
from templora.events import ChunkLearned, ChunkScored, End, Token
from templora.recipe import load as load_recipe
from templora.session import Session
from templora.testing import ByteTokenizer, tiny_llama
from tests.architectures import ARCHITECTURES, MORE, SLIDING, VOCABULARY, Architecture

PROSE = (
    "The lighthouse keeper climbed the stairs each evening, counting them aloud, and each evening there "
    "were ninety-nine."
)
WINDOW, CHUNK = 40, 16
SIZES = {"window": WINDOW, "chunk": CHUNK, "context": WINDOW}

every = pytest.mark.parametrize(
    "architecture",
    [*ARCHITECTURES, *(pytest.param(a, marks=pytest.mark.slow) for a in MORE)],
    ids=str,
)


def base_of(architecture: Architecture) -> Base:
    return templora.load(model=architecture.build(), tokenizer=ByteTokenizer())


def plain_nll(model: torch.nn.Module, ids: list[int], visible: int, start: int, stop: int) -> Tensor:
    """NLL of ids[start:stop] from one pass over the sinks and ids[visible:stop], [tokens]."""
    sinks = ids[: min(visible, load_recipe("default").sinks)]
    logits = model(input_ids=torch.tensor([sinks + ids[visible:stop]]), use_cache=False).logits[0]
    predicting = logits[start - stop - 1 : -1].float()
    return cross_entropy(predicting, torch.tensor(ids[start:stop]), reduction="none")


@torch.no_grad()
def cached_nll(session: Session, chunk: int) -> Tensor:
    """NLL of that chunk of the session's text, its window taken from the cache, [tokens]."""
    with session.adapter.attached():
        return session.passes.nll(session.ids, session.plan.span(chunk), WINDOW)


@every
def test_it_writes(architecture: Architecture) -> None:
    base = base_of(architecture)
    session = base.session(seed=1, **SIZES)
    session.extend(base.encode(PROSE[:50]), PROSE[:50])
    events = list(session.write(40))
    tokens = [e.id for e in events if isinstance(e, Token)]
    assert len(tokens) == 40
    assert session.ids[-40:] == tokens
    assert all(0 <= token < VOCABULARY for token in tokens)
    assert session.text == PROSE[:50] + "".join(e.text for e in events if isinstance(e, Token))
    end = events[-1]
    assert isinstance(end, End)
    assert end.tokens == 40
    assert end.adapted_perplexity is not None


def seen(session: Session, chunk: int) -> tuple[list[int], int]:
    """What was visible when that chunk was scored, the chunk included, and how many tokens it has."""
    span = session.plan.span(chunk)
    return session.ids[span.visible : span.stop], span.tokens


@every
def test_it_learns(architecture: Architecture) -> None:
    base = base_of(architecture)
    session = base.session(
        seed=1, **SIZES, epochs=3, learning_rate=2e-3, b_rate=1.0, guard=False, first_block=0.5
    )
    fresh = session.adapter.snapshot()
    session.extend(base.encode(PROSE), PROSE)
    scored: dict[int, float] = {}
    for event in session.learning():
        if isinstance(event, ChunkScored):
            assert 0 < event.adapted_nll < float("inf")
            scored[event.chunk] = event.adapted_nll
        else:
            assert isinstance(event, ChunkLearned)
            assert event.version == session.adapter.version == event.chunk + 1
            assert session.passes.again(*seen(session, event.chunk)) < scored[event.chunk]
    assert session.adapter.version == len(scored) == len(PROSE) // CHUNK
    assert torch.isfinite(session.adapter.flat).all()
    assert not torch.equal(session.adapter.flat, fresh)


@every
def test_discard_leaves_the_model_bit_for_bit_as_it_was(architecture: Architecture) -> None:
    base = base_of(architecture)
    model, fixed = base.model, torch.arange(1, 40).unsqueeze(0)
    before = base.fingerprint()
    with torch.no_grad():
        logits = model(fixed).logits
    modules, keys = dict(model.named_modules()), [set(vars(m)) for m in model.modules()]
    kinds = {name: type(module) for name, module in modules.items()}
    session = base.session(seed=1, **SIZES)
    session.read(PROSE)
    list(session.write(20))
    assert session.adapter.version > 0
    session.discard()
    assert base.fingerprint() == before
    with torch.no_grad():
        assert torch.equal(model(fixed).logits, logits)
    after = dict(model.named_modules())
    assert after.keys() == modules.keys()
    assert all(after[name] is module for name, module in modules.items())
    assert {name: type(module) for name, module in after.items()} == kinds
    assert [set(vars(m)) for m in model.modules()] == keys
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


@every
@torch.no_grad()
def test_the_cache_path_equals_one_plain_pass(architecture: Architecture, tmp_path: Path) -> None:
    base = base_of(architecture)
    session = base.session(seed=1, **SIZES, context_from="cache", learning_rate=1e-2, guard=False)
    session.extend(base.encode(PROSE), PROSE)
    ids, last = session.ids, len(PROSE) // CHUNK - 1
    fresh = cached_nll(session, last)
    span = session.plan.span(last)
    assert span.visible > 0, "the window must have left the beginning of the text behind"
    place = (span.visible, span.start, span.stop)
    assert torch.allclose(fresh, plain_nll(architecture.build(), ids, *place), atol=1e-4)
    session.decoder.forget()
    loop = session.learning()
    with torch.enable_grad():
        while session.adapter.version == 0:
            next(loop)
    session.adapter.save(tmp_path)
    with warnings.catch_warnings():
        # PEFT says of a head that shares its weight with the input layer that merging it would change both.
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
        # … and of GPT-2 that its head is no Conv1D, as the other layers are.
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to True")
        adapted = PeftModel.from_pretrained(architecture.build(), str(tmp_path))
    session.decoder.forget()
    learned = cached_nll(session, last)
    assert torch.allclose(learned, plain_nll(adapted, ids, *place), atol=1e-4)
    assert not torch.allclose(learned, fresh, atol=1e-3), "the adapter made no difference"


@every
def test_a_text_that_fits_the_window_is_scored_alike_whether_keys_are_kept_or_made_again(
    architecture: Architecture,
) -> None:
    base = base_of(architecture)
    scores: list[list[float]] = []
    for cache in ("reuse", "recompute"):
        session = base.session(
            seed=1, window=60, chunk=10, context=60, learning_rate=0.0, cache=cache, context_from="cache"
        )
        events = session.reading(PROSE[:61])
        scores.append([e.adapted_nll for e in events if isinstance(e, ChunkScored)])
    assert len(scores[0]) == 6
    assert scores[0] == pytest.approx(scores[1], abs=1e-3)


@torch.no_grad()
def test_the_tests_would_notice_a_sliding_window_that_is_not_applied() -> None:
    sliding = next(a for a in ARCHITECTURES if str(a) == "mistral")
    ids = torch.arange(1, 1 + WINDOW).unsqueeze(0)
    near, all_of_them = (
        sliding.build(sliding_window=w)(ids, use_cache=False).logits[0, -1] for w in (SLIDING, None)
    )
    assert not torch.allclose(near, all_of_them, atol=1e-2)


def tiny_mamba() -> PreTrainedModel:
    return MambaForCausalLM(MambaConfig(vocab_size=257, hidden_size=16, state_size=4, num_hidden_layers=2))


def tiny_t5() -> PreTrainedModel:
    return T5ForConditionalGeneration(
        T5Config(vocab_size=257, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    )


def tiny_bert() -> PreTrainedModel:
    return BertLMHeadModel(
        BertConfig(
            vocab_size=257,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=64,
            is_decoder=False,
        )
    )


def tiny_bart() -> PreTrainedModel:
    sizes: dict[str, int] = {"d_model": 16, "decoder_layers": 1, "decoder_attention_heads": 2}
    return BartForCausalLM(BartConfig(vocab_size=257, decoder_ffn_dim=16, **sizes))


def tiny_roberta() -> PreTrainedModel:
    sizes: dict[str, int] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"vocab_size": 257, "intermediate_size": 16, "pad_token_id": 0}
    config = RobertaConfig(initializer_range=0.2, **sizes)
    config.is_decoder = True
    return RobertaForCausalLM(config)


def tiny_llama_with_prompt() -> Any:
    return get_peft_model(tiny_llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))


def tiny_llama_with_lora() -> PreTrainedModel:
    model = tiny_llama()
    inject_adapter_in_model(LoraConfig(r=8, target_modules="all-linear"), model)
    return model


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (tiny_mamba, "keeps a recurrent state, not keys and values"),
        (tiny_t5, "is not a decoder-only causal LM"),
        (tiny_bert, "is not causal: a token changes what came before it"),
        (tiny_llama_with_lora, "already carries a LoRA adapter; call merge_and_unload"),
        (tiny_llama_with_prompt, "already carries an adapter of PEFT's"),
        (tiny_bart, "counts positions in a way of its own"),
        (tiny_roberta, "counts positions in a way of its own"),
    ],
    ids=["mamba", "t5", "bert", "lora", "prompt", "bart", "roberta"],
)
def test_a_model_that_cannot_work_is_refused_with_the_reason(
    build: Callable[[], PreTrainedModel], reason: str
) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build().eval()
    with pytest.raises(UnsupportedModel, match=reason) as caught:
        templora.load(model=model, tokenizer=ByteTokenizer())
    assert "\n" not in str(caught.value)


def test_a_peft_model_is_refused_with_the_reason() -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(r=8, target_modules="all-linear"))
    with pytest.raises(UnsupportedModel, match="already carries a LoRA adapter"):
        templora.load(model=model, tokenizer=ByteTokenizer())  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("targets", [("nothing",), "nothing", ("embed_tokens_",)])
def test_targets_that_the_model_does_not_have_are_refused_and_leave_it_as_it_was(
    targets: str | tuple[str, ...],
) -> None:
    base = templora.load(model=tiny_llama(), tokenizer=ByteTokenizer())
    before, keys = base.fingerprint(), set(vars(base.model))
    with pytest.raises(UnsupportedModel, match="no layers of LlamaForCausalLM can carry LoRA") as caught:
        base.session(targets=targets)
    assert "\n" not in str(caught.value)
    assert base.fingerprint() == before
    assert set(vars(base.model)) == keys
    assert base.session(seed=1, **SIZES).read(PROSE).tokens > 0


def test_a_target_that_is_no_linear_layer_is_refused() -> None:
    base = templora.load(model=tiny_llama(), tokenizer=ByteTokenizer())
    with pytest.raises(UnsupportedModel, match="embed_tokens is a Embedding"):
        base.session(targets=("q_proj", "embed_tokens"))
    assert base.session(seed=1).adapter.sites, "the model is as it was"


def test_of_a_model_that_also_sees_only_what_writes_learns(tmp_path: Path) -> None:
    tiny: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    text = tiny | {"vocab_size": 257, "num_key_value_heads": 1, "head_dim": 8, "num_hidden_layers": 2}
    vision = tiny | {"num_hidden_layers": 2, "image_size": 8, "patch_size": 4}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    base = templora.load(model=Gemma3ForConditionalGeneration(config).eval(), tokenizer=ByteTokenizer())
    session = base.session(seed=1, **SIZES, first_block=0.5)
    assert session.read(PROSE).tokens > 0 and session.adapter.version > 0
    session.adapter.save(tmp_path)
    places = {".".join(name.split(".")[2:6]) for name in load_file(tmp_path / "adapter_model.safetensors")}
    head, upper = "lm_head.lora_{}.weight", "model.language_model.layers.1"
    assert places == {head.format("A"), head.format("B"), upper}
