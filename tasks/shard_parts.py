"""What stage `shard` keeps between reading and writing, on disk: a folder a unit, in the stage's resume folder.

- `chunk-{number:06d}.safetensors`: `latents` [n, C, h, w] of one bucket, text embeddings where asked for, and `records`, the JSON of the n
  samples' keys, captions and metas.
- `index.npy`: an entry a sample, in the source's order. All that the driver holds of a sample is its entry: 48 bytes.
- `unit.json`: how many samples and rejects there were. It comes last: a unit that has it is finished.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from moe_core.data.shard_files import LatentRow
from moe_core.data.sources.samples import RejectCount
from tasks import outs

DIGEST = ("u1", (16,))
ENTRY = np.dtype(
    [("unit", "i4"), ("chunk", "i4"), ("row", "i4"), ("bucket", "i4"), ("key", *DIGEST), ("image", *DIGEST)]
)
"""Where a sample's latents are, and the hashes by which splits are dealt and duplicates found."""
RECORDS = "records"
_UNIT, _INDEX = "unit.json", "index.npy"


class Parts:
    """The parts' folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def unit(self, number: int) -> Path:
        """The folder of a unit."""
        return self.folder / f"{number:07d}"

    def finished(self, number: int) -> bool:
        """Whether a unit's work is done."""
        return (self.unit(number) / _UNIT).exists()

    def begin(self, number: int) -> None:
        """An empty folder for a unit."""
        shutil.rmtree(self.unit(number), ignore_errors=True)
        self.unit(number).mkdir(parents=True)

    def write_chunk(self, unit: int, chunk: int, tensors: dict[str, Tensor], records: bytes) -> None:
        """Writes a chunk, in one move: a worker that Ray has given up may still write the same."""
        target = self._chunk(unit, chunk)
        partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
        save_file(tensors | {RECORDS: torch.frombuffer(bytearray(records), dtype=torch.uint8)}, partial)
        descriptor = os.open(partial, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        partial.replace(target)

    def finish(self, number: int, entries: Sequence[NDArray[Any]], rejects: dict[str, Any]) -> None:
        """Writes a unit's index and, last, its mark."""
        here = self.unit(number)
        index = np.concatenate([np.empty(0, ENTRY), *entries])
        with (here / _INDEX).open("wb") as file:
            np.save(file, index, allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        outs.flush_folder(here)
        outs.write_json(here / _UNIT, {"samples": len(index), "rejects": rejects})

    def index(self, units: int) -> NDArray[Any]:
        """The entries of all units, in order."""
        counts = [json.loads((self.unit(number) / _UNIT).read_text())["samples"] for number in range(units)]
        index = np.empty(sum(counts), ENTRY)
        first = 0
        for number, count in enumerate(counts):
            index[first : first + count] = np.load(self.unit(number) / _INDEX, allow_pickle=False)
            first += count
        return index

    def rejects(self, units: int) -> RejectCount:
        """The rejects of all units."""
        total = RejectCount()
        for number in range(units):
            read = json.loads((self.unit(number) / _UNIT).read_text())["rejects"]
            total.merge(RejectCount.from_dict(read))
        return total

    def key(self, entry: NDArray[Any]) -> str:
        """The key of one sample, read from its chunk."""
        return str(self.records(int(entry["unit"]), int(entry["chunk"]))[int(entry["row"])]["key"])

    def records(self, unit: int, chunk: int) -> list[dict[str, Any]]:
        """`{key, caption, meta}` of a chunk's samples."""
        with safe_open(self._chunk(unit, chunk), framework="pt") as opened:
            return _records(opened)

    def rows(self, entries: NDArray[Any]) -> list[LatentRow]:
        """Samples, read one by one: of a chunk only what is wanted."""
        rows: list[LatentRow] = []
        here: tuple[int, int] | None = None
        for entry in entries:
            place = int(entry["unit"]), int(entry["chunk"])
            if place != here:
                opened = safe_open(self._chunk(*place), framework="pt")
                records, here = _records(opened), place
                names = [name for name in opened.keys() if name != RECORDS]  # noqa: SIM118 - no dict
            number = int(entry["row"])
            tensors = {name: opened.get_slice(name)[number : number + 1][0] for name in names}
            record = records[number]
            latents = tensors.pop("latents")
            rows.append(LatentRow(record["key"], latents, record["caption"], record["meta"], tensors))
        return rows

    def _chunk(self, unit: int, chunk: int) -> Path:
        return self.unit(unit) / f"chunk-{chunk:06d}.safetensors"


def _records(opened: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(opened.get_tensor(RECORDS).numpy().tobytes())
    return found
