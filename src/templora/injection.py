"""PEFT builds the LoRA layers; here they are taken out of the model again. PEFT is imported here alone.

Afterwards the user's model is exactly as it was loaded; whoever holds the sites decides when the layers stand
in for the originals.
"""

import re
import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from peft.functional import get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers  # pyright: ignore[reportPrivateUsage]
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from templora.errors import UnsupportedModel
from templora.recipe import Recipe
from templora.turns import random_state

SLOT = "default"  # PEFT's name for the one adapter of a model
PEFT_PREFIX = "base_model.model."  # what PeftModel expects before each name


@dataclass(slots=True)
class Site:
    """One adapted linear layer: its place in the model, the original and the LoRA layer around it."""

    parent: nn.Module
    name: str
    original: nn.Module
    lora: Any

    @property
    def module(self) -> nn.Module:
        """What the model runs at this place now."""
        return self.parent._modules[self.name]  # pyright: ignore[reportPrivateUsage, reportReturnType]

    @module.setter
    def module(self, module: nn.Module) -> None:
        # Not setattr: this runs at each token, and nn.Module's checks cost more than the swap.
        self.parent._modules[self.name] = module  # pyright: ignore[reportPrivateUsage]

    @property
    def a(self) -> nn.Parameter:
        """[rank, in]"""
        return self.lora.lora_A[SLOT].weight

    @property
    def b(self) -> nn.Parameter:
        """[out, rank]"""
        return self.lora.lora_B[SLOT].weight

    @property
    def scale(self) -> float:
        """What the side path is multiplied by."""
        return self.lora.scaling[SLOT]

    def train(self, training: bool) -> None:
        """Switch LoRA dropout on or off."""
        self.lora.lora_dropout[SLOT].train(training)


def config_of(model: PreTrainedModel, recipe: Recipe) -> LoraConfig:
    """PEFT's configuration of the recipe's adapter on this model."""
    text = _text_part(model)
    excluded = [*_beside(model, text), *_lower_blocks(model, text, recipe.first_block), *_odd_layers(model)]
    return LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=recipe.dropout,
        use_rslora=recipe.rslora,
        target_modules=recipe.targets if isinstance(recipe.targets, str) else list(recipe.targets),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        exclude_modules="|".join(excluded) or None,
        task_type="CAUSAL_LM",
        base_model_name_or_path=model.config.name_or_path,
    )


def inject(model: PreTrainedModel, config: LoraConfig, seed: int, *, head: float) -> list[Site]:
    """Let PEFT wrap the target layers, then take its layers out and leave the model as it was.

    Args:
        head: wrap the output layer as well, where it is a linear one, with that share of alpha; 0: do not.

    Raises:
        UnsupportedModel: it has no layers that can carry LoRA.
    """
    originals: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
    transposed = config.fan_in_fan_out
    needed = {p: p.requires_grad for p in model.parameters()}
    with random_state(model.device):
        torch.manual_seed(seed)
        try:
            _leave_out_experts(config, model)
            if head:
                _include_head(config, model, head)
            with warnings.catch_warnings():
                # An output layer that shares its weight with the input layer: neither weight is ever changed.
                warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
                # A linear head over Conv1D blocks: PEFT sets it right, layer by layer, and in the config.
                warnings.filterwarnings("ignore", message="fan_in_fan_out is set to True")
                inject_adapter_in_model(config, model, SLOT)
        except (ValueError, re.error) as error:
            raise _no_layers(model, " ".join(str(error).split())[:160]) from error
        finally:
            sites = _take_out(model, originals)
            config.fan_in_fan_out = transposed
            for parameter, flag in needed.items():
                parameter.requires_grad_(flag)
    if odd := next((site for site in sites if SLOT not in site.lora.lora_A), None):
        raise _no_layers(model, f"{odd.name} is a {type(odd.original).__name__}")
    if not sites or (head and all(site.original is model.get_output_embeddings() for site in sites)):
        raise _no_layers(model, "the targets name none")
    return sites


@contextmanager
def standing_in(sites: Sequence[Site], modules: Sequence[nn.Module]) -> Generator[None]:
    """One module for each site; afterwards what stood there before, so that this can nest."""
    before = [site.module for site in sites]
    try:
        _put(sites, modules)
        yield
    finally:
        try:
            _put(sites, before)
        except BaseException:  # an interrupt: the base must be bare all the same
            _put(sites, before)
            raise


def _put(sites: Sequence[Site], modules: Sequence[nn.Module]) -> None:
    for site, module in zip(sites, modules, strict=True):
        site.module = module


