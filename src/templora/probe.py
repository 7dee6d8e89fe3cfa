"""What can be known of a model only by running it: six passes over four tokens.

A model that cannot carry an adapter is refused here, with the reason, before any work starts.
"""

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from templora.cache import WindowCache, on_top_of
from templora.errors import TemploraError, UnsupportedModel

TOKENS = 4
PACKS = "support_avx512bf16_for_cpu"  # of bitsandbytes' layers
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True, slots=True)
class Probe:
    """plain_head: logits are exactly head(hidden states), so they can be made a piece at a time."""

    backbone: nn.Module
    plain_head: bool


def probe(model: PreTrainedModel) -> Probe:
    """Try the model.

    Raises:
        UnsupportedModel: no causal LM, no key/value cache, or one that does not continue exactly.
    """
    kind = type(model).__name__
    head = model.get_output_embeddings()
    if model.config.is_encoder_decoder or head is None:
        raise UnsupportedModel(f"{kind} is not a decoder-only causal LM; choose one that is")
    if any(name.rpartition(".")[2].startswith("lora_") for name, _ in model.named_modules()):
        raise UnsupportedModel(f"{kind} already carries a LoRA adapter; call merge_and_unload() first")
    if any(type(module).__module__.startswith("peft.") for module in model.modules()):
        raise UnsupportedModel(f"{kind} already carries an adapter of PEFT's; take it out first")
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise UnsupportedModel(f"{kind} was made inside torch.inference_mode(); load it outside")
    if getattr(model, "_is_stateful", False):
        raise UnsupportedModel(f"{kind} keeps a recurrent state, not keys and values; choose a transformer")
    if len(devices := {str(parameter.device) for parameter in model.parameters()}) > 1:
        raise UnsupportedModel(f"{kind} lies on {', '.join(sorted(devices))}; load all of it on one device")
    _keep_differentiable(model, kind)
    with torch.no_grad():
        return Probe(model.base_model, _try(model, head, kind))


def refuse_modes(device: torch.device) -> None:
    """See that learning can work where the caller is.

    Raises:
        TemploraError: inside torch's inference mode or autocast.
    """
    if torch.is_inference_mode_enabled():
        raise TemploraError("nothing can be learned inside torch.inference_mode(); use no_grad instead")
    if torch.is_autocast_enabled(device.type):
        raise TemploraError("an adapter learns in fp32; leave torch.autocast()")


def is_watched(module: nn.Module) -> bool:
    """Whether someone has put a hook on it, or a `forward` of its own: then it must be called as it is."""
    own = module.__dict__
    return "forward" in own or any(own[kind] for kind in HOOKS)


class Watch:
    """`is_watched` of any of these modules, cheap enough to be asked at each token."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._modules = [module.__dict__ for module in modules]
        self._hooks = [own[kind] for own in self._modules for kind in HOOKS]

    def __call__(self) -> bool:
        """Whether any of them is."""
        return any(self._hooks) or any("forward" in own for own in self._modules)


def _keep_differentiable(model: PreTrainedModel, kind: str) -> None:
    """Keep bitsandbytes from packing 4 bits anew, as it does on CPUs with AVX-512 BF16 when a layer runs.

    No gradient passes through that form, and the base's bytes would be others than those that were loaded.
    """
    for layer in (module for module in model.modules() if getattr(module, PACKS, False)):
        if getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise UnsupportedModel(
                f"{kind} was run in 4 bits on this CPU before, which has left it in a form that has no"
                " gradients; load it afresh"
            )
        setattr(layer, PACKS, False)


def _try(model: PreTrainedModel, head: nn.Module, kind: str) -> bool:
    ids = (
        torch.arange(1, TOKENS + 1, device=model.device).unsqueeze(0)
        % model.config.get_text_config().vocab_size
    )
    cache: Any = WindowCache(TOKENS)
    whole: Tensor = model(ids, use_cache=False).logits[0]  # [4, vocab]
    other = torch.cat((ids[:, :-1], torch.zeros_like(ids[:, -1:])), dim=1)
    # The same shapes run the same kernels, so next to nothing may differ.
    exact = torch.finfo(whole.dtype).eps ** 0.5
    if not _close(model(other, use_cache=False).logits[0, :-1], whole[:-1], exact):
        cure = (
            "; in 8 bits outliers are shared: load it in 4" if getattr(model, "is_quantized", False) else ""
        )
        raise UnsupportedModel(f"{kind} is not causal: a token changes what came before it{cure}")
    try:
        before = model(ids[:, :-1], **on_top_of(model, cache)).logits[0]
        after = model(ids[:, -1:], **on_top_of(model, cache)).logits[0]
    except (AttributeError, TypeError, ValueError, NotImplementedError, IndexError) as error:
        raise UnsupportedModel(
            f"{kind} cannot use a key/value cache ({error}); choose another model"
        ) from error
    if cache.stop != TOKENS:
        raise UnsupportedModel(f"{kind} keeps no keys and values; choose a transformer")
    if not _close(torch.cat((before, after)), whole, 0.05):
        raise UnsupportedModel(f"{kind} does not continue from its cache as it does in one pass")
    if not _takes_positions(model, ids, whole, cache):
        cure = "choose another model, or name position_ids in its forward"
        raise UnsupportedModel(f"{kind} counts positions in a way of its own; {cure}")
    hidden = getattr(model.base_model(ids, use_cache=False), "last_hidden_state", None)
    return hidden is not None and torch.equal(head(hidden)[0], whole)


def _takes_positions(model: PreTrainedModel, ids: Tensor, whole: Tensor, cache: Any) -> bool:
    """Whether positions are those that it is told, from 0; or, where it is told none, only distances.

    whole: its logits, [4, vocab]. cache: of all tokens. By the first block's keys, which hold nothing else.
    """
    exact = torch.finfo(whole.dtype).eps ** 0.5
    if "position_ids" in inspect.signature(model.forward).parameters:
        places = torch.arange(TOKENS, device=ids.device).unsqueeze(0)
        return _close(model(ids, position_ids=places, use_cache=False).logits[0], whole, exact)
    alone: Any = WindowCache(1)
    model(ids[:, -1:], **on_top_of(model, alone))
    return _close(alone.layers[0].keys[:, :, 0], cache.layers[0].keys[:, :, TOKENS - 1], exact)


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    scale = b.float().abs().max().item()
    return torch.allclose(a.float(), b.float(), rtol=tolerance, atol=tolerance * max(scale, 1e-6))
