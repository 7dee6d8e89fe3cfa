"""The files of a version: the adapter as PEFT reads it, and beside it all else that computing depends on."""

import io
from pathlib import Path
from typing import Any

import torch

from templora.study import Study

STATE = "state.pt"


def write(folder: Path, study: Study, chunk: int) -> None:
    """Store adapter, optimiser, guard and caches. chunk: the one that comes next.

    Raises:
        OSError, OutputError, SafetensorError: they cannot be written.
    """
    study.adapter.save(folder)
    state = study.state()
    if torch.equal(state["weights"], state["good"][0]):
        state["good"] = (None, state["good"][1])
    del state["weights"]  # PEFT's file holds them
    _leave_out_old_keys(state["passes"], chunk if study.recipe.cache == "recompute" else None)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with (folder / STATE).open("wb") as file:
        file.write(buffer.getbuffer())


def read(folder: Path, study: Study, version: int) -> None:
    """Continue from what `write` stored. version: the adapter's. The files must have been checked."""
    state: dict[str, Any] = torch.load(folder / STATE, map_location="cpu", weights_only=True)
    study.adapter.read(folder, version)
    state["weights"] = study.adapter.snapshot()
    good, number = state["good"]
    state["good"] = (state["weights"] if good is None else good.to(study.adapter.flat.device), number)
    study.load_state(state)


def _leave_out_old_keys(passes: dict[str, Any], chunk: int | None) -> None:
    """Keys that were given up are never looked at again, nor, if `chunk` is named, those of another chunk."""
    for decoder in passes.values():
        if decoder["chunk"] is None or (chunk is not None and decoder["chunk"] != chunk):
            decoder["chunk"], decoder["cache"]["layers"] = None, []
