"""The temporary LoRA module of one text.

Between two passes the user's model is exactly as it was loaded, because the adapter's layers stand in for the
originals only inside `attached()` or `decoding()`. All weights live in one flat fp32 tensor, so that a
snapshot, a norm or an optimiser step is one operation.
"""

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from templora import injection
from templora.errors import InvalidRecipe, ModelNotFound, OutputError, SessionClosed, TemploraError
from templora.gated_mlp import GatedMlp, gated_mlps
from templora.injection import Site, standing_in
from templora.lora_linear import LoraBeside, LoraLinear
from templora.merging import Fleeting, MergedCopy, can_merge
from templora.probe import Watch, is_watched
from templora.recipe import Recipe
from templora.start import begin
from templora.turns import turn

WEIGHTS = "adapter_model.safetensors"


class Adapter:
    """The adapter of one text. Fresh, it adds nothing, or what a learned start says.

    version: 0 when fresh, one more with each update. a, b: all A and all B matrices, flat views of
    `flat`, which are what an optimiser steps; `gradient` is laid out as `flat`. sites: where it works. turn:
    held while it stands in. start: of the base, for recipes that want it. squares: what it says of the mean
    squares of the gradients of `a` and of `b`, laid out as they are; None if nothing. layers_b: each layer's
    B, [out, rank], and its gradient, views as well. can_merge: see `merging`. folder: of the session that
    computes it again when it is resumed, and so would lose what is loaded into it; None: in memory.
    """

    folder: Path | None = None

    def __init__(
        self, model: PreTrainedModel, recipe: Recipe, seed: int, start: Mapping[str, Tensor] | None = None
    ) -> None:
        self.version = 0
        self._model, self.turn = model, turn(model)
        with self.turn:
            self._make(recipe, seed, start or {})

    def _make(self, recipe: Recipe, seed: int, start: Mapping[str, Tensor]) -> None:
        model = self._model
        self.config = injection.config_of(model, recipe)
        self.sites = injection.inject(model, self.config, seed, head=recipe.head)
        # Where nothing is learned, nothing is begun: base and adapter are one.
        begins = recipe.start == "learned" and recipe.learning_rate > 0
        known = begin(model, self.sites, start if begins else {}, recipe.chunk)
        self._lay_flat(model.device)
        self.squares = (
            None if known is None else (_squares(a for a, _ in known), _squares(b for _, b in known))
        )
        self._watched = Watch(site.original for site in self.sites)
        self._drops = recipe.dropout > 0
        self._layers = [site.lora if self._drops else _layer(site) for site in self.sites]
        lean = any(isinstance(layer, LoraLinear) for layer in self._layers)
        self._mlps = list(gated_mlps(model, self.sites)) if lean else []
        self._lean = [GatedMlp(site.original) for site in self._mlps]
        self.can_merge = can_merge(self.sites)
        self._merged: MergedCopy | None = None
        self._fleeting = [Fleeting(site) for site in self.sites] if self.can_merge else []

    @property
    def parameters(self) -> int:
        """How many numbers it holds."""
        return self.flat.numel()

    @contextmanager
    def attached(self, *, training: bool = False) -> Generator[None]:
        """The model computes with the adapter, differentiably. training: apply LoRA dropout."""
        with self.turn:
            if self._drops:
                for site in self.sites:
                    site.train(training)
            with self._standing(self._layers), standing_in(self._mlps, self._lean):
                yield

    @contextmanager
    def decoding(self, *, once: bool = False) -> Generator[None]:
        """The model computes with the adapter, without gradients, the fastest way that is exact.

        For an fp32 base this is a merged copy; the base's tensors are not touched.

        Args:
            once: for one pass over many tokens, with none to follow: where there is no copy yet, each layer
                is merged on its own when it runs, which computes the same and takes no memory.
        """
        if not self.can_merge:
            with self.attached():
                yield
            return
        if once and self._merged is None:
            layers = self._fleeting
        else:
            self._merged = self._merged or MergedCopy(self.sites)
            layers = self._merged.of(self.version)
        if self._drops and self._watched():
            for site in self.sites:
                site.train(False)
        with self._standing(layers):
            yield

    @contextmanager
    def detached(self) -> Generator[None]:
        """The model computes without the adapter, also inside `attached`."""
        with self.turn, standing_in(self.sites, [site.original for site in self.sites]):
            yield

    def snapshot(self) -> Tensor:
        """A copy of all weights, for `restore`."""
        return self.flat.clone()

    def restore(self, snapshot: Tensor, version: int) -> None:
        """Put weights and version back, bit for bit."""
        self.flat.copy_(snapshot)
        self._set_version(version)

    def updated(self) -> None:
        """Note that the weights have changed: a new version."""
        self._set_version(self.version + 1)

    @torch.no_grad()
    def shrink(self, factor: float) -> None:
        """Move towards the base: all it adds is scaled by that factor. A new version."""
        self.b.mul_(factor)
        self.updated()

    def move(self, flat: Tensor, gradient: Tensor) -> None:
        """Keep weights and gradients in these tensors, [parameters] each, from now on.

        So that adapters of several texts can lie in one tensor; an optimiser notices nothing.
        """
        flat.copy_(self.flat)
        gradient.copy_(self.gradient)
        self.flat, self.gradient = flat, gradient
        self._hold()

    def save(self, folder: str | Path) -> None:
        """Write it in PEFT's format: `PeftModel.from_pretrained(model, folder)` loads it.

        Raises:
            OutputError: the folder cannot be written. SessionClosed: it was discarded.
        """
        self._check_kept()
        with self.turn, standing_in(self.sites, [site.lora for site in self.sites]):
            tensors = injection.weights(self._model, self.config)
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.config.save_pretrained(str(folder))
            save_file(tensors, Path(folder) / WEIGHTS, metadata={"format": "pt"})
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise OutputError(
                f"cannot save the adapter to {folder}: {reason}; choose another folder"
            ) from error

    @torch.no_grad()
    def load(self, folder: str | Path, version: int) -> None:
        """Take over weights that `save` wrote from an adapter of the same recipe and base.

        Raises:
            ModelNotFound: they cannot be read. InvalidRecipe: they are of other layers or of another rank.
            SessionClosed: this adapter was discarded. TemploraError: it is that of a session on disk.
        """
        if self.folder is not None:
            raise TemploraError(f"{self.folder} keeps its own adapter; load into a session without dir=…")
        self.read(folder, version)

    @torch.no_grad()
    def read(self, folder: str | Path, version: int) -> None:
        """`load`, also for a session on disk, whose history says that it was so."""
        self._check_kept()
        try:
            # PEFT adds the base's embeddings to what it saves where the head learns.
            stored = {k: v for k, v in load_file(Path(folder) / WEIGHTS).items() if ".lora_" in k}
        except (OSError, SafetensorError) as error:
            raise ModelNotFound(f"cannot read {Path(folder) / WEIGHTS}: {error}; choose another") from error
        with self.turn:  # what stands in for a while hides the names of what it stands for
            own = {
                f"{name}.lora_{side}.weight": weight
                for name, site in injection.named(self._model, self.sites)
                for side, weight in (("A", site.a), ("B", site.b))
            }
        if {k: v.shape for k, v in stored.items()} != {k: v.shape for k, v in own.items()}:
            raise InvalidRecipe(
                f"the adapter in {folder} has other layers or another rank; use the recipe it was learned by"
            )
        for name, weight in own.items():
            weight.copy_(stored[name])
        self._set_version(version)

    def discard(self) -> None:
        """Let go of all its tensors; the model keeps no trace of it."""
        self.sites, self._layers, self._mlps, self._lean, self._fleeting = [], [], [], [], []
        self._watched = Watch([])
        self._merged, self.can_merge, self.squares = None, False, None
        self.flat = self.gradient = torch.empty(0)
        self.a = self.b = nn.Parameter(self.flat)
        self.layers_b = [], []

    def _check_kept(self) -> None:
        if not self.sites:
            raise SessionClosed("this adapter was discarded with its session; save it before that")

    @contextmanager
    def _standing(self, layers: Sequence[nn.Module]) -> Generator[None]:
        """These stand in; but where someone watches the model's own layer, PEFT's does, which calls it."""
        if self._watched():
            pairs = zip(self.sites, layers, strict=True)
            layers = [site.lora if is_watched(site.original) else layer for site, layer in pairs]
        with self.turn, standing_in(self.sites, layers):
            yield

    def _set_version(self, version: int) -> None:
        """The weights have changed, and are that version now."""
        self.version = version
        if self._merged is not None:
            self._merged.expire()

    def _lay_flat(self, device: torch.device) -> None:
        """Move all weights and gradients into two flat tensors, every A before every B."""
        weights = self._weights()
        self.flat = torch.cat([weight.detach().float().reshape(-1).to(device) for weight in weights])
        self.gradient = torch.zeros_like(self.flat)
        self.a, self.b = nn.Parameter(self.flat[:0]), nn.Parameter(self.flat[:0])
        self._hold()
        for weight in weights:
            weight.requires_grad_()

    def _hold(self) -> None:
        """Make all weights and gradients views of `flat` and `gradient`."""
        offset = 0
        for weight in self._weights():
            rows = slice(offset, offset + weight.numel())
            weight.data = self.flat[rows].view(weight.shape)
            weight.grad = self.gradient[rows].view(weight.shape)
            offset += weight.numel()
        split = sum(site.a.numel() for site in self.sites)
        for both, rows in ((self.a, slice(split)), (self.b, slice(split, None))):
            both.grad = None  # of the shape before
            both.data = self.flat[rows]
            both.grad = self.gradient[rows]
        of_b = [site.b for site in self.sites]
        self.layers_b = [b.detach() for b in of_b], [b.grad for b in of_b if b.grad is not None]

    def _weights(self) -> list[nn.Parameter]:
        return [site.a for site in self.sites] + [site.b for site in self.sites]


def _squares(roots: Iterable[Tensor]) -> Tensor:
    """Of matrices of any shapes, in one flat tensor."""
    return torch.cat([root.float().reshape(-1) for root in roots]).square()


def _layer(site: Site) -> nn.Module:
    """What computes with the adapter where there is no dropout, in place of PEFT's layer."""
    layer = site.original
    if type(layer) is nn.Linear and layer.weight.dtype in (torch.float32, torch.bfloat16, torch.float16):
        return LoraLinear(layer, site.a, site.b, site.scale)
    return LoraBeside(layer, site.a, site.b, site.scale)
