"""Where the adapters of a base begin, and how large their gradients are: a file beside its weights.

For layers by name: `NAME.lora_A.weight`, rows of A, [rows, in]; `NAME.lora_B.weight`, columns of B as for
a scale of 1, [out, rows]; `NAME.lora_A.rms` and `NAME.lora_B.rms`, of the same shapes, the least that Adam
divides a gradient by, whatever this text says, for chunks of 64 tokens. B means nothing without A, and the
last two count only where each layer has both. `recipes/pretrain/start.py` and `meta_start.py` make it.
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
A, B, RMS_A, RMS_B = ".lora_A.weight", ".lora_B.weight", ".lora_A.rms", ".lora_B.rms"
CHUNK = 64  # tokens whose mean the gradients are that RMS_A and RMS_B speak of


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
def begin(
    model: PreTrainedModel, sites: Sequence[Site], start: Mapping[str, Tensor], chunk: int = CHUNK
) -> list[tuple[Tensor, Tensor]] | None:
    """Put the learned rows in place of random ones into each A, as many as it has, and columns into its B.

    Returns:
        For each site the expected root mean square of the gradients of A, [rank, in], and B, [out, rank], for
        chunks of that many tokens; None unless they are known of all.
    """
    noise = (CHUNK / chunk) ** 0.5  # gradients are mostly that, and it falls as in any mean
    layers = {id(site): name.removeprefix(PEFT_PREFIX) for name, site in named(model, sites)}
    known: list[tuple[Tensor, Tensor]] = []
    for site in sites:
        layer = layers[id(site)]
        rows, columns, rms_a, rms_b = (start.get(layer + kind) for kind in (A, B, RMS_A, RMS_B))
        if rows is None or rows.shape[1] != site.a.shape[1]:
            continue
        like_b, count = (len(site.b), len(rows)), min(len(rows), len(site.a))
        site.a[:count] = rows[:count].to(site.a)
        if columns is not None and columns.shape == like_b:
            site.b[:, :count] = columns[:, :count].to(site.b) / site.scale
        if rms_a is None or rms_b is None or count < len(site.a):
            continue
        if rms_a.shape == rows.shape and rms_b.shape == like_b:
            of_a, of_b = rms_a[:count].to(site.a), rms_b[:, :count].to(site.b)
            known.append((noise * of_a, noise * site.scale * of_b))
    return known if sites and len(known) == len(sites) else None
