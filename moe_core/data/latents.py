"""Shards of latents, read: what distillation trains on.

- `{split}-{number:05d}.safetensors` holds `latents` [N, C, h, w], fp32, shifted and scaled as FluxPipeline expects, and, where they
  were asked for, `prompt_embeds` [N, T, D] and `pooled` [N, P], bf16; `{split}-{number:05d}.jsonl` has a line a sample:
  `{key, caption, meta}`.
- `manifest.json` names every shard with its bucket, its rows and the sha256 of both files, counts the rejects by reason, and
  carries the source's hash.
- All latents of a shard have one shape, that of its bucket; the shards of a bucket stand together. A batch is drawn from one bucket.
- Rows and captions are read one by one: a split may be larger than memory. Of a shard that was read from, 8 bytes a row stay.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moe_core import noise
from moe_core.errors import DataError

MANIFEST = "manifest.json"
LATENTS = "latents"
TEXT = ("prompt_embeds", "pooled")
"""T5's features and CLIP's pooled vector, where they are stored."""


@dataclass(frozen=True)
class Shard:
    """A shard's line in the manifest."""

    file: str
    bucket: tuple[int, int]
    """width and height of its pictures, pixels"""
    rows: int
    bytes: int
    index_bytes: int
    sha256: str
    index_sha256: str


def sha256(path: Path) -> str:
    """Of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder of shards. Raises DataError if it is missing or no manifest."""
    path = folder / MANIFEST
    if not path.is_file():
        raise DataError(f"{path} does not exist; stage shard writes it: dvc repro shard")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(f"{path} cannot be parsed ({error}); stage shard writes it: dvc repro --force shard") from None
    if not isinstance(manifest, dict) or "splits" not in manifest:
        raise DataError(f"{path} has no 'splits'; it must be the manifest that stage shard writes")
    return manifest


class LatentDataset:
    """One split of a folder of shards."""

    def __init__(self, folder: Path, split: str, verify: bool = False) -> None:
        """Checks that every shard is there and has its size; `verify`: and its sha256.

        Raises DataError naming the file, what it is and what the manifest says.
        """
        splits = read_manifest(folder)["splits"]
        if split not in splits:
            raise DataError(f"{folder / MANIFEST} has no split '{split}'; it has {', '.join(sorted(splits))}")
        self.folder = folder
        self.split = split
        self.shards = [Shard(**{**shard, "bucket": tuple(shard["bucket"])}) for shard in splits[split]["shards"]]
        for shard in self.shards:
            self._check(shard, verify)
        self._ends = list(accumulate(shard.rows for shard in self.shards))
        self.sizes = [
            sum(shard.rows for shard in group) for _, group in groupby(self.shards, key=lambda shard: shard.bucket)
        ]
        """Rows of each bucket, in the order in which the rows are numbered."""
        self._bucket_ends = list(accumulate(self.sizes))
        self._open: dict[int, Any] = {}
        self._lines: dict[int, NDArray[np.int64]] = {}
        if not len(self):
            raise DataError(f"split '{split}' of {folder} is empty; it must have at least one sample")

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def draw(self, seed: int, positions: Sequence[int], group: int) -> list[int]:
        """The rows at these positions of a run, all of one bucket: see `noise.bucket_rows`."""
        return noise.bucket_rows(seed, positions, self.sizes, group)

    def cuts(self, size: int, count: int | None = None) -> list[range]:
        """The leading rows of each bucket, `count` in all (None: every row), in batches of at most `size` rows of one bucket.

        Of several buckets each gives its share of `count`, what is left over in rounding going to the first.
        """
        count = len(self) if count is None else min(count, len(self))
        shares = [count * rows // len(self) for rows in self.sizes]
        for bucket, rows in enumerate(self.sizes):
            shares[bucket] += min(count - sum(shares), rows - shares[bucket])
        starts = [end - rows for end, rows in zip(self._bucket_ends, self.sizes)]
        return [
            range(first, min(first + size, start + share))
            for start, share in zip(starts, shares)
            for first in range(start, start + share, size)
        ]

    def get(self, indices: Sequence[int]) -> tuple[Tensor, list[str]]:
        """Latents [B, C, h, w] fp32 and captions of these rows.

        Raises IndexError outside 0 to len - 1, DataError for rows of several buckets.
        """
        return self._read(indices, LATENTS), [record["caption"] for record in self.records(indices)]

    def text(self, indices: Sequence[int]) -> tuple[Tensor, Tensor] | None:
        """T5's features [B, T, D] and CLIP's vectors [B, P] of these rows, fp32; None where they are not stored."""
        number, _ = self._place(indices[0])
        if not set(TEXT) <= set(self._shard(number).keys()):
            return None
        features, pooled = (self._read(indices, name).float() for name in TEXT)
        return features, pooled

    def records(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """`{key, caption, meta}` of these rows."""
        found = []
        for index in indices:
            number, row = self._place(index)
            path = (self.folder / self.shards[number].file).with_suffix(".jsonl")
            if number not in self._lines:
                self._lines[number] = _line_starts(path, self.shards[number].rows)
            starts = self._lines[number]
            with path.open("rb") as file:
                file.seek(starts[row])
                found.append(json.loads(file.read(starts[row + 1] - starts[row])))
        return found

    def _place(self, index: int) -> tuple[int, int]:
        """Number of the shard and row in it."""
        if not 0 <= index < len(self):
            raise IndexError(f"index is {index}; split '{self.split}' has rows 0 to {len(self) - 1}")
        number = bisect_right(self._ends, index)
        return number, index - (self._ends[number] - self.shards[number].rows)

    def _read(self, indices: Sequence[int], name: str) -> Tensor:
        if len(buckets := {bisect_right(self._bucket_ends, index) for index in indices}) > 1:
            raise DataError(f"rows {list(indices)} are of {len(buckets)} buckets; a batch must be of one")
        rows = []
        for index in indices:
            number, row = self._place(index)
            rows.append(self._shard(number).get_slice(name)[row : row + 1])
        return torch.cat(rows)

    def _shard(self, number: int) -> Any:
        """A shard, read lazily and kept open."""
        if number not in self._open:
            path = self.folder / self.shards[number].file
            try:
                opened = safe_open(path, framework="pt")
                opened.get_slice(LATENTS)
            except SafetensorError as error:
                raise DataError(
                    f"{path} cannot be read ({error}); it must be a safetensors file with a tensor '{LATENTS}'"
                ) from None
            self._open[number] = opened
        return self._open[number]

    def _check(self, shard: Shard, verify: bool) -> None:
        path = self.folder / shard.file
        index = path.with_suffix(".jsonl")
        for file, size, told in ((path, shard.bytes, shard.sha256), (index, shard.index_bytes, shard.index_sha256)):
            if not file.is_file():
                raise DataError(f"{file} does not exist; {self.folder / MANIFEST} names it")
            if file.stat().st_size != size:
                raise DataError(f"{file} has {file.stat().st_size} bytes; the manifest says {size}")
            if verify and (found := sha256(file)) != told:
                raise DataError(f"{file} has sha256 {found}; the manifest says {told}")


def _line_starts(path: Path, rows: int) -> NDArray[np.int64]:
    """Where each line begins, and where the last one ends."""
    ends = np.flatnonzero(np.frombuffer(path.read_bytes(), np.uint8) == ord("\n")) + 1
    if len(ends) != rows:
        raise DataError(f"{path} has {len(ends)} lines; the manifest says {rows}")
    return np.concatenate([np.zeros(1, np.int64), ends])
