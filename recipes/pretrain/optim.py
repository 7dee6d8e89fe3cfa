"""Muon for the matrices of the blocks, AdamW for the embedding and the norms."""

from __future__ import annotations

import torch
from config import PretrainConfig
from torch import nn


class Optimizers:
    """The two optimisers of a model as one: rates scale together, state saves together."""

    def __init__(self, model: nn.Module, config: PretrainConfig) -> None:
        named = list(model.named_parameters())
        # The tied embedding is a table of rows, not a map: orthogonal updates do not suit it.
        matrices = [p for n, p in named if p.ndim == 2 and "embed_tokens" not in n]
        chosen = {id(p) for p in matrices}
        others = [p for _, p in named if id(p) not in chosen]
        self._parameters = [p for _, p in named]
        self._clip = config.clip
        self._muon = torch.optim.Muon(
            matrices, lr=config.muon_rate, weight_decay=config.weight_decay, momentum=0.95
        )
        self._adamw = torch.optim.AdamW(others, lr=config.adam_rate, betas=(0.9, 0.95), weight_decay=0.0)
        self._peaks = (config.muon_rate, config.adam_rate)

    def step(self, factor: float) -> float:
        """Clip, update with the peak rates times `factor`, clear; return the gradient's norm."""
        norm = nn.utils.clip_grad_norm_(self._parameters, self._clip)
        for optimizer, peak in zip((self._muon, self._adamw), self._peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def state_dict(self) -> dict:
        """Return both states, for a checkpoint."""
        return {"muon": self._muon.state_dict(), "adamw": self._adamw.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Take over what `state_dict` returned."""
        self._muon.load_state_dict(state["muon"])
        self._adamw.load_state_dict(state["adamw"])
