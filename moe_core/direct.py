"""Big files read and written around the page cache.

- Through the cache every byte is copied once more, into or out of pages that the kernel must find first: as much CPU time as the arithmetic.
- Where a file system cannot go around its cache (O_DIRECT), the same calls go through it.
- Going around it, place in the file, length and memory must be multiples of a page: `read` and `write` see to it, `Buffers` give such memory.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch import Tensor

from moe_core.buffers import PAGE, Buffers, up

DIRECT = getattr(os, "O_DIRECT", 0)


def go_around(file: int, wanted: bool = True) -> None:
    """Lets an open file's reads and writes go around the page cache, or through it. Raises OSError (EINVAL) where a file system cannot."""
    flags = fcntl.fcntl(file, fcntl.F_GETFL)
    fcntl.fcntl(file, fcntl.F_SETFL, flags | DIRECT if wanted else flags & ~DIRECT)


def opened(path: Path, flags: int) -> int:
    """The descriptor of a file that `read` and `write` take. Not opened with O_DIRECT at once: a refused open may leave a new file behind."""
    file = os.open(path, flags, 0o666)
    with contextlib.suppress(OSError):
        go_around(file)
    return file


def read(file: int, buffers: Buffers, first: int, end: int) -> Tensor:
    """Bytes `first` to `end` of a file as uint8, fewer only where it ends before. They lie in memory of `buffers`."""
    start = first - first % PAGE
    # A page more than the bytes asked for, wherever they begin: so tensors of a size take each other's memory.
    block, got = buffers.take(end - first + PAGE), 0
    memory = block.numpy().data[: up(end - start)]
    while True:
        count = _done(file, partial(os.preadv, file, [memory[got:]], start + got))
        if got + count >= end - start or count < PAGE:
            return block[first - start : min(got + count, end - start)]
        got += count - count % PAGE


def write(file: int, raw: Tensor) -> None:
    """Writes all of `raw` (uint8), which begins at a page's start, behind what was written before: whole pages, all but the last time."""
    rest = raw.numpy().data
    whole = len(rest) - len(rest) % PAGE
    for part in (rest[:whole], rest[whole:]):
        while part:
            part = part[_done(file, partial(os.write, file, part)) :]


def _done(file: int, call: Callable[[], int]) -> int:
    try:
        return call()
    except OSError as error:
        # A file's last bytes are no whole page; some file systems accept O_DIRECT and then refuse to read.
        if error.errno != errno.EINVAL or not fcntl.fcntl(file, fcntl.F_GETFL) & DIRECT:
            raise
        go_around(file, False)
        return call()
