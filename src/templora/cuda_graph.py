"""CUDA graphs of a function that starts kernels: made one after another, in memory that they share.

Before each recording `torch.cuda.graph` gives back to the device all memory that torch keeps; here one is
made every few hundred tokens, beside a learner that wants that memory again at once.
"""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from templora.turns import random_state


class Recording:
    """Makes graphs on one device. They compute in the same memory: none may run beside another."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            # Of another priority, so that nobody else is given the same stream by chance.
            self._stream = torch.cuda.Stream(device, priority=-1)
            self._pool: Any = torch.cuda.graph_pool_handle()

    def of(self, start: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        """What `start` returns, as each replay leaves it there, and the replay.

        Raises:
            RuntimeError: it does what cannot be recorded, such as to wait for the device.
        """
        device, stream, graph = self._device, self._stream, torch.cuda.CUDAGraph()
        now = torch.cuda.current_stream(device)
        # torch's own generator counts on nobody else to draw from it meanwhile.
        with torch.cuda.device(device), random_state(device):
            stream.wait_stream(now)
            with torch.cuda.stream(stream):
                try:
                    start()  # where it will be recorded it has to have run before, as libraries want
                finally:
                    stream.synchronize()
                _forget_workspaces()
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    made = start()
                except BaseException:
                    with suppress(RuntimeError):
                        self._end(graph)
                    raise
                self._end(graph)
                _forget_workspaces()
            now.wait_stream(stream)
        return made, graph.replay

    def _end(self, graph: torch.cuda.CUDAGraph) -> None:
        """End a recording; where that fails, torch would go on as if it recorded, and is told."""
        try:
            graph.capture_end()
        except RuntimeError:
            with suppress(RuntimeError, AttributeError):
                torch._C._cuda_endAllocateToPool(self._device.index, self._pool)  # pyright: ignore[reportPrivateUsage]
            with suppress(RuntimeError, AttributeError):
                generator: Any = torch.cuda.default_generators[self._device.index]
                generator.graphsafe_set_state(generator.clone_state())
            raise


def _forget_workspaces() -> None:
    """A graph reads cuBLAS's workspace of its stream, which torch frees with the first graph that goes: so
    each recording has one of its own, in the memory of the graphs."""
    torch._C._cuda_clearCublasWorkspaces()  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]
