"""Keys that move to other positions, in place of keys that are made again.

Where a position is a rotation (RoPE, arXiv 2104.09864), only the distance between two positions is ever
seen, and a key is what it would be elsewhere but for an angle. So a window that has run out of positions goes
on from 0 in a moment. Whether that holds of a model is not read off its class, but seen.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from templora.cache import on_top_of
from templora.cache_layers import PrefixLayer

# What configs call it: nearly all of them, MPT, BLOOM.
POSITIONS = ("max_position_embeddings", "max_seq_len", "seq_length")
MOVING = ("dynamic", "longrope")  # frequencies that depend on how long the text is
TOKENS, APART = 4, 512  # tokens that are tried, and by how many positions they are moved
CLOSE = 0.05  # relative error: low precision stays far below, another layout of the halves far above


class Rotary:
    """Moves the keys of a model.

    frequencies: radians a position, [width / 2]; the first half of a key's first `width` numbers is turned
    against the second, the rest has no position. layers: for each block whether its keys have one.
    """

    def __init__(self, frequencies: Tensor, layers: Sequence[bool] = ()) -> None:
        self.frequencies, self.layers = frequencies.detach().double().cpu(), list(layers)

    def __call__(self, keys: Sequence[Tensor], by: int) -> list[Tensor]:
        """Every block's keys, [..., head_dim] each, as they would be so many positions later: copies."""
        blocks = zip(keys, self.layers, strict=True)
        return [self.moved(own, by) if turns else own.clone() for own, turns in blocks]

    def moved(self, keys: Tensor, by: int) -> Tensor:
        """The same of one block whose keys have a position."""
        angles, half = by * self.frequencies, len(self.frequencies)
        cos, sin = (made.float().to(keys.device) for made in (angles.cos(), angles.sin()))
        one, other = keys[..., :half].float(), keys[..., half : 2 * half].float()
        turned = torch.cat((one * cos - other * sin, other * cos + one * sin), dim=-1)
        return torch.cat((turned.to(keys.dtype), keys[..., 2 * half :]), dim=-1)


def positions_of(config: PreTrainedConfig) -> int | None:
    """How many positions a model of that config was trained for, None if without limit.

    LongRoPE (arXiv 2402.13753) counts up to the length that it was stretched from: past that it takes other
    frequencies, and keys that are cached by then would not follow.
    """
    found = next((n for key in POSITIONS if (n := getattr(config, key, None))), None)
    rope = getattr(config, "rope_parameters", None) or {}
    first = rope.get("original_max_position_embeddings") if rope.get("rope_type") == "longrope" else None
    return min(found or first, first) if first else found


@torch.no_grad()
def rotary_of(model: PreTrainedModel, positions: int | None) -> Rotary | None:
    """What moves this model's keys, by two passes over four tokens; None if nothing is known to.

    positions: how many it was trained for.
    """
    found = [own for name, own in model.named_buffers() if name.rpartition(".")[2] == "inv_freq"]
    config = model.config.get_text_config()
    kind = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
    apart = APART if positions is None else min(APART, positions - TOKENS)
    if kind in MOVING or apart < 1 or not found or any(not torch.equal(own, found[0]) for own in found):
        return None
    here, there = (_keys(model, config.vocab_size, start) for start in (0, apart))
    rotary, layers = Rotary(found[0]), list[bool]()
    for one, other in zip(here, there, strict=True):
        if one.shape[-1] < 2 * len(found[0]):
            return None
        turns = _close(rotary.moved(one, apart), other)
        if not turns and not _close(one, other):
            return None
        layers.append(turns)
    return Rotary(found[0], layers) if any(layers) else None


def _keys(model: PreTrainedModel, vocabulary: int, start: int) -> list[Tensor]:
    """Each block's keys of a few tokens from that position on, [1, heads, tokens, head_dim]."""
    ids = torch.arange(1, TOKENS + 1, device=model.device).unsqueeze(0) % vocabulary
    places = torch.arange(start, start + TOKENS, device=model.device).unsqueeze(0)
    cache = Cache(layer_class_to_replicate=PrefixLayer)
    model.base_model(ids, position_ids=places, **on_top_of(model.base_model, cache))
    made = [layer.new for layer in cache.layers if isinstance(layer, PrefixLayer)]
    return [new[0] for new in made if new is not None]


def _close(one: Tensor, other: Tensor) -> bool:
    return float((one.float() - other.float()).norm()) <= CLOSE * float(other.float().norm())
