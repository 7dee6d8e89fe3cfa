"""One token through a model on a GPU: recorded as a CUDA graph, then replayed.

A token's kernels take a GPU less time than Python takes to start them one by one. A graph starts them all at
once, but always the same ones on the same memory. So this pass, unlike the usual one, sees a whole piece of
the cache's buffers, of which a mask hides what is not visible, and what changes from token to token are
numbers on the device. The piece depends on what is visible alone, and until a graph is recorded, or where it
cannot be, the same kernels are started one by one: a text that is resumed goes on with the same bits.
"""

import warnings
from collections import OrderedDict
from collections.abc import Sequence
from itertools import chain
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from templora.cache import WindowCache, on_top_of
from templora.cache_layers import FixedLayer, WindowLayer
from templora.cuda_graph import Recording
from templora.memory import is_out_of_memory
from templora.probe import is_watched
from templora.rotary import MOVING

# Families that take masks and positions as they are given, and never wait for the device half-way.
KNOWN = {
    *("cohere2", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "granite", "llama", "ministral"),
    *("mistral", "olmo2", "olmo3", "phi3", "qwen2", "qwen3", "smollm3", "starcoder2"),
}
FULL, SLIDING = "full_attention", "sliding_attention"  # blocks that see all, and a window of their own
MASKED = ("sdpa", "eager")  # kinds of attention that take a mask of numbers
PIECES = 16  # of a buffer; what a pass sees begins and ends at the edge of one
USES = 4  # of a piece before its pass is recorded, which takes as long as some tokens
MOST = 64  # passes that are kept, of all texts


class GraphStep:
    """Makes the logits after one token. Make it with `step_of`.

    records: whether passes are recorded; without it they are only made for that.
    """

    def __init__(self, model: PreTrainedModel, *, records: bool) -> None:
        self._model, self._device, self._records = model, model.device, records
        children = (module.__dict__["_modules"] for module in model.modules())
        self._places: list[dict[str, nn.Module | None]] = [places for places in children if places]
        self._own = {id(module) for module in model.modules()}
        self._texts: WeakKeyDictionary[WindowCache, _Text] = WeakKeyDictionary()
        self._recording: Recording | None = None
        self._calls = 0

    def __call__(self, token: int, position: int, cache: WindowCache) -> Tensor:
        """Run it on top of `cache`, which grows; [vocab]. Gradients must be switched off."""
        layers, device = cast("list[WindowLayer]", cache.layers), self._model.device
        begun = all(layer.is_initialized and layer.length for layer in layers)
        moved = device != self._device or (begun and cast(Tensor, layers[0].keys).device != device)
        if not begun or moved or _attention(self._model) not in MASKED:
            return usual(self._model, token, position, cache)
        for layer in layers:
            layer.grow()
        made = self._pass(cache)
        numbers = token, position, layers[0].first, layers[0].stop - 1
        logits = self._run(made, numbers)
        if bool(logits.isnan().any()):  # the mask hides numbers alone: nothing else may be where nothing is
            for layer in layers:
                layer.clean()
            logits = self._run(made, numbers)
        if self._records and made.replay is None and made.uses >= USES:
            self._record(made)
        return logits

    def _run(self, made: "_Pass", numbers: tuple[int, int, int, int]) -> Tensor:
        """That pass; what was recorded of it is looked at when it is first used, and not taken before."""
        logits = made.run(*numbers)
        if made.replay is not None and not made.trusted:
            recorded, made.replay = made.replay, None
            again = made.run(*numbers)  # whatever was recorded has written to the cache
            if torch.allclose(logits, again, rtol=0, atol=0, equal_nan=True):
                made.replay, made.trusted = recorded, True
            else:
                self._give_up("what was recorded computes something else")
            return again
        return logits

    def _record(self, made: "_Pass") -> None:
        try:
            self._recording = self._recording or Recording(self._device)
            made.logits, made.replay = self._recording.of(made.start)
        except Exception as error:  # such as a model that waits for the device half-way
            if is_out_of_memory(error):
                made.uses = 0  # there may be enough another time
            else:
                self._give_up(" ".join(str(error).split())[:200])

    def _give_up(self, reason: str) -> None:
        self._records = False
        warnings.warn(f"a token cannot be recorded, so writing is slower: {reason}", stacklevel=1)

    def _pass(self, cache: WindowCache) -> "_Pass":
        """The one for what stands in the model and what is visible now."""
        layer = cast(WindowLayer, cache.layers[0])
        text = self._texts.get(cache)
        if text is None or text.keys is not layer.keys:
            text = self._texts[cache] = _Text(layer.keys)
        self._calls += 1
        text.used = self._calls
        modules = [module for module in chain.from_iterable(map(dict.values, self._places)) if module]
        names = tuple(map(id, modules))
        if (stands := text.stands.get(names)) is None:
            stands = text.stands[names] = _Standing(modules, self._own)
        before, memory, piece = stands.memory, stands.look(), piece_of(layer)
        if memory is not before:  # weights have moved: what reads them elsewhere is of no use, and holds them
            for old in [key for key, made in text.passes.items() if made.memory is before]:
                del text.passes[old]
        key = (piece.start, piece.stop, _attention(self._model), id(memory))
        if key not in text.passes:
            text.passes[key] = _Pass(self._model, cache, piece, memory)
            self._shrink(text)
        text.passes.move_to_end(key)
        return text.passes[key]

    def _shrink(self, text: "_Text") -> None:
        """Let go of passes that were not used for long, above all of other texts."""
        texts = sorted(self._texts.values(), key=lambda each: each.used)
        over = sum(len(each.passes) for each in texts) - MOST
        for each in texts:
            while over > 0 and each.passes and (each is not text or len(each.passes) > 1):
                each.passes.popitem(last=False)
                over -= 1


