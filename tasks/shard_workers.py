"""What runs in Ray's processes for stage `shard`: reading in tasks, encoding in actors, writing in tasks.

- A chunk is cut within one unit and one bucket, and encoded as one batch of a fixed size, so that latents do not depend on how many
  workers there are.
- Pixels travel as the raw bytes of a chunk, through Ray's shared memory, to an encoder; captions go with them, to disk. The driver
  gets what finds a sample again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from moe_core.config import FiltersConfig
from moe_core.data import shard_files, splits
from moe_core.data.sources.reading import Kept, keep
from moe_core.data.sources.samples import RejectCount
from moe_core.data.sources.units import Source, Unit
from tasks.shard_parts import ENTRY, Parts


@dataclass(frozen=True)
class Reader:
    """In a task: units in, chunks of decoded pictures out."""

    source: Source
    buckets: tuple[tuple[int, int], ...]
    filters: FiltersConfig
    size: int
    seed: int

    def __call__(self, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The chunks of a unit; the last row has no pictures, but the number of chunks and the rejects."""
        number, chunks, samples = int(row["number"]), 0, 0
        rejects = RejectCount()
        open_chunks = [_Chunk() for _ in self.buckets]
        for entry in keep(self.source, Unit.from_dict(json.loads(row["unit"])), self.buckets, self.filters):
            if not isinstance(entry, Kept):
                rejects.add(entry)
                continue
            bucket = entry.picture.bucket
            open_chunks[bucket].add(entry, samples, splits.digest(self.seed, entry.sample.key))
            samples += 1
            if len(open_chunks[bucket].records) == self.size:
                yield open_chunks[bucket].take(number, chunks, bucket)
                chunks += 1
        for bucket, rest in enumerate(open_chunks):
            if rest.records:
                yield rest.take(number, chunks, bucket)
                chunks += 1
        yield _row(number, rejects=json.dumps(rejects.as_dict()), chunks=chunks)


def _row(unit: int, **more: Any) -> dict[str, Any]:
    """All rows have the same columns."""
    empty = {"chunk": -1, "bucket": -1, "pictures": b"", "records": b"", "entries": b"", "order": b""}
    return {"unit": unit, **empty, "rejects": "", "chunks": -1, **more}


@dataclass
class _Chunk:
    """Pictures of one bucket, not yet as many as are encoded at once."""

    pictures: list[np.ndarray] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)
    digests: list[tuple[bytes, bytes]] = field(default_factory=list)
    order: list[int] = field(default_factory=list)

    def add(self, kept: Kept, order: int, key: bytes) -> None:
        self.pictures.append(kept.picture.pixels)
        self.records.append({"key": kept.sample.key, "caption": kept.sample.caption, "meta": kept.sample.meta})
        self.digests.append((key, kept.digest))
        self.order.append(order)

    def take(self, unit: int, number: int, bucket: int) -> dict[str, Any]:
        """The row; the chunk is empty again."""
        entries = np.zeros(len(self.records), ENTRY)
        entries["unit"], entries["chunk"], entries["bucket"] = unit, number, bucket
        entries["row"] = np.arange(len(entries))
        for column, place in (("key", 0), ("image", 1)):
            joined = b"".join(pair[place] for pair in self.digests)
            entries[column] = np.frombuffer(joined, np.uint8).reshape(len(entries), -1)
        row = _row(
            unit,
            chunk=number,
            bucket=bucket,
            pictures=b"".join(picture.data for picture in self.pictures),
            records=json.dumps(self.records).encode(),
            entries=entries.tobytes(),
            order=np.array(self.order, np.int32).tobytes(),
        )
        for filled in (self.pictures, self.records, self.digests, self.order):
            filled.clear()
        return row


class Encoder:
    """In an actor: the teacher's VAE and, where asked for, its text encoders; chunks in, chunks on disk."""

    def __init__(
        self,
        teacher: str,
        parts: str,
        buckets: tuple[tuple[int, int], ...],
        size: int,
        threads: int,
        text_tokens: int | None,
    ) -> None:
        """`text_tokens`: T5 tokens of a caption, None to leave captions alone."""
        # diffusers loads in the actors, not in the driver, where it would cost seconds for nothing.
        from diffusers import AutoencoderKL

        from moe_core import teacher_training
        from moe_core.text_encoding import LOADING

        torch.set_num_threads(threads)
        self.encode = teacher_training.encode
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.vae = AutoencoderKL.from_pretrained(teacher, subfolder="vae", **LOADING).to(device).eval()
        self.parts, self.buckets, self.size = Parts(Path(parts)), buckets, size
        self.text = None if text_tokens is None else _TextEncoders(teacher, device, text_tokens)

    def __call__(self, block: pa.Table) -> pa.Table:
        """Encodes the chunks of a block; gives back what the driver needs."""
        for row in range(block.num_rows):
            if block["records"][row].as_buffer().size:
                self._chunk({name: block[name][row] for name in block.column_names})
        return block.drop_columns(["pictures", "records"])

    def _chunk(self, row: dict[str, Any]) -> None:
        """A short chunk is filled up, so that the VAE always sees the same shape."""
        width, height = self.buckets[row["bucket"].as_py()]
        pictures = np.frombuffer(row["pictures"].as_buffer(), np.uint8).reshape(-1, height, width, 3)
        filled = np.zeros((self.size, height, width, 3), np.uint8)
        filled[: len(pictures)] = pictures
        encoded = self.encode(self.vae, torch.from_numpy(filled))[: len(pictures)]
        records = row["records"].as_py()
        tensors = {"latents": encoded.contiguous()}
        if self.text is not None:
            tensors |= self.text.encode([record["caption"] for record in json.loads(records)])
        self.parts.write_chunk(row["unit"].as_py(), row["chunk"].as_py(), tensors, records)


class _TextEncoders:
    """T5 and CLIP of the teacher, in bf16, as their features are stored."""

    def __init__(self, teacher: str, device: str, tokens: int) -> None:
        # As above.
        from moe_core import text_encoding

        self.prompts = text_encoding.encode_prompts
        self.pipeline = text_encoding.load_text_encoders(Path(teacher), device, torch.bfloat16)
        self.tokens = tokens

    def encode(self, captions: list[str]) -> dict[str, torch.Tensor]:
        """`prompt_embeds` [n, T, D] and `pooled` [n, P], bf16."""
        text, pooled, _ = self.prompts(self.pipeline, captions, self.tokens)
        return {"prompt_embeds": text.to(torch.bfloat16).cpu(), "pooled": pooled.to(torch.bfloat16).cpu()}


@dataclass(frozen=True)
class Writer:
    """In a task: one shard, from the chunks that have its rows; one that a killed run has written is left as it is."""

    parts: Path
    places: Path
    folder: Path
    buckets: tuple[tuple[int, int], ...]

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Writes the shard's files and, last, its line of the manifest."""
        line = self.folder / f"{row['split']}-{int(row['number']):05d}.json"
        if not line.exists():
            entries = np.load(self.places, mmap_mode="r")[int(row["first"]) : int(row["end"])]
            bucket = self.buckets[int(entries[0]["bucket"])]
            samples = Parts(self.parts).rows(entries)
            shard = shard_files.write_shard(self.folder, row["split"], int(row["number"]), bucket, samples)
            partial = line.with_suffix(".partial")
            partial.write_text(json.dumps(asdict(shard)))
            partial.replace(line)
        return {"line": str(line)}
