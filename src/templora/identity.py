"""What makes a base this one and no other: checksums of its tensors and of its tokenizer."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from templora.loading import EMBEDDED

if TYPE_CHECKING:
    from templora.base import Base


def of_base(base: "Base") -> dict[str, Any]:
    """As `Base.describe`."""
    with base.turn:
        parameters = list(base.model.parameters())
    # A folder of that name is not what the embedded base was loaded from.
    is_path = base.name not in ("", EMBEDDED) and Path(base.name).exists()
    return {
        "name": str(Path(base.name).resolve()) if is_path else base.name,
        "model": type(base.model).__name__,
        "dtype": base.dtype,
        "parameters": sum(parameter.numel() for parameter in parameters),
        "positions": base.positions,
        "weights": base.fingerprint(),
        **of_tokenizer(base.tokenizer if base.has_tokenizer else None),
        **({"start": of_tensors(base.start.items())} if base.start else {}),
    }


def of_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, whatever their order."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def of_tokenizer(tokenizer: PreTrainedTokenizerBase | None) -> dict[str, str | None]:
    """SHA-256 over its rules, under `tokenizer`; None where there is none.

    How far its last call padded and cut is no rule, though it stands among them; what the sum was with that
    is under `tokenizer_then`, for sessions of old.
    """
    fast: Any = getattr(tokenizer, "backend_tokenizer", None)
    if tokenizer is None or fast is None:
        rules = None if tokenizer is None else repr(sorted(tokenizer.get_vocab().items()))
        return {"tokenizer": None if rules is None else _sum(rules)}
    rules = fast.to_str()
    if fast.padding is None and fast.truncation is None:
        return {"tokenizer": _sum(rules)}
    own = type(fast).from_str(rules)
    own.no_padding()
    own.no_truncation()
    return {"tokenizer": _sum(own.to_str()), "tokenizer_then": _sum(rules)}


def _sum(rules: str) -> str:
    return hashlib.sha256(rules.encode()).hexdigest()
