"""One token through a model on a GPU: recorded as a CUDA graph, then replayed.

A token's kernels take a GPU less time than Python takes to start them one by one. A graph starts them all at
once, but always the same ones on the same memory. So this pass, unlike the usual one, sees a whole piece of
the cache's buffers, of which a mask hides what is not visible, and what changes from token to token are
numbers on the device. The piece depends on what is visible alone, and until a graph is recorded the same
kernels are started one by one: a text that is resumed goes on with the same bits.
"""

import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from templora.cache import FixedLayer, WindowCache, WindowLayer, on_top_of
from templora.probe import is_watched
from templora.rotary import MOVING

PIECES = 16  # of a buffer; what a pass sees begins and ends at the edge of one
USES = 4  # of a piece before its pass is recorded, which takes as long as some tokens
MOST = 32  # recorded passes of one text
FULL, SLIDING = "full_attention", "sliding_attention"  # blocks that see all, and a window of their own
ATEN = torch.ops.aten
COPIES = {ATEN._to_copy.default, ATEN.copy_.default}
WAITING = {
    getattr(ATEN, name).default
    for name in ("_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2")
}
LOUD = 100.0  # far more than a key's or a value's numbers
Replay = Callable[[], object]


class GraphStep:
    """Makes the logits after one token. Make it with `step_of`.

    records: whether passes are recorded; without it they are only made for that.
    """

    def __init__(self, model: PreTrainedModel, *, records: bool) -> None:
        self._model, self._records = model, records
        self._stream: torch.cuda.Stream | None = None
        children = (module.__dict__["_modules"] for module in model.modules())
        self._places: list[dict[str, nn.Module | None]] = [places for places in children if places]
        self._own = {id(module) for module in model.modules()}
        self._texts: WeakKeyDictionary[WindowCache, _Text] = WeakKeyDictionary()

    def __call__(self, token: int, position: int, cache: WindowCache) -> Tensor:
        """Run it on top of `cache`, which grows; [vocab]. Gradients must be switched off."""
        layers = cast("list[WindowLayer]", cache.layers)
        if not all(layer.is_initialized and layer.length for layer in layers):
            return usual(self._model, token, position, cache)
        for layer in layers:
            layer.grow()
        made = self._pass(cache)
        numbers = token, position, layers[0].first, layers[0].stop - 1
        logits = made(*numbers)
        if bool(logits.isnan().any()):  # the mask hides numbers alone: nothing else may be where nothing is
            for layer in layers:
                layer.clean()
            logits = made(*numbers)
        if self._records and made.replay is None and made.uses >= USES:
            self._record(made, logits)
        return logits

    def again(self, cache: WindowCache) -> Tensor:
        """The last pass of that text once more."""
        return next(reversed(self._texts[cache].passes.values())).again()

    def _pass(self, cache: WindowCache) -> "_Pass":
        """The one for what stands in the model and what is visible now."""
        layer = cast(WindowLayer, cache.layers[0])
        text = self._texts.get(cache)
        if text is None or text.keys is not layer.keys:
            text = self._texts[cache] = _Text(layer.keys)
        piece = piece_of(layer)
        key = (piece.start, piece.stop, *self._standing())
        made = text.passes.pop(key, None) or _Pass(self._model, cache, piece)
        text.passes[key] = made
        if len(text.passes) > MOST:
            text.passes.popitem(last=False)
        return made

    def _standing(self) -> list[int]:
        """What is run now: each module, and where its weights are."""
        found: list[int] = []
        for places in self._places:
            for module in places.values():
                if module is None:
                    continue
                found.append(id(module))
                known = id(module) in self._own
                for each in (module,) if known else module.modules():
                    own = each.__dict__["_parameters"].values()
                    found += [weight.data_ptr() for weight in own if weight is not None]
        return found

    def _record(self, made: "_Pass", logits: Tensor) -> None:
        """Record it, and see that it gives what it gave before; if that fails, nothing is recorded again."""
        try:
            self._stream = self._stream or torch.cuda.Stream()
            made.record(self._stream)
            reason = "" if _close(made.again(), logits) else "what was recorded computes something else"
        except RuntimeError as error:  # such as a model that waits for the GPU half-way
            reason = " ".join(str(error).split())[:200]
        if reason:
            made.replay, self._records = None, False
            warnings.warn(f"a token cannot be recorded, so writing is slower: {reason}", stacklevel=1)


