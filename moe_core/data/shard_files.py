"""Shards of latents, written; `moe_core.data.latents` says what is in them. The same samples in the same order give the same bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from moe_core.data.latents import LATENTS, MANIFEST, Shard, sha256
from moe_core.data.sources.samples import RejectCount
from moe_core.errors import DataError


@dataclass(frozen=True)
class LatentRow:
    """One sample of a shard; `latents` [C, h, w]; `text`: other tensors to store, by their names in the shard."""

    key: str
    latents: Tensor
    caption: str
    meta: dict[str, Any]
    text: Mapping[str, Tensor] = field(default_factory=dict)


def write_shard(folder: Path, split: str, number: int, bucket: tuple[int, int], rows: Sequence[LatentRow]) -> Shard:
    """Writes one shard of pictures of `bucket` (width, height) and its index into an existing folder.

    Raises DataError for no rows or rows of different shapes.
    """
    shapes = sorted({tuple(row.latents.shape) for row in rows})
    if len(shapes) != 1:
        raise DataError(
            f"shard {split}-{number:05d} has {len(rows)} rows of shapes {shapes}; it must have rows, all of one shape"
        )
    path = folder / f"{split}-{number:05d}.safetensors"
    tensors = {LATENTS: torch.stack([row.latents for row in rows]).float().contiguous()}
    tensors |= {name: torch.stack([row.text[name] for row in rows]).contiguous() for name in rows[0].text}
    save_file(tensors, path)
    index = path.with_suffix(".jsonl")
    lines = (
        json.dumps({"key": row.key, "caption": row.caption, "meta": row.meta}, sort_keys=True, ensure_ascii=False)
        for row in rows
    )
    index.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return Shard(
        path.name, bucket, len(rows), path.stat().st_size, index.stat().st_size, sha256(path), sha256(index)
    )


def write_manifest(
    folder: Path, shards: Mapping[str, Sequence[Shard]], rejects: RejectCount, source: dict[str, Any]
) -> dict[str, Any]:
    """Writes and returns the manifest.

    {"splits": {split: {"samples", "shards"}}, "rejects": {reason: {"count", "examples"}}, "source"}.
    """
    splits = {
        split: {"samples": sum(s.rows for s in listed), "shards": [asdict(s) for s in listed]}
        for split, listed in shards.items()
    }
    manifest = {"splits": splits, "rejects": rejects.as_dict(), "source": source}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return manifest
