"""Tiny, randomly initialised models of many architectures, each built in milliseconds.

Sizes are the same everywhere (width 32, two blocks, `ByteTokenizer`'s vocabulary), so that a difference
between two architectures is the architecture. Initialisation is wide: with the usual small one, attention
looks at everything alike and a mistake in what is visible would hardly change a logit.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY = 257
POSITIONS = 96
# Shorter than any window used in the tests, so that the model's own sliding window matters.
SLIDING = 12

LLAMA_LIKE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
}
ONE_HEAD_KIND = {k: v for k, v in LLAMA_LIKE.items() if k != "num_key_value_heads"}
GPT_LIKE: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS}
# One block of each kind: the first looks at SLIDING tokens only, the second at all of them.
ALTERNATING: dict[str, Any] = {
    "sliding_window": SLIDING,
    "layer_types": ["sliding_attention", "full_attention"],
}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2}


@dataclass(frozen=True, slots=True)
class Architecture:
    """A model type of transformers, and what its tiny config says besides the common sizes."""

    model_type: str
    values: dict[str, Any] = field(default_factory=dict[str, Any])
    name: str = ""

    def config(self, **changes: Any) -> PreTrainedConfig:
        """The tiny config."""
        common = {
            "vocab_size": VOCABULARY,
            "bos_token_id": 256,
            "eos_token_id": 256,
            "pad_token_id": 256,
            "initializer_range": 0.1,
        }
        return CONFIG_MAPPING[self.model_type](**(common | self.values | changes))

    def build(self, seed: int = 0, **changes: Any) -> PreTrainedModel:
        """The model, the same for the same seed."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return AutoModelForCausalLM.from_config(self.config(**changes)).eval()

    def __str__(self) -> str:
        return self.name or self.model_type


def llama_like(model_type: str, name: str = "", **values: Any) -> Architecture:
    """One whose config speaks Llama's names."""
    return Architecture(model_type, LLAMA_LIKE | values, name)


# What must work.
ARCHITECTURES: tuple[Architecture, ...] = (
    llama_like("llama"),
    llama_like("llama", "llama-tied", tie_word_embeddings=True),
    Architecture("gpt2", GPT_LIKE),  # Conv1D, learned positions
    Architecture("gpt_neox", ONE_HEAD_KIND),
    llama_like("qwen2"),
    llama_like("qwen3", head_dim=8),
    llama_like("mistral", sliding_window=SLIDING),
    llama_like("mixtral", num_local_experts=4, **EXPERTS),
    # Softcapped logits: they are not the head's output as it is.
    llama_like("gemma2", head_dim=8, final_logit_softcapping=5.0, **ALTERNATING),
    llama_like("gemma3_text", head_dim=8, **ALTERNATING),
    llama_like("phi3"),
    Architecture(
        "opt",
        ONE_HEAD_KIND | {"ffn_dim": 48, "word_embed_proj_dim": 32},
    ),
    Architecture("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),  # ALiBi
    Architecture("falcon", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}),
    llama_like("cohere2", **ALTERNATING),
    llama_like("granite", logits_scaling=4.0),
    llama_like("olmo2"),
)
# What just works: one or two of each further family.
MORE: tuple[Architecture, ...] = (
    Architecture(
        "gpt_neo",
        {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "window_size": SLIDING,
            "attention_types": [[["global", "local"], 1]],
            "max_position_embeddings": POSITIONS,
        },
    ),
    Architecture("gptj", GPT_LIKE | {"rotary_dim": 8}),
    Architecture("gpt_bigcode", GPT_LIKE),
    Architecture("codegen", GPT_LIKE | {"rotary_dim": 8}),
    Architecture("ctrl", GPT_LIKE | {"dff": 48}),
    Architecture("mpt", {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": POSITIONS}),
    Architecture(
        "falcon",
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True},
        "falcon-alibi",
    ),
    Architecture("biogpt", ONE_HEAD_KIND),
    Architecture("persimmon", ONE_HEAD_KIND),
    llama_like("gemma", head_dim=8),
    llama_like("phi"),
    llama_like("cohere"),
    llama_like("olmo"),
    llama_like("olmo3", **ALTERNATING),
    llama_like("starcoder2"),
    llama_like("stablelm"),
    llama_like("smollm3"),
    llama_like("glm4", head_dim=8),
    llama_like("nemotron"),
    llama_like("helium", head_dim=8),
    llama_like("seed_oss", head_dim=8),
    llama_like("exaone4", **ALTERNATING),
    llama_like("ministral", head_dim=8, **ALTERNATING),
    llama_like("granitemoe", num_local_experts=4, **EXPERTS),
    llama_like("phimoe", num_local_experts=4, **EXPERTS),  # its router is a linear layer that gives a tuple
    llama_like("llama4_text", head_dim=8, intermediate_size_mlp=48, num_local_experts=4),  # no plain backbone
    llama_like("olmoe", num_experts=4, **EXPERTS),
    llama_like("qwen3_moe", head_dim=8, moe_intermediate_size=16, num_experts=4, **EXPERTS),
    llama_like(
        "qwen2_moe",
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        num_experts=4,
        **EXPERTS,
    ),
    llama_like(
        "gpt_oss",
        head_dim=8,
        num_local_experts=4,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        **EXPERTS,
        **ALTERNATING,
    ),
    # Latent attention: keys and values of different widths.
    llama_like(
        "deepseek_v3",
        num_key_value_heads=4,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=6,
        first_k_dense_replace=1,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        moe_intermediate_size=16,
        **EXPERTS,
    ),
)
