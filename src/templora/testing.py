"""Public fakes, for this project's tests and for its users': real models, only tiny.

They need no download, run in milliseconds and go through the same code as any other model.
"""

from collections.abc import Mapping
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END = "<|end|>"


class ByteTokenizer(PreTrainedTokenizerFast):
    """One token for each of the 256 bytes, and one that starts and ends a text (id 256)."""

    def __init__(self, **kwargs: Any) -> None:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocabulary = {symbol: i for i, symbol in enumerate(alphabet)}
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
        tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
        super().__init__(tokenizer_object=tokenizer, bos_token=END, eos_token=END, **kwargs)


def tiny_config(**changes: Any) -> LlamaConfig:
    """Two blocks of width 32 over bytes, 128 positions."""
    values: dict[str, Any] = {
        "vocab_size": 257,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": 256,
        "eos_token_id": 256,
        "pad_token_id": 256,
    }
    return LlamaConfig(**(values | changes))


def tiny_llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """A randomly initialised Llama with `ByteTokenizer`'s vocabulary; `changes` go to its config."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(tiny_config(**changes)).eval()


class ScriptedModel(LlamaForCausalLM):
    """A tiny Llama whose likeliest next token is a fixed function of the last one.

    It runs, caches and learns like any model; only its logits are pushed, after its head.
    """

    PUSH = 50.0

    def __init__(self, successor: Mapping[int, int], **changes: Any) -> None:
        super().__init__(tiny_config(**changes))
        table = torch.zeros(self.config.vocab_size, dtype=torch.long)
        for token, following in successor.items():
            table[token] = following
        self.register_buffer("successor", table)
        self.eval()

    def forward(self, input_ids: Any, position_ids: Any = None, **kwargs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """As Llama's, with `PUSH` added to the logit of each token's successor."""
        kwargs.pop("logits_to_keep", None)
        output: Any = super().forward(input_ids, position_ids=position_ids, **kwargs)
        following = self.successor[input_ids].unsqueeze(-1)  # pyright: ignore[reportIndexIssue]
        push = torch.full_like(following, self.PUSH, dtype=output.logits.dtype)
        output.logits = output.logits.scatter_add(2, following, push)
        return output
