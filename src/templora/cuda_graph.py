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
            self._stream = torch.cuda.Stream(device)
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
                start()  # where it will be recorded, it has to have run before, as libraries want
                torch.cuda.synchronize(device)
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    made = start()
                except BaseException:
                    self._abandon(graph)
                    raise
                try:
                    graph.capture_end()
                except RuntimeError:
                    self._leave_pool()
                    raise
            now.wait_stream(stream)
        return made, graph.replay

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        try:
            graph.capture_end()
        except RuntimeError:
            self._leave_pool()

    def _leave_pool(self) -> None:
        """torch forgets to, where a recording fails at its end; and would give no memory back any more."""
        with suppress(RuntimeError, AttributeError):
            torch._C._cuda_endAllocateToPool(self._device.index, self._pool)  # pyright: ignore[reportPrivateUsage]