class _Standing:
    """What stands in the model's places. It keeps the modules, so that no other one comes to have an id of
    theirs, and the memory of what they compute with, so that nothing else comes to lie there."""

    def __init__(self, modules: Sequence[nn.Module], own: set[int]) -> None:
        self.modules = modules
        self.memory, self._where = list[Tensor](), ()
        parts = (each for one in modules for each in ((one,) if id(one) in own else one.modules()))
        self._held = [
            held
            for part in parts
            for held in (part.__dict__["_parameters"], part.__dict__["_buffers"])
            if held
        ]

    def look(self) -> list[Tensor]:
        """All that they compute with, as it lies in memory now: the same list while it lies there."""
        tensors = [one for one in chain.from_iterable(map(dict.values, self._held)) if one is not None]
        where = tuple(map(Tensor.data_ptr, tensors))
        if where != self._where:
            self.memory, self._where = [one.detach() for one in tensors], where
        return self.memory


class _Text:
    """What was made for one text. keys: the first block's buffer. used: when, in calls."""

    def __init__(self, keys: Tensor | None) -> None:
        self.keys, self.used = keys, 0
        self.stands: dict[tuple[int, ...], _Standing] = {}
        self.passes: OrderedDict[tuple[Any, ...], _Pass] = OrderedDict()


