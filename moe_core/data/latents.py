"""Shards of latents: what distillation reads.

- `{split}-{number:05d}.safetensors` holds `latents` [N, C, h, w], fp32, shifted and scaled as FluxPipeline expects;
  `{split}-{number:05d}.jsonl` has a line a sample: `{key, caption, meta}`.
- `manifest.json` names every shard with its rows and the sha256 of both files, counts the rejects by reason, and
  carries the source's hash.
- The same samples in the same order give the same bytes.
- Rows are read one by one from the memory-mapped file: a split may be larger than memory.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moe_core.data.webdataset import Reject
from moe_core.errors import DataError

MANIFEST = "manifest.json"
MAX_EXAMPLES = 5
"""Rejects of a reason that the manifest quotes."""


@dataclass(frozen=True)
class LatentRow:
    """One sample of a shard; `latents` [C, h, w]."""

    key: str
    latents: Tensor
    caption: str
    meta: dict[str, Any]


@dataclass(frozen=True)
class Shard:
    """A shard's line in the manifest."""

    file: str
    rows: int
    bytes: int
    sha256: str
    index_sha256: str


def write_shard(folder: Path, split: str, number: int, rows: Sequence[LatentRow]) -> Shard:
    """Writes one shard and its index into an existing folder.

    Raises DataError for no rows or rows of different shapes.
    """
    shapes = sorted({tuple(row.latents.shape) for row in rows})
    if len(shapes) != 1:
        raise DataError(
            f"shard {split}-{number:05d} has {len(rows)} rows of shapes {shapes}; it must have rows, all of one shape"
        )
    path = folder / f"{split}-{number:05d}.safetensors"
    save_file({"latents": torch.stack([row.latents for row in rows]).float().contiguous()}, path)
    index = path.with_suffix(".jsonl")
    lines = (
        json.dumps({"key": row.key, "caption": row.caption, "meta": row.meta}, sort_keys=True, ensure_ascii=False)
        for row in rows
    )
    index.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return Shard(path.name, len(rows), path.stat().st_size, _sha256(path), _sha256(index))


def write_manifest(
    folder: Path, shards: dict[str, Sequence[Shard]], rejects: Iterable[Reject], source: dict[str, Any]
) -> dict[str, Any]:
    """Writes and returns the manifest.

    {"splits": {split: {"samples", "shards"}}, "rejects": {reason: {"count", "examples"}}, "source"}.
    """
    counted: dict[str, dict[str, Any]] = {}
    for reject in sorted(rejects, key=lambda r: (r.reason, r.key)):
        entry = counted.setdefault(reject.reason, {"count": 0, "examples": []})
        entry["count"] += 1
        if len(entry["examples"]) < MAX_EXAMPLES:
            entry["examples"].append(reject.detail)
    splits = {
        split: {"samples": sum(s.rows for s in listed), "shards": [asdict(s) for s in listed]}
        for split, listed in shards.items()
    }
    manifest = {"splits": splits, "rejects": counted, "source": source}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return manifest


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
        self.shards = [Shard(**shard) for shard in splits[split]["shards"]]
        self.keys: list[str] = []
        self.captions: list[str] = []
        self.metas: list[dict[str, Any]] = []
        for shard in self.shards:
            self._check(shard, verify)
            lines = (folder / shard.file).with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()
            if len(lines) != shard.rows:
                raise DataError(
                    f"{(folder / shard.file).with_suffix('.jsonl')} has {len(lines)} lines;"
                    f" the manifest says {shard.rows}"
                )
            for line in lines:
                entry = json.loads(line)
                self.keys.append(entry["key"])
                self.captions.append(entry["caption"])
                self.metas.append(entry["meta"])
        if not self.keys:
            raise DataError(f"split '{split}' of {folder} is empty; it must have at least one sample")
        self._ends = list(accumulate(shard.rows for shard in self.shards))
        self._open: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self.keys)

    def get(self, indices: Sequence[int]) -> tuple[Tensor, list[str]]:
        """Latents [B, C, h, w] fp32 and captions of these rows. Raises IndexError outside 0 to len - 1."""
        rows = []
        for index in indices:
            if not 0 <= index < len(self):
                raise IndexError(f"index is {index}; split '{self.split}' has rows 0 to {len(self) - 1}")
            number = bisect_right(self._ends, index)
            row = index - (self._ends[number] - self.shards[number].rows)
            rows.append(self._latents(number)[row : row + 1])
        return torch.cat(rows), [self.captions[index] for index in indices]

    def _latents(self, number: int) -> Any:
        """The lazily read `latents` of a shard, kept open."""
        if number not in self._open:
            path = self.folder / self.shards[number].file
            try:
                self._open[number] = safe_open(path, framework="pt").get_slice("latents")
            except SafetensorError as error:
                raise DataError(
                    f"{path} cannot be read ({error}); it must be a safetensors file with a tensor 'latents'"
                ) from None
        return self._open[number]

    def _check(self, shard: Shard, verify: bool) -> None:
        path = self.folder / shard.file
        index = path.with_suffix(".jsonl")
        for needed in (path, index):
            if not needed.is_file():
                raise DataError(f"{needed} does not exist; {self.folder / MANIFEST} names it")
        if path.stat().st_size != shard.bytes:
            raise DataError(f"{path} has {path.stat().st_size} bytes; the manifest says {shard.bytes}")
        if verify:
            for file, told in ((path, shard.sha256), (index, shard.index_sha256)):
                if (found := _sha256(file)) != told:
                    raise DataError(f"{file} has sha256 {found}; the manifest says {told}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
