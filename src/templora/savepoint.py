"""What tensors hold before something that may fail, so that it can be put back bit for bit."""

from collections.abc import Sequence

import torch
from torch import Tensor


class Savepoint:
    """Copies of tensors, taken anew before each step.

    On a CPU their memory stays: copies into fresh pages take twice as long. Elsewhere torch keeps freed
    memory by itself, and nothing is held between steps.
    """

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []
        self.copies: list[Tensor] = []

    def take(self, tensors: Sequence[Tensor]) -> None:
        """Copy these; what they are put back into are the same tensors."""
        self._tensors = list(tensors)
        if [copy.shape for copy in self.copies] != [tensor.shape for tensor in tensors]:
            self.copies = [torch.empty_like(tensor) for tensor in tensors]
        self._copy(self.copies, self._tensors)

    def put_back(self) -> None:
        """Make them what they were."""
        self._copy(self._tensors, self.copies)

    def done(self) -> None:
        """Nothing can fail any more."""
        self._tensors = []
        if any(copy.device.type != "cpu" for copy in self.copies):
            self.copies = []

    @torch.no_grad()
    def _copy(self, to: list[Tensor], from_: list[Tensor]) -> None:
        for one, other in zip(to, from_, strict=True):
            one.copy_(other)
