"""Packages that only some formats need, imported when they are."""

from importlib import import_module
from typing import Any

from templora.errors import MissingExtra


def needed(module: str, purpose: str, extra: str = "formats") -> Any:
    """A module of an extra. purpose: what it is needed for, to begin a sentence.

    Raises:
        MissingExtra: it is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise MissingExtra(f'{purpose} needs {package}; say: pip install "templora[{extra}]"') from error