class _Pass:
    """A pass over one token that sees one piece of the buffers.

    memory: that it reads. replay: of its graph, once there is one, which leaves its result in `logits`.
    trusted: it was seen to do what the pass does.
    """

    def __init__(
        self, model: PreTrainedModel, cache: WindowCache, piece: slice, memory: list[Tensor]
    ) -> None:
        self._model, self._first, self.uses, self.memory = model, piece.start, 0, memory
        self.replay: Any = None
        self.logits, self.trusted = torch.empty(0), False
        self._numbers = torch.zeros(4, dtype=torch.long, device=model.device)
        self._columns = torch.arange(piece.stop - piece.start, device=model.device)
        layers = (FixedLayer(cast(WindowLayer, own), piece, self._numbers[3:]) for own in cache.layers)
        self._cache = Cache(layers=[*layers])

    def run(self, token: int, position: int, first: int, place: int) -> Tensor:
        """Logits after that token, [vocab], which goes to that place and sees all from `first` on."""
        self.uses += 1
        self._numbers.copy_(torch.tensor([token, position, first - self._first, place - self._first]))
        if self.replay is None:
            return self.start()
        self.replay()
        return self.logits.clone()

    def start(self) -> Tensor:
        """Start its kernels one by one."""
        token, position, first, place = self._numbers.split(1)
        seen = (self._columns >= first) & (self._columns <= place)
        inputs: dict[str, Any] = {"attention_mask": self._masks(seen, place)}
        inputs |= on_top_of(self._model, self._cache)
        return self._model(token.view(1, 1), position_ids=position.view(1, 1), **inputs).logits[0, -1]

    def _masks(self, seen: Tensor, place: Tensor) -> Tensor | dict[str, Tensor]:
        """What is added to attention's scores, [1, 1, 1, columns]; where blocks differ, for each kind."""
        config = self._model.config.get_text_config()
        masks, kinds = {FULL: self._mask(seen)}, kinds_of(config)
        if SLIDING in kinds:
            masks[SLIDING] = self._mask(seen & (self._columns > place - config.sliding_window))
        alike = getattr(config, "layer_types", None) is None or kinds == {FULL}
        return masks[kinds.pop()] if alike else masks

    def _mask(self, seen: Tensor) -> Tensor:
        mask = torch.zeros(seen.shape, dtype=self._model.dtype, device=seen.device)
        return mask.masked_fill_(~seen, -torch.inf).view(1, 1, 1, -1)


def piece_of(layer: WindowLayer) -> slice:
    """What a pass sees of its buffers: all that is visible, up to the next edges."""
    width = -(-layer.capacity // PIECES)
    width = -(-width // 8) * 8  # attention kernels want masks of such widths
    return slice(layer.first // width * width, min(layer.capacity, -(-layer.stop // width) * width))


def usual(model: PreTrainedModel, token: int, position: int, cache: WindowCache) -> Tensor:
    """The logits that the model gives, [vocab], in the usual way."""
    ids, places = (torch.tensor([[number]], device=model.device) for number in (token, position))
    return model(ids, position_ids=places, **on_top_of(model, cache)).logits[0, -1]


def step_of(model: PreTrainedModel) -> GraphStep | None:
    """The short cut for this model on its GPU; None where there is none."""
    return GraphStep(model, records=True) if model.device.type == "cuda" and suits(model) else None


@torch.no_grad()
def suits(model: PreTrainedModel) -> bool:
    """Whether a pass of fixed shapes gives the model's logits, up to rounding."""
    config = model.config
    is_known = config.model_type in KNOWN and type(model).__module__.startswith("transformers.models.")
    rotation = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
    if not is_known or rotation in MOVING or kinds_of(config) - {FULL, SLIDING}:
        return False
    if _attention(model) not in MASKED:
        return False
    return not any(map(is_watched, model.modules())) and _agrees(model)


def _attention(model: PreTrainedModel) -> str:
    return getattr(model.config, "_attn_implementation", "")


def kinds_of(config: Any) -> set[str]:
    """What its blocks see: all, the last so many tokens, or what is not known here."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return set(kinds)
    return {FULL if getattr(config, "sliding_window", None) is None else SLIDING}


def _agrees(model: PreTrainedModel) -> bool:
    """By trying it on a few tokens."""
    ids = [token % model.config.vocab_size for token in range(1, 8)]
    ours, theirs = WindowCache(16), WindowCache(16)
    try:
        for cache in (ours, theirs):
            places = torch.arange(6, device=model.device).unsqueeze(0)
            given = torch.tensor([ids[:6]], device=model.device)
            model(given, position_ids=places, **on_top_of(model, cache))
            cache.forget_before(3)
        made, wanted = GraphStep(model, records=False)(ids[6], 6, ours), usual(model, ids[6], 6, theirs)
    except Exception as error:
        if is_out_of_memory(error):  # else the same model would write with other bits another time
            raise
        return False
    within = torch.finfo(made.dtype).eps ** 0.5 * float(wanted.abs().max())
    return bool(((made - wanted).abs() <= within).all())
