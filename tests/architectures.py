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
}
ALTERNATING = ["sliding_attention", "full_attention"]


@dataclass(frozen=True, slots=True)
class Architecture:
    """A model type of transformers and what its tiny config says besides the common sizes.

    head: what its output embedding is called, where that is not `lm_head`.
    """

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
        if "n_positions" not in self.values and "max_position_embeddings" not in self.values:
            common["max_position_embeddings"] = POSITIONS
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


ARCHITECTURES: tuple[Architecture, ...] = (
    llama_like("llama"),
    llama_like("llama", "llama_tied", tie_word_embeddings=True),
    Architecture("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS}),
    Architecture(
        "gpt_neo",
        {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "window_size": SLIDING,
            "attention_types": [[["global", "local"], 1]],
        },
    ),
    Architecture(
        "gptj", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS, "rotary_dim": 8}
    ),
    Architecture("gpt_bigcode", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS}),
    Architecture("gpt_neox", {k: v for k, v in LLAMA_LIKE.items() if k != "num_key_value_heads"}),
    llama_like("qwen2"),
    llama_like("qwen3", head_dim=8),
    llama_like(
        "qwen2_moe",
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
    ),
    llama_like("qwen3_moe", head_dim=8, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2),
    llama_like("mistral", sliding_window=SLIDING),
    llama_like("mixtral", num_local_experts=4, num_experts_per_tok=2),
    llama_like("gemma", head_dim=8),
    llama_like(
        "gemma2", head_dim=8, sliding_window=SLIDING, layer_types=ALTERNATING, final_logit_softcapping=5.0
    ),
    llama_like("gemma3_text", head_dim=8, sliding_window=SLIDING, layer_types=ALTERNATING),
    llama_like("phi3"),
    llama_like("phi"),
    llama_like("cohere"),
    llama_like("cohere2", sliding_window=SLIDING, layer_types=ALTERNATING),
    llama_like("granite", logits_scaling=4.0),
    llama_like("granitemoe", num_local_experts=4, num_experts_per_tok=2),
    llama_like("olmo"),
    llama_like("olmo2"),
    llama_like("olmo3", sliding_window=SLIDING, layer_types=ALTERNATING),
    llama_like("olmoe", num_experts=4, num_experts_per_tok=2),
    llama_like("starcoder2"),
    llama_like("stablelm"),
    llama_like("smollm3"),
    llama_like("glm4", head_dim=8),
    llama_like("nemotron"),
    llama_like("helium", head_dim=8),
    llama_like("ministral", sliding_window=SLIDING),
    llama_like("seed_oss", head_dim=8),
    llama_like("exaone4", sliding_window=SLIDING, layer_types=ALTERNATING),
    llama_like(
        "gpt_oss",
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=SLIDING,
        layer_types=ALTERNATING,
    ),
    llama_like(
        "deepseek_v3",
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        moe_intermediate_size=16,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
        first_k_dense_replace=1,
        num_key_value_heads=4,
    ),
    Architecture(
        "opt",
        {
            "hidden_size": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "word_embed_proj_dim": 32,
        },
    ),
    Architecture("falcon", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}),
    Architecture(
        "falcon",
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True},
        "falcon_alibi",
    ),
    Architecture("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    Architecture("mpt", {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": POSITIONS}),
    Architecture("biogpt", {k: v for k, v in LLAMA_LIKE.items() if k != "num_key_value_heads"}),
    Architecture("xglm", {"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4}),
    Architecture(
        "codegen", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS, "rotary_dim": 8}
    ),
    Architecture("persimmon", {k: v for k, v in LLAMA_LIKE.items() if k != "num_key_value_heads"}),
    Architecture("ctrl", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS, "dff": 48}),
    Architecture("openai-gpt", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS}),
)
