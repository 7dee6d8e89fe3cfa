"""Out of memory, said in the words of a plan."""

from collections.abc import Generator
from contextlib import contextmanager

import torch

from templora.errors import OutOfMemory
from templora.window import Plan


@contextmanager
def fits_in_memory(plan: Plan) -> Generator[None]:
    """What runs inside needs memory by these sizes; where there is not enough, the error says what to lower.

    Raises:
        OutOfMemory: instead of what torch or Python raises.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(
            f"out of memory at window {plan.window}, chunk {plan.chunk}, context {plan.context}; "
            "lower chunk or context if it happened while learning, else window"
        ) from error


def is_out_of_memory(error: Exception) -> bool:
    """Whether it is what Python or torch, on a GPU or a CPU, raise where memory does not suffice."""
    typed = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return typed or (isinstance(error, RuntimeError) and "allocate memory" in str(error).lower())
