"""The temporary LoRA module of one text. PEFT is imported here alone.

PEFT builds the layers; between two passes the user's model is exactly as it was loaded, because the
layers stand in for the originals only inside `attached()` or `decoding()`. All weights live in one flat
fp32 tensor, so that a snapshot, a norm or an optimiser step is one operation.
"""

import copy
import re
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.functional import get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from templora.errors import OutputError, UnsupportedModel
from templora.recipe import Recipe

SLOT = "default"  # PEFT's name for the one adapter of a model
WEIGHTS = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."  # what PeftModel expects before each name
# A merged copy costs the memory of its layers once more; past this the side path is kept.
LARGEST_MERGED = 1 << 30  # bytes


@dataclass(slots=True)
class _Site:
    """One adapted linear layer: its place in the model, the original and the LoRA layer around it."""

    parent: nn.Module
    name: str
    original: nn.Module
    lora: Any
    merged: nn.Module | None = None

    @property
    def module(self) -> nn.Module:
        """What the model runs at this place now."""
        return self.parent._modules[self.name]  # pyright: ignore[reportPrivateUsage, reportReturnType]

    @module.setter
    def module(self, module: nn.Module) -> None:
        # Not setattr: this runs at each token, and nn.Module's checks cost more than the swap.
        self.parent._modules[self.name] = module  # pyright: ignore[reportPrivateUsage]


class Adapter:
    """A fresh adapter: its output is zero until it has learned something.

    version: 0 when fresh, one more with each update. a, b: all A and all B matrices, flat views of
    `flat`, which are what an optimiser steps; `gradient` is laid out as `flat`.
    """

    def __init__(self, model: PreTrainedModel, recipe: Recipe, seed: int) -> None:
        self.version = 0
        self._model = model
        self.config = LoraConfig(
            r=recipe.rank,
            lora_alpha=recipe.alpha,  # pyright: ignore[reportArgumentType]
            lora_dropout=recipe.dropout,
            use_rslora=recipe.rslora,
            target_modules=recipe.targets if isinstance(recipe.targets, str) else list(recipe.targets),
            fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
            exclude_modules=_lower_blocks(model, recipe.first_block),
            task_type="CAUSAL_LM",
            base_model_name_or_path=model.config.name_or_path,
        )
        self._sites = _inject(model, self.config, seed)
        self._lay_flat(model.device)
        self._merged_version: int | None = None
        self._can_merge = self._merging_pays()

    @property
    def parameters(self) -> int:
        """How many numbers it holds."""
        return self.flat.numel()

    @contextmanager
    def attached(self, *, training: bool = False) -> Generator[None]:
        """The model computes with the adapter, differentiably. training: apply LoRA dropout."""
        for site in self._sites:
            site.lora.lora_dropout[SLOT].train(training)
        with self._standing_in([site.lora for site in self._sites]):
            yield

    @contextmanager
    def decoding(self) -> Generator[None]:
        """The model computes with the adapter, without gradients, the fastest way that is exact.

        For an fp32 base this is a separate merged copy W + s·B·A; the base's tensors are not touched.
        """
        if not self._can_merge:
            with self.attached():
                yield
            return
        with self._standing_in(self._merged()):
            yield

    def snapshot(self) -> Tensor:
        """A copy of all weights, for `restore`."""
        return self.flat.clone()

    def restore(self, snapshot: Tensor, version: int) -> None:
        """Put weights and version back, bit for bit."""
        self.flat.copy_(snapshot)
        self.version, self._merged_version = version, None

    def updated(self) -> None:
        """Note that the weights have changed: a new version."""
        self.version += 1
        self._merged_version = None

    @torch.no_grad()
    def shrink(self, factor: float) -> None:
        """Move towards the base: all it adds is scaled by that factor. A new version."""
        self.b.mul_(factor)
        self.updated()

    def save(self, folder: str | Path) -> None:
        """Write it in PEFT's format: `PeftModel.from_pretrained(model, folder)` loads it.

        Raises:
            OutputError: the folder cannot be written.
        """
        with self.attached():
            self._model.peft_config = {SLOT: self.config}  # pyright: ignore[reportAttributeAccessIssue]
            try:
                state = get_peft_model_state_dict(self._model, adapter_name=SLOT)
            finally:
                del self._model.peft_config
        tensors = {PEFT_PREFIX + k: v.detach().cpu().contiguous() for k, v in state.items()}
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.config.save_pretrained(str(folder))
            save_file(tensors, Path(folder) / WEIGHTS, metadata={"format": "pt"})
        except OSError as error:
            raise OutputError(f"cannot save the adapter to {folder}: {error.strerror or error}") from error

    def load(self, folder: str | Path, version: int) -> None:
        """Take over weights that `save` wrote from an adapter of the same recipe and base."""
        stored = load_file(Path(folder) / WEIGHTS)
        names = {id(site.lora): name for name, site in self._named_sites()}
        with torch.no_grad():
            for site in self._sites:
                for part in ("lora_A", "lora_B"):
                    key = f"{PEFT_PREFIX}{names[id(site.lora)]}.{part}.weight"
                    getattr(site.lora, part)[SLOT].weight.copy_(stored[key])
        self.version, self._merged_version = version, None

    def discard(self) -> None:
        """Let go of all its tensors; the model keeps no trace of it."""
        self._sites, self._can_merge = [], False
        self.flat = self.gradient = torch.empty(0)
        self.a = self.b = nn.Parameter(self.flat)

    def _named_sites(self) -> Iterator[tuple[str, _Site]]:
        places = {(id(site.parent), site.name): site for site in self._sites}
        for prefix, parent in self._model.named_modules():
            for name in parent._modules:  # pyright: ignore[reportPrivateUsage]
                if site := places.get((id(parent), name)):
                    yield f"{prefix}.{name}", site

    @contextmanager
    def _standing_in(self, modules: Sequence[nn.Module]) -> Generator[None]:
        """One module for each site; afterwards what stood there before, so that this can nest."""
        before = [site.module for site in self._sites]
        for site, module in zip(self._sites, modules, strict=True):
            site.module = module
        try:
            yield
        finally:
            for site, module in zip(self._sites, before, strict=True):
                site.module = module

    def _lay_flat(self, device: torch.device) -> None:
        """Move all weights and gradients into two flat tensors, every A before every B."""
        parts = ("lora_A", "lora_B")
        weights = [[getattr(s.lora, part)[SLOT].weight for s in self._sites] for part in parts]
        split = sum(w.numel() for w in weights[0])
        total = split + sum(w.numel() for w in weights[1])
        self.flat = torch.empty(total, device=device)
        self.gradient = torch.zeros(total, device=device)
        offset = 0
        for weight in (*weights[0], *weights[1]):
            rows = slice(offset, offset + weight.numel())
            self.flat[rows] = weight.detach().float().reshape(-1)
            weight.data = self.flat[rows].view(weight.shape)
            weight.grad = self.gradient[rows].view(weight.shape)
            weight.requires_grad_()
            offset += weight.numel()
        self.a, self.b = nn.Parameter(self.flat[:split]), nn.Parameter(self.flat[split:])
        self.a.grad, self.b.grad = self.gradient[:split], self.gradient[split:]

    def _merging_pays(self) -> bool:
        weights = [getattr(site.original, "weight", None) for site in self._sites]
        exact = all(
            type(site.original) in (nn.Linear, Conv1D)
            and weight is not None
            and weight.dtype == torch.float32
            for site, weight in zip(self._sites, weights, strict=True)
        )
        return exact and sum(w.numel() * 4 for w in weights if w is not None) <= LARGEST_MERGED

    @torch.no_grad()
    def _merged(self) -> list[nn.Module]:
        """The merged copy of each layer, brought up to this version."""
        for site in self._sites:
            site.merged = site.merged or _twin(site.original)
            if self._merged_version == self.version:
                continue
            a, b = site.lora.lora_A[SLOT].weight, site.lora.lora_B[SLOT].weight
            left, right = (a.T, b.T) if isinstance(site.original, Conv1D) else (b, a)
            source, target = site.original.weight, site.merged.weight
            torch.addmm(source, left, right, alpha=site.lora.scaling[SLOT], out=target)  # pyright: ignore[reportCallIssue, reportArgumentType]
        self._merged_version = self.version
        return [site.merged for site in self._sites if site.merged is not None]