def weights(model: PreTrainedModel, config: LoraConfig) -> dict[str, Tensor]:
    """The adapter's tensors under PEFT's names; its layers must stand in the model."""
    model.peft_config = {SLOT: config}  # pyright: ignore[reportAttributeAccessIssue]
    try:
        # Not "auto", which adds the base's embeddings where the head learns.
        state = get_peft_model_state_dict(model, adapter_name=SLOT, save_embedding_layers=False)
    finally:
        del model.peft_config
    return {PEFT_PREFIX + k: v.detach().cpu().contiguous() for k, v in state.items()}


def named(model: PreTrainedModel, sites: Sequence[Site]) -> Iterator[tuple[str, Site]]:
    """Each site with PEFT's name for its layer."""
    places = {(id(site.parent), site.name): site for site in sites}
    for prefix, parent in model.named_modules():
        for name in parent._modules:  # pyright: ignore[reportPrivateUsage]
            if site := places.get((id(parent), name)):
                yield PEFT_PREFIX + (f"{prefix}.{name}" if prefix else name), site


def _no_layers(model: PreTrainedModel, reason: str) -> UnsupportedModel:
    kind = type(model).__name__
    return UnsupportedModel(
        f"no layers of {kind} can carry LoRA ({reason}); set targets to its linear layers"
    )


def _odd_layers(model: PreTrainedModel) -> list[str]:
    """Patterns for the names of what is a linear layer by kind alone: a router that returns a tuple."""
    return [
        re.escape(name)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and type(module).__module__.startswith("transformers.models.")
        and type(module).forward is not nn.Linear.forward
        and not _gives_a_tensor(module)
    ]


@torch.no_grad()
def _gives_a_tensor(layer: nn.Linear) -> bool:
    """By what it does: Falcon's linear layers are of a class of their own, too."""
    try:
        return isinstance(layer(layer.weight.new_zeros(1, layer.in_features)), Tensor)
    except (TypeError, RuntimeError, ValueError):  # it wants something else
        return False


def _text_part(model: PreTrainedModel) -> str:
    """The name of what writes in a model that also sees or hears, such as Gemma 3; "" where that is all."""
    if model.config.get_text_config() is model.config:
        return ""
    decoder = model.get_decoder()
    return next((name for name, module in model.named_modules() if module is decoder), "")


def _beside(model: PreTrainedModel, text: str) -> list[str]:
    """A pattern for the names of all modules but those of the part that writes, and the output layer."""
    head = model.get_output_embeddings()
    names = [text, *(name for name, module in model.named_modules() if module is head)]
    return [rf"(?!({'|'.join(map(re.escape, names))})(\.|$)).*"] if text else []


def _lower_blocks(model: PreTrainedModel, text: str, first_block: float) -> list[str]:
    """A pattern for the names of all modules in that part's blocks below that share, if there are any."""
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 0]
    blocks = next(((name, m) for name, m in lists if not text or name.startswith(f"{text}.")), None)
    if first_block == 0 or blocks is None:
        return []
    name, modules = blocks
    lower = round(first_block * len(modules))
    numbers = "|".join(str(number) for number in range(lower))
    return [rf"{re.escape(name)}\.({numbers})\..*"] if lower else []


def _leave_out_experts(config: LoraConfig, model: PreTrainedModel) -> None:
    """Target modules only, never parameters: no dropout, no merged copy and no vLLM fit those.

    transformers 5 keeps the experts of a layer in one tensor, and PEFT turns targets of that name (all-linear
    among them) into LoRA on that tensor, of rank times the number of experts.
    """
    convert_peft_config_for_transformers(config, model, None)
    config.target_parameters = None
    config.rank_pattern, config.alpha_pattern = {}, {}


def _include_head(config: LoraConfig, model: PreTrainedModel, share: float) -> None:
    """Add the output layer to the targets; PEFT's "all-linear" leaves it out."""
    head = model.get_output_embeddings()
    name = next((name for name, module in model.named_modules() if module is head), None)
    if name is None or not isinstance(head, nn.Linear):
        return
    _maybe_include_all_linear_layers(config, model)
    targets = config.target_modules
    if isinstance(targets, str):
        config.target_modules = rf"({targets})|{re.escape(name)}"
    else:
        config.target_modules = sorted({*(targets or ()), name})
    config.alpha_pattern = {re.escape(name): config.lora_alpha * share}


def _take_out(model: PreTrainedModel, originals: dict[str, nn.Module]) -> list[Site]:
    sites: list[Site] = []
    for path, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            parent, _, name = path.rpartition(".")
            sites.append(Site(originals[parent], name, originals[path], module))
    for site in sites:
        site.module = site.original
    if hasattr(model, "peft_config"):
        del model.peft_config
    return sites
