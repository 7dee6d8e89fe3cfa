"""What commands are given: a base, a recipe, text files. Torch is imported when a base is loaded."""

import lzma
from logging import ERROR, getLogger
from pathlib import Path
from typing import TYPE_CHECKING

from templora import recipe
from templora.errors import InvalidText
from templora.formats.book import line_feeds
from templora.recipe import Recipe

if TYPE_CHECKING:
    from templora.base import Base


def load_base(model: str, dtype: str | None, device: str | None) -> "Base":
    """A base by name."""
    from templora.base import load

    hush()
    return load(model, dtype=dtype, device=device)


def hush() -> None:
    """Switch off what transformers and the hub say by themselves, before a base is loaded."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    getLogger("huggingface_hub").setLevel(ERROR)  # it tells of each retry


def load_recipe(name: str, pairs: list[str], sizes: dict[str, int | None]) -> Recipe:
    """A recipe by name or file, with --set pairs and sizes over it."""
    return recipe.load(name, recipe.parse_pairs(pairs) | {k: v for k, v in sizes.items() if v is not None})


def translation_sizes(
    recipe: Recipe, window: int | None, chunk: int | None, positions: int | None
) -> dict[str, int | None]:
    """Half of the positions for the prompt, half for the translation, unless the user says otherwise.

    recipe: as the user gave it; a size that is fixed there stays, unless an option names it as well.
    """
    half = min(2048, (positions or 4096) // 2)
    named = {"window": window, "chunk": chunk}
    first = recipe.window if "window" in recipe.fixed else half
    first = first if window is None else window
    sizes = {"window": first, "context": first, "chunk": half if chunk is None else chunk}
    sizes["sinks"] = 0  # all of a prompt is visible, from its first token on
    return {k: v for k, v in sizes.items() if named.get(k) is not None or k not in recipe.fixed}


def text_of(path: Path) -> str:
    """A text file, UTF-8, plain or compressed (.xz); its lines end as those of texts in training do."""
    if path.suffix.lower() in (".epub", ".docx") and path.exists():
        raise InvalidText(f"{path} is a book, not plain text; `templora read` learns it into a session")
    try:
        data = path.read_bytes()
        return decoded(lzma.decompress(data) if path.suffix == ".xz" else data, path)
    except lzma.LZMAError as error:
        raise InvalidText(f"{path} is not a valid .xz file ({error}); unpack it by hand") from error
    except OSError as error:
        raise InvalidText(f"cannot read {path}: {error.strerror}; check the name") from error


def decoded(data: bytes, path: Path) -> str:
    """The UTF-8 text of a file; not empty, not binary."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidText(
            f"{path} is not UTF-8 text (byte {error.start}); convert it, for example with iconv"
        ) from error
    if "\0" in text:
        raise InvalidText(f"{path} holds binary data, not text; give a plain text file")
    if not text.strip():
        raise InvalidText(f"{path} is empty; give a file that holds text")
    return line_feeds(text)
