"""One process among those that work on a stage together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


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

    def part(self, positions: range) -> range:
        """This rank's part of consecutive sample positions, whose number is a multiple of the ranks'."""
        each = len(positions) // self.size
        return positions[self.rank * each : (self.rank + 1) * each]

    def dealt(self, positions: range) -> tuple[list[int], int]:
        """As many positions as any other rank gets, and how many of them, the first ones, are this rank's own.

        For positions that need not divide: a rank that would have fewer has the first ones of all once more.
        """
        each = -(-len(positions) // self.size)
        own = list(positions[self.rank * each : (self.rank + 1) * each])
        return own + list(positions[: each - len(own)]), len(own)

    def mean(self, values: Tensor) -> Tensor:
        """The mean over ranks."""
        if self.size > 1:
            dist.all_reduce(values)
            values /= self.size
        return values

    def sum(self, values: Tensor) -> Tensor:
        """The sum over ranks."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def told(self, value: T) -> T:
        """What rank 0 says."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values)
        return values[0]

    def gathered(self, value: T) -> list[T]:
        """What every rank says, in their order."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Waits for all ranks."""
        if self.size > 1:
            dist.barrier()
