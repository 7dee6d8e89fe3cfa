"""The models that are measured: the embedded base, and random Llamas of common shapes.

Time and memory do not depend on the weights; what both sides compute is compared all the same.
"""

from pydoc_data.topics import topics

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import templora
from templora.testing import tiny_llama

# hidden, intermediate, blocks, heads, key/value heads, vocabulary; 135m is SmolLM2-135M's, 1b Llama 3.2's.
SHAPES = {
    "30m": (384, 1024, 10, 6, 6, 32_000),
    "135m": (576, 1536, 30, 9, 3, 49_152),
    "1b": (2048, 8192, 16, 32, 8, 128_256),
    "llama-2-7b": (4096, 11_008, 32, 32, 32, 32_000),
}
NAMES = ("novelist", "30m", "135m")  # what a CPU can run
TOY = ("toy",)
COMMON = {"toy": 257}  # words in use; 2,000 elsewhere


def build(name: str, positions: int = 4096, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model by name; the same weights each time. A random one is made on the default device."""
    if name == "novelist":
        return templora.load(name).model
    if name == "toy":
        return tiny_llama(0, max_position_embeddings=positions)
    hidden, intermediate, blocks, heads, kv_heads, vocabulary = SHAPES[name]
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        max_position_embeddings=positions,
        tie_word_embeddings=name != "llama-2-7b",
        bos_token_id=0,
        eos_token_id=0,
    )
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def base(name: str, positions: int = 4096) -> templora.Base:
    """The same, as the package sees it; without a tokenizer, so that nothing is put before a text."""
    return templora.load(model=build(name, positions))


def ids(name: str, tokens: int) -> list[int]:
    """Token ids: for the embedded base Python's own help pages, which each machine has and nobody edits; for
    a random one ids with the frequencies of words."""
    if name == "novelist":
        found = templora.load(name).encode("\n\n".join(text for _, text in sorted(topics.items())))
        assert len(found) >= tokens, f"Python's help pages have {len(found)} tokens"
        return found[:tokens]
    ranks = torch.arange(1, COMMON.get(name, 2000), dtype=torch.float, device="cpu")
    draw = torch.Generator().manual_seed(1)
    chosen = torch.multinomial(1 / ranks, tokens, replacement=True, generator=draw)
    return (chosen + 1).tolist()
