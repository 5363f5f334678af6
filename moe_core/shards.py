"""Model folders tensor by tensor: read with plain reads, written in shards that diffusers reads. Never a whole model in memory.

- Plain reads, not mapped files: a mapping's pages count as this process's memory until the file is closed, and its tensors start at any byte.
- Reading ahead and writing have a thread each: the disk does not wait for the arithmetic, nor the other way round. Both go around the page cache.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from moe_core import checkpoint, direct
from moe_core.buffers import PAGE, Buffers
from moe_core.errors import CheckpointError

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
AHEAD_BYTES = 256 * 2**20
"""How far ahead of the arithmetic files are read, and how much of what is made may wait to be written."""


class ModelFolder:
    """A model in diffusers' format, dense or sparse: its structure, and its tensors one by one."""

    def __init__(self, path: Path, *classes: type[FluxTransformer2DModel]) -> None:
        """Reads headers only. Raises CheckpointError, naming file and tensor, unless the folder holds exactly the weights of a model of one of
        these classes, in fp32, bf16 or fp16."""
        config = checkpoint.read_config(path)
        names = {kind.__name__: kind for kind in classes}
        if config.get("_class_name") not in names:
            raise CheckpointError(
                f"{path / checkpoint.CONFIG}: describes a {config.get('_class_name')}; it must be a {' or a '.join(names)}"
            )
        with torch.device("meta"):
            self.model = names[config["_class_name"]].from_config(config)
        """The structure, on the meta device."""
        self.path = path
        shapes = {name: tuple(tensor.shape) for name, tensor in self.model.state_dict().items()}
        self.tensors = checkpoint.check_weights(path, shapes)
        checkpoint.check_precision(path, self.tensors)
        self._files: dict[Path, int] = {}
        self._buffers = Buffers()
        self._reading = ThreadPoolExecutor(1, "read")
        self._expected: dict[str, Future[Tensor]] = {}

    def dtype(self, name: str) -> torch.dtype:
        """The precision in which a tensor is stored."""
        return DTYPES[self.tensors[name].dtype]

    def size(self, name: str) -> int:
        """A tensor's size in bytes."""
        return self.tensors[name].end - self.tensors[name].start

    def expect(self, name: str) -> None:
        """Begins to read a tensor; it waits in memory until it is asked for."""
        self._expected[name] = self._reading.submit(self._read, name)

    def read(self, name: str) -> Tensor:
        """A tensor, in memory of its own as long as it or a view of it lives. Raises CheckpointError if the file has become shorter."""
        if name not in self._expected:
            self.expect(name)
        return self._expected.pop(name).result()

    def _read(self, name: str) -> Tensor:
        """In the reading thread."""
        stored = self.tensors[name]
        if stored.path not in self._files:
            self._files[stored.path] = direct.opened(stored.path, os.O_RDONLY)
        raw = direct.read(self._files[stored.path], self._buffers, stored.start, stored.end)
        if len(raw) < self.size(name):
            raise CheckpointError(f"{stored.path}: ends at byte {stored.start + len(raw)}, within tensor {name}")
        dtype = DTYPES[stored.dtype]
        if stored.start % dtype.itemsize:
            raw = raw.clone()
        return raw.view(dtype).view(stored.shape)

    def close(self) -> None:
        """Closes its files. What was expected and not read is let go."""
        self._reading.shutdown(cancel_futures=True)
        self._expected.clear()
        while self._files:
            os.close(self._files.popitem()[1])

    def __enter__(self) -> ModelFolder:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class Entry(NamedTuple):
    """A tensor to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """In bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def cut(entries: Iterable[Entry], max_bytes: int) -> list[list[Entry]]:
    """Deals tensors to shards in their order, as diffusers does: a shard ends before the tensor that would make it too big.

    Within a shard wider types come first, so that every tensor starts at a multiple of its own width.
    """
    shards: list[list[Entry]] = []
    size = 0
    for entry in entries:
        if not shards or size + entry.size > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.size
    return [sorted(shard, key=lambda entry: -entry.dtype.itemsize) for shard in shards]