class _Text:
    """What was made for one text. keys: the first block's buffer."""

    def __init__(self, keys: Tensor | None) -> None:
        self.keys = keys
        self.passes: OrderedDict[tuple[int, ...], _Pass] = OrderedDict()


class _Pass:
    """A pass over one token that sees one piece of the buffers. replay: of its graph, once there is one."""

    def __init__(self, model: PreTrainedModel, cache: WindowCache, piece: slice) -> None:
        self._model, self._start, self.uses = model, piece.start, 0
        self.replay: Replay | None = None
        self._logits = torch.empty(0)  # of the replay
        device = model.device
        self._numbers = torch.zeros(4, dtype=torch.long, device=device)
        self._columns = torch.arange(piece.stop - piece.start, device=device)
        layers = (FixedLayer(cast(WindowLayer, own), piece, self._numbers[3:]) for own in cache.layers)
        self._cache = Cache(layers=[*layers])

    def __call__(self, token: int, position: int, first: int, place: int) -> Tensor:
        """Logits after that token, [vocab], which goes to that place and sees all from `first` on."""
        self.uses += 1
        self._numbers.copy_(torch.tensor([token, position, first - self._start, place - self._start]))
        return self.again()

    def again(self) -> Tensor:
        """The same once more."""
        if self.replay is None:
            return self._run()
        self.replay()
        return self._logits.clone()

    def record(self, stream: torch.cuda.Stream) -> None:
        """Record it on a stream of its own, where it has run before, as libraries want."""
        now = torch.cuda.current_stream()
        stream.wait_stream(now)
        with torch.cuda.stream(stream):
            self._run()
        now.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        recording = torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local")
        with torch.cuda.stream(now), recording:  # the first: also if this fails half-way
            logits = self._run()
        self._logits, self.replay = logits, graph.replay

    def _run(self) -> Tensor:
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


@torch.no_grad()
def step_of(model: PreTrainedModel) -> GraphStep | None:
    """The short cut for this model on its GPU; None where there is none."""
    return GraphStep(model, records=True) if model.device.type == "cuda" and suits(model) else None


@torch.no_grad()
def suits(model: PreTrainedModel) -> bool:
    """Whether a pass of fixed shapes gives the model's logits, up to rounding: found out by trying it."""
    config = model.config.get_text_config()
    kind = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
    if kind in MOVING or kinds_of(config) - {FULL, SLIDING} or any(map(is_watched, model.modules())):
        return False
    attention = getattr(model.config, "_attn_implementation", "")
    if attention not in ("sdpa", "eager"):  # others take no such mask
        return False
    ids = [token % config.vocab_size for token in range(1, 8)]
    ours, theirs = WindowCache(16), WindowCache(16)
    try:
        for cache in (ours, theirs):
            places = torch.arange(6, device=model.device).unsqueeze(0)
            given = torch.tensor([ids[:6]], device=model.device)
            model(given, position_ids=places, **on_top_of(model, cache))
            cache.forget_before(3)
        for layer in ours.layers:  # what a mask must hide: whoever looks at it is far off
            assert isinstance(layer, WindowLayer)
            layer.clean(LOUD)
        step = GraphStep(model, records=False)
        made = step(ids[6], 6, ours)
        with _NoWaiting():
            step.again(ours)
        return _close(made, usual(model, ids[6], 6, theirs))
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, NotImplementedError):
        return False  # a model with masks or positions of its own, or one that waits for the GPU


class _NoWaiting(TorchDispatchMode):
    """While it is entered nothing may ask the device for a number, as nothing may that is recorded.

    By what torch runs, because a recording that fails half-way leaves torch's random generator unusable.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [each for each in args if isinstance(each, Tensor)]
        indices = args[1] if func is ATEN.index.Tensor else ()
        chosen = any(each is not None and each.dtype in (torch.bool, torch.uint8) for each in indices)
        made = func(*args, **(kwargs or {}))
        moved = func in COPIES and any(each.device != made.device for each in tensors)
        if func in WAITING or chosen or moved:
            raise RuntimeError(f"{func} waits for the device")
        return made


def kinds_of(config: Any) -> set[str]:
    """What its blocks see: all, the last so many tokens, or what is not known here."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return set(kinds)
    return {FULL if getattr(config, "sliding_window", None) is None else SLIDING}


def _close(one: Tensor, other: Tensor) -> bool:
    within = torch.finfo(one.dtype).eps ** 0.5 * float(other.abs().max())
    return bool(((one - other).abs() <= within).all())