def _twin(layer: nn.Module) -> nn.Module:
    """The same layer with a weight of its own; everything else is shared."""
    twin = copy.copy(layer)
    own = dict(layer._parameters)  # pyright: ignore[reportPrivateUsage]
    own["weight"] = nn.Parameter(torch.empty_like(layer.weight), requires_grad=False)  # pyright: ignore[reportArgumentType]
    twin._parameters = own  # pyright: ignore[reportPrivateUsage]
    return twin


def _lower_blocks(model: PreTrainedModel, first_block: float) -> str | None:
    """A pattern for the names of all modules in the blocks below that share; None if there are none."""
    blocks = next(
        ((name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 0), None
    )
    if first_block == 0 or blocks is None:
        return None
    name, modules = blocks
    lower = round(first_block * len(modules))
    numbers = "|".join(str(number) for number in range(lower))
    return rf"{re.escape(name)}\.({numbers})\..*" if lower else None


def _inject(model: PreTrainedModel, config: LoraConfig, seed: int) -> list[_Site]:
    """Let PEFT wrap the target layers, then take its layers out and leave the model as it was."""
    originals: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
    needed = {p: p.requires_grad for p in model.parameters()}
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        try:
            _leave_out_experts(config, model)
            inject_adapter_in_model(config, model, SLOT)
        except ValueError as error:
            reason = " ".join(str(error).split())[:160]
            raise UnsupportedModel(
                f"no layers of {type(model).__name__} can carry LoRA ({reason}); "
                "set targets to its linear layers"
            ) from error
        finally:
            sites = _take_out(model, originals)
            for parameter, flag in needed.items():
                parameter.requires_grad_(flag)
    if not sites:
        raise UnsupportedModel(f"{type(model).__name__} has no linear layers that can carry LoRA")
    return sites


def _leave_out_experts(config: LoraConfig, model: PreTrainedModel) -> None:
    """Target modules only, never parameters: no dropout, no merged copy and no vLLM fit those.

    transformers 5 keeps the experts of a layer in one tensor, and PEFT turns targets of that name (all-linear
    among them) into LoRA on that tensor, of rank times the number of experts.
    """
    convert_peft_config_for_transformers(config, model, None)
    config.target_parameters = None
    config.rank_pattern, config.alpha_pattern = {}, {}


def _take_out(model: PreTrainedModel, originals: dict[str, nn.Module]) -> list[_Site]:
    sites: list[_Site] = []
    for path, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            parent, _, name = path.rpartition(".")
            sites.append(_Site(originals[parent], name, originals[path], module))
    for site in sites:
        site.module = site.original
    if hasattr(model, "peft_config"):
        del model.peft_config
    return sites