def file_names(count: int) -> list[str]:
    """The names that diffusers gives to so many shards of a model."""
    if count == 1:
        return [checkpoint.WEIGHTS]
    stem, suffix = checkpoint.WEIGHTS.split(".")
    return [f"{stem}-{number:05d}-of-{count:05d}.{suffix}" for number in range(1, count + 1)]


def write_index(folder: Path, shards: Sequence[Sequence[Entry]]) -> None:
    """Writes which tensor is in which shard; of a single file there is no index."""
    if len(shards) == 1:
        return
    names = file_names(len(shards))
    weight_map = {entry.name: name for name, shard in zip(names, shards, strict=True) for entry in shard}
    total = sum(entry.size for shard in shards for entry in shard)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / checkpoint.INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


class ShardWriter:
    """Writes shards into a folder, with their index, under diffusers' names. Every file is on the disk when the block ends."""

    def __init__(self, folder: Path, shards: Sequence[Sequence[Entry]]) -> None:
        self._folder, self._shards, self._names = folder, shards, file_names(len(shards))
        self._writing = ThreadPoolExecutor(1, "write")
        self._writes: deque[tuple[Future[None], int]] = deque()
        self._waiting = 0
        self._buffers = Buffers()
        self._begun = torch.empty(0, dtype=torch.uint8)
        """The last bytes so far of a shard, not yet a page: they are written with the next tensor."""
        self._todo = deque((number, entry) for number, shard in enumerate(shards) for entry in shard)
        self._files: dict[int, int] = {}

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._writing.shutdown(cancel_futures=True)
            for file in self._files.values():
                os.close(file)

    def put(self, name: str, tensor: Tensor) -> None:
        """Takes a copy of the next tensor of the shards. Raises CheckpointError if it is not the one expected."""
        number, entry = self._todo.popleft()
        if Entry(name, tensor.dtype, tuple(tensor.shape)) != entry:
            raise CheckpointError(
                f"conversion made {name}, {tensor.dtype} {list(tensor.shape)}; it must be {entry.name}, {entry.dtype} {list(entry.shape)}"
            )
        while self._writes and self._waiting + entry.size > AHEAD_BYTES:
            self._take_back()
        last = not self._todo or self._todo[0][0] != number
        if number not in self._files:
            self._files[number] = direct.opened(
                self._folder / self._names[number], os.O_WRONLY | os.O_CREAT | os.O_EXCL
            )
            self._begun = torch.frombuffer(bytearray(_header(self._shards[number])), dtype=torch.uint8)
        start, end = len(self._begun), len(self._begun) + entry.size
        # As much whatever has begun, so that tensors of a shape take each other's memory.
        block = self._buffers.take(max(start, PAGE) + entry.size)
        block[:start] = self._begun
        block[start:end].view(entry.dtype).view(entry.shape).copy_(tensor)
        whole = end if last else end - end % PAGE
        self._begun = block[whole:end].clone()
        self._writes.append((self._writing.submit(self._write, number, block[:whole], last), entry.size))
        self._waiting += entry.size

    def _take_back(self) -> None:
        write, size = self._writes.popleft()
        write.result()
        self._waiting -= size

    def _finish(self) -> None:
        while self._writes:
            self._take_back()
        if self._todo:
            raise CheckpointError(f"conversion did not make {self._todo[0][1].name}")
        write_index(self._folder, self._shards)

    def _write(self, number: int, raw: Tensor, last: bool) -> None:
        """In the writing thread."""
        direct.write(self._files[number], raw)
        if last:
            os.fsync(self._files[number])


def _header(shard: Sequence[Entry]) -> bytes:
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for entry in shard:
        header[entry.name] = {"dtype": names[entry.dtype], "shape": entry.shape, "data_offsets": [at, at + entry.size]}
        at += entry.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
