"""Memory that is used again: clearing new pages takes the kernel longer than filling them."""

from __future__ import annotations

import contextlib
import math
import mmap
import weakref
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

PAGE = 4096
"""Bytes; no disk's own blocks are larger."""
SMALL = 2**20
"""Tensors of fewer bytes are left to the ordinary allocator, which does use its memory again."""


class Buffers:
    """Memory that is lent again once nobody holds a tensor in it.

    All of it is kept until this object goes; of each size, as much as was ever lent at once. May be used by several threads.
    """

    def __init__(self) -> None:
        self._free: defaultdict[int, list[np.ndarray]] = defaultdict(list)

    def take(self, size: int) -> Tensor:
        """At least `size` bytes (uint8) of any content, from the beginning of a page to the end of one."""
        size = max(up(size), PAGE)
        free = self._free[size]
        try:
            memory = free.pop()
        except IndexError:
            memory = _pages(size)
        lent = memory.view()
        # The tensor's storage, which all of its views share, holds `lent` until it ends itself. (Views of numpy's would hold `memory`.)
        weakref.finalize(lent, free.append, memory).atexit = False
        return torch.from_numpy(lent)

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """As `torch.empty`, big ones on the CPU in memory of these."""
        size = math.prod(shape) * dtype.itemsize
        if size < SMALL or device.type != "cpu":
            return torch.empty(shape, dtype=dtype, device=device)
        return self.take(size)[:size].view(dtype).view(shape)


def up(size: int) -> int:
    """The next multiple of PAGE."""
    return -(-size // PAGE) * PAGE


def _pages(size: int) -> np.ndarray:
    memory = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)
