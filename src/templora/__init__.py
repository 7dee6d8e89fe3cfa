"""templora: unlimited memory for one text, for any Hugging Face causal language model."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from templora.base import Base, load
    from templora.durable import DurableSession, resume
    from templora.errors import TemploraError
    from templora.hook import generate
    from templora.recipe import Recipe
    from templora.sampling import Sampling
    from templora.session import Session
    from templora.tasks.batch import score_batch, write_batch
    from templora.tasks.score import score
    from templora.tasks.translate import Passage

# Imported on first use: `import templora` must stay instant, and torch is not.
_HOME = {
    "Base": "base",
    "load": "base",
    "Session": "session",
    "DurableSession": "durable",
    "resume": "durable",
    "Passage": "tasks.translate",
    "Recipe": "recipe",
    "Sampling": "sampling",
    "TemploraError": "errors",
    "generate": "hook",
    "score": "tasks.score",
    "score_batch": "tasks.batch",
    "write_batch": "tasks.batch",
}

__all__ = [
    "Base",
    "DurableSession",
    "Passage",
    "Recipe",
    "Sampling",
    "Session",
    "TemploraError",
    "generate",
    "load",
    "resume",
    "score",
    "score_batch",
    "write_batch",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'templora' has no attribute {name!r}")
    return getattr(import_module(f"templora.{_HOME[name]}"), name)
