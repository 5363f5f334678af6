"""One process among those that work on a stage together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Worker:
    """One of the processes that train together."""

    rank: int
    size: int
    device: torch.device

    @classmethod
    def here(cls, device: torch.device) -> Worker:
        """This process's place in the process group; alone where there is none."""
        if dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size(), device)
        return cls(0, 1, device)

    def positions(self, step: int, batch_size: int) -> range:
        """This rank's part of the global sample positions of a step."""
        part = batch_size // self.size
        first = step * batch_size + self.rank * part
        return range(first, first + part)

    def mean(self, values: Tensor) -> Tensor:
        """The mean over ranks."""
        if self.size > 1:
            dist.all_reduce(values)
            values /= self.size
        return values

    def barrier(self) -> None:
        """Waits for all ranks."""
        if self.size > 1:
            dist.barrier()
