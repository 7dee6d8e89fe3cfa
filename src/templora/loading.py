"""Finding and reading a pretrained model, with errors that say what to do about it."""

import re
import textwrap
from collections.abc import Callable
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from templora.errors import MissingExtra, ModelNotFound, OutOfMemory, UnsupportedModel

EMBEDDED = "novelist"
FOUR_BITS = "4bit"  # among dtypes, as the kind of number that a base is loaded in
# fp32 costs twice the memory but runs faster than bf16 on most CPUs, and merges exactly.
LARGEST_FP32_ON_CPU = 2_000_000_000  # parameters


def load_pretrained(
    name: str, dtype: str | None, device: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of that name; see `templora.load`."""
    place, target = _place(name), _device(device)
    config = _read(name, AutoConfig.from_pretrained, place)
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and "AutoModelForCausalLM" not in (
        getattr(config, "auto_map", None) or {}
    ):
        raise UnsupportedModel(
            f"{name} is a {config.model_type} model, not a causal LM; choose one that writes text"
        )
    tokenizer = _read(name, AutoTokenizer.from_pretrained, place)
    quantized = getattr(config, "quantization_config", None) is not None
    how: dict[str, Any] = {"dtype": "auto" if dtype == FOUR_BITS else _dtype(dtype)}
    if dtype == FOUR_BITS and not quantized:
        how = _four_bits(target)
    if dtype == FOUR_BITS or quantized:  # what is quantised is put in its place while it is read
        how["device_map"] = {"": target}
    try:
        model = _read(name, AutoModelForCausalLM.from_pretrained, place, **how)
        return (model if "device_map" in how else _moved(model, dtype, target)), tokenizer
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(
            f"{name} does not fit on {target}; choose a smaller model, --dtype bfloat16 or {FOUR_BITS}"
        ) from error


def _four_bits(device: str) -> dict[str, Any]:
    """How to read a model's linear layers into NF4, as QLoRA does (arXiv 2305.14314)."""
    if not find_spec("bitsandbytes"):
        raise MissingExtra('--dtype 4bit needs bitsandbytes; say: pip install "templora[quantize]"')
    computes = torch.float32 if device == "cpu" else torch.bfloat16
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=computes)
    return {"quantization_config": config, "dtype": computes}


def _moved(model: PreTrainedModel, dtype: str | None, device: str) -> PreTrainedModel:
    model = model.to(device)  # pyright: ignore[reportArgumentType, reportCallIssue]
    small = model.num_parameters() <= LARGEST_FP32_ON_CPU
    return model.float() if dtype is None and device == "cpu" and small else model


def _place(name: str) -> str:
    if name == EMBEDDED:
        return str(resources.files("templora") / "models" / EMBEDDED)
    # A hub id is a name, or owner/name.
    looks_local = name.startswith((".", "/", "~")) or name.rstrip("/").count("/") > 1
    folder = Path(name).expanduser()
    if looks_local and not folder.is_dir():
        raise ModelNotFound(f"no folder {name}; give a folder that holds config.json, or a hub id")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ModelNotFound(f"{name} holds no config.json; give the folder of a Hugging Face model")
    return str(folder) if folder.is_dir() else name


def _device(name: str | None) -> str:
    """The device of that name, or the best there is; refused before a model is read."""
    target = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UnsupportedModel(f"cannot use device {target!r} ({reason}); choose cpu or cuda") from error
    return target


def _dtype(name: str | None) -> str | torch.dtype:
    if name is None or name == "auto":
        return "auto"
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise UnsupportedModel(f"no dtype {name!r}; choose float32, bfloat16, float16 or {FOUR_BITS}")
    return dtype


def _read(name: str, reader: Callable[..., Any], place: str, **kwargs: object) -> Any:
    """Call one of transformers' readers; whatever it raises becomes a `ModelNotFound` in one line."""
    try:
        return reader(place, **kwargs)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a damaged file, a missing library or a wrong config: each raises its own
        words = re.sub(r"'?https?://\S+", "the hub", str(error))
        reason = textwrap.shorten(words, 200, placeholder=" …")
        cure = f"the embedded base is {EMBEDDED!r}; else give a local folder or a hub id"
        raise ModelNotFound(f"cannot load {name}: {reason} ({cure})") from error
