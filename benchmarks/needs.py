"""The work that a method needs, counted from the shape: floating-point operations, and bytes that must move.

It is the least that gives the method's result: the context's keys come from the cache, only labelled tokens
get logits, gradients go to the adapter and to what lies above it, never to the base's weights; written tokens
use a merged copy. Norms, softmax and rotations are not counted. It knows no times.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from templora.recipe import Recipe
from templora.recipe import load as load_recipe


@dataclass(frozen=True, slots=True)
class Work:
    """One phase: floating-point operations (a product and a sum are two), and bytes that must move."""

    flops: float
    bytes: float


class Needs:
    """The work of one text on one shape. size: bytes of a number of the base; the adapter's have four."""

    def __init__(self, config: PretrainedConfig, recipe: Recipe, size: int = 4) -> None:
        self.recipe, self.size = recipe, size
        self.layers = layers(config)
        self.head = (config.hidden_size, config.vocab_size)
        self.width = self.layers["q_proj"][1]  # of all queries
        self.kv_width = self.layers["k_proj"][1]
        self.blocks = config.num_hidden_layers
        self.adapted = self.blocks - round(recipe.first_block * self.blocks)
        self.linear = sum(a * b for a, b in self.layers.values())
        self.lora = recipe.rank * sum(a + b for a, b in self.layers.values()) * self.adapted
        self.head_lora = recipe.rank * sum(self.head) if recipe.head else 0

    @property
    def weights(self) -> int:
        """Bytes of what every token passes."""
        return self.size * (self.linear * self.blocks + self.head[0] * self.head[1])

    def attention(self, tokens: int, seen: float, blocks: int) -> float:
        """Operations: each token looks at all `seen` before it, and at half of its fellows."""
        return 4 * tokens * (seen + tokens / 2) * self.width * blocks

    def forward(self, tokens: int, seen: float, labels: int, *, adapter: bool) -> Work:
        """A pass over tokens on top of keys of `seen` others. adapter: by its side path."""
        side = 2 * (tokens * self.lora + labels * self.head_lora) if adapter else 0.0
        products = 2 * (tokens * self.linear * self.blocks + labels * self.head[0] * self.head[1])
        keys = 2 * self.size * self.kv_width * self.blocks * (seen + tokens)
        read = self.weights + keys + (4 * (self.lora + self.head_lora) if adapter else 0)
        return Work(products + side + self.attention(tokens, seen, self.blocks), read)

    def backward(self, tokens: int, seen: float) -> Work:
        """Gradients for the adapter, and for the states between it and the loss."""
        side = 4 * tokens * (self.lora + self.head_lora)
        # Below the lowest queries, keys and values nothing learns.
        rank = self.recipe.rank
        lowest = sum(a * (b + rank) for name, (a, b) in self.layers.items() if name[:2] in ("q_", "k_", "v_"))
        states = 2 * tokens * (self.linear * self.adapted - lowest + self.head[0] * self.head[1])
        attention = 2 * self.attention(tokens, seen, self.adapted)
        read = self.size * (self.linear * self.adapted + self.head[0] * self.head[1])
        return Work(states + side + attention, read + 8 * (self.lora + self.head_lora))

    def step(self, tokens: int, seen: int) -> list[Work]:
        """All epochs on one chunk, its score among them. AdamW reads four numbers and writes three."""
        numbers = self.lora + self.head_lora
        epoch = [
            self.forward(tokens, seen, tokens, adapter=True),
            self.backward(tokens, seen),
            Work(12 * numbers, 28 * numbers),
        ]
        learned = epoch * self.recipe.epochs
        # Keys are of the adapter that made them: the paper makes the context's anew after each update.
        again = self.recipe.cache == "recompute" and seen
        return ([self.forward(seen, 0, 0, adapter=False)] if again else []) + learned

    def scored(self, tokens: int, given: int = 1) -> list[Work]:
        """All chunks of a text, scored and learned."""
        return [work for chunk, seen in self._chunks(tokens, given) for work in self.step(chunk, seen)]

    def written(self, tokens: int, given: int, *, learned: bool = True) -> list[Work]:
        """All chunks of a text, written token by token, and learned."""
        phases = list[Work]()
        for chunk, seen in self._chunks(tokens, given):
            # Linear in what is seen, so the middle token stands for all.
            phases += [self.forward(1, seen + chunk / 2, 1, adapter=False)] * chunk
            phases += self.step(chunk, seen) if learned else []
        return phases

    def _chunks(self, tokens: int, given: int) -> Iterator[tuple[int, int]]:
        for start in range(given, given + tokens, self.recipe.chunk):
            yield min(self.recipe.chunk, given + tokens - start), min(start, self.recipe.window)


def layers(config: PretrainedConfig) -> dict[str, tuple[int, int]]:
    """(in, out) of the linear layers of one Llama block."""
    hidden, wide = config.hidden_size, config.intermediate_size
    head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    queries, keys = head * config.num_attention_heads, head * config.num_key_value_heads
    down = {"down_proj": (wide, hidden), "o_proj": (queries, hidden)}
    names = {"q_proj": queries, "k_proj": keys, "v_proj": keys, "gate_proj": wide, "up_proj": wide}
    return {**{name: (hidden, out) for name, out in names.items()}, **down}


def recipe(name: str, **keys: Any) -> Recipe:
    """A named recipe with these keys; sizes given here are what is measured."""
    return load_recipe(name, keys)
