"""Several processes, one run: each takes its rows of every batch, and gradients are averaged.

On a CPU two processes of one thread each do half as much again as one process of two threads: the
matrices of a small model are too small to share. Started by `torchrun`; alone, a team of one.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors


@dataclass(frozen=True)
class Team:
    """This process's number among `size`."""

    rank: int = 0
    size: int = 1

    @classmethod
    def join(cls) -> Team:
        """Meet the processes that torchrun started, if it did."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size > 1:
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        return cls(int(os.environ.get("RANK", "0")), size)

    @property
    def leads(self) -> bool:
        """Whether this one logs and saves."""
        return self.rank == 0

    def rows(self, batch: Tensor) -> Tensor:
        """This process's share of a batch `[rows, window + 1]`."""
        if len(batch) % self.size:
            raise ValueError(f"{len(batch)} rows cannot be shared by {self.size} processes")
        return batch[self.rank :: self.size]

    def average(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace each gradient by its mean over the team."""
        self.average_tensors([p.grad for p in parameters if p.grad is not None])

    def average_tensors(self, tensors: list[Tensor]) -> None:
        """Replace each tensor by its mean over the team."""
        if self.size == 1:
            return
        flat = _flatten_dense_tensors(tensors)
        dist.all_reduce(flat)
        for tensor, mean in zip(
            tensors, _unflatten_dense_tensors(flat.div_(self.size), tensors), strict=True
        ):
            tensor.copy_(mean)

    def mean(self, value: float) -> float:
        """The mean of a number over the team."""
        if self.size == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(tensor)
        return float(tensor) / self.size

    def wait(self) -> None:
        """Until all are here."""
        if self.size > 1:
            dist.barrier()
