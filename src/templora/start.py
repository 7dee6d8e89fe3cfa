"""Where the adapters of a base begin, and how fast the rows of their B learn: a file beside its weights.

For layers by name: `NAME.lora_A.weight`, rows of A, [rows, in]; `NAME.lora_B.weight`, columns of B as for
a scale of 1, [out, rows]; `NAME.b_rate`, by what the rate of each row of B is multiplied, [out]. Each is
optional, but B means nothing without A. `recipes/pretrain/start.py` and `meta_start.py` make it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from templora.errors import ModelNotFound
from templora.injection import PEFT_PREFIX, Site, named

FILE = "start.safetensors"
A, B, B_RATE = ".lora_A.weight", ".lora_B.weight", ".b_rate"


def read(folder: str) -> dict[str, Tensor]:
    """What a base's folder says of it; empty where there is no such file.

    Raises:
        ModelNotFound: it is damaged.
    """
    path = Path(folder) / FILE
    if not folder or not path.is_file():
        return {}
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelNotFound(f"cannot read {path}: {error}; restore it, or remove it to do without") from error


@torch.no_grad()
def begin(model: PreTrainedModel, sites: Sequence[Site], start: Mapping[str, Tensor]) -> list[Tensor | None]:
    """Put the learned rows in place of random ones into each A, as many as it has, and columns into its B.

    Returns:
        For each site the factors of its B's rate, [out, 1], or None.
    """
    layers = {id(site): name.removeprefix(PEFT_PREFIX) for name, site in named(model, sites)}
    factors: list[Tensor | None] = []
    for site in sites:
        layer = layers[id(site)]
        rows, columns, rates = (start.get(layer + kind) for kind in (A, B, B_RATE))
        if rows is not None and rows.shape[1] == site.a.shape[1]:
            count = min(len(rows), len(site.a))
            site.a[:count] = rows[:count].to(site.a)
            if columns is not None and columns.shape == (len(site.b), len(rows)):
                site.b[:, :count] = columns[:, :count].to(site.b) / site.scale
        fits = rates is not None and len(rates) == len(site.b)
        factors.append(rates.to(site.b)[:, None] if rates is not None and fits else None)
    return factors
