"""The base's model: a plain Llama, from scratch or from a folder, and back into a folder."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from config import PretrainConfig
from data import BOUNDARY
from tokenizers import Tokenizer
from torch import Tensor
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

LOSS_ROWS = 2048


def build_model(config: PretrainConfig, boundary: int) -> LlamaForCausalLM:
    """Return fp32 weights: those of `init_from`, or fresh ones, for the run's longest window."""
    if config.init_from:
        model = LlamaForCausalLM.from_pretrained(config.init_from, dtype=torch.float32)
        model.config.max_position_embeddings = config.longest
        model.set_attn_implementation(config.attention)
        return model
    torch.manual_seed(config.seed)
    shape = config.shape
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.vocabulary,
            hidden_size=shape.hidden,
            intermediate_size=shape.feed_forward,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            max_position_embeddings=config.longest,
            rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
            tie_word_embeddings=True,
            bos_token_id=boundary,
            eos_token_id=boundary,
            pad_token_id=boundary,
        )
    )
    model.set_attn_implementation(config.attention)
    return model


def token_losses(model: LlamaForCausalLM, batch: Tensor) -> Tensor:
    """Return the loss of each target, `[rows, window]` nats, of a batch `[rows, window + 1]`.

    The logits exist for `LOSS_ROWS` tokens at a time: in fp32 they are larger than all activations.
    """
    inputs, targets = batch[:, :-1], batch[:, 1:]
    hidden = model.model(inputs, use_cache=False).last_hidden_state.flatten(0, 1)
    losses = []
    for rows, wanted in zip(hidden.split(LOSS_ROWS), targets.reshape(-1).split(LOSS_ROWS), strict=True):
        logits = F.linear(rows, model.lm_head.weight).float()  # [LOSS_ROWS, vocab]
        losses.append(F.cross_entropy(logits, wanted, reduction="none"))
    return torch.cat(losses).view_as(targets)


def export(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path, shard_megabytes: int | None) -> None:
    """Write a Hugging Face folder: bf16 weights, tokenizer, configuration, sampling defaults."""
    boundary = tokenizer.token_to_id(BOUNDARY)
    half = LlamaForCausalLM(model.config).to(torch.bfloat16)
    half.load_state_dict(model.state_dict())
    half.generation_config = GenerationConfig(
        bos_token_id=boundary, eos_token_id=boundary, pad_token_id=boundary
    )
    half.save_pretrained(folder, max_shard_size=f"{shard_megabytes or 1000}MB")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOUNDARY,
        eos_token=BOUNDARY,
        pad_token=BOUNDARY,
        model_max_length=model.config.max_position_embeddings,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)
