"""Stage `shard`: image-text pairs in, latents in deterministic shards out, on Ray Data.

- One pass over the tars: read, decode and resize in tasks; encode with the teacher's VAE in actors; the latents go to part files, the rest
  of a sample to the driver, which deals the splits. A second pass over the parts writes the shards.
- A chunk is cut within one tar and encoded as one batch of a fixed size, so that latents do not depend on how many workers there are.
- What is broken is dropped and counted by reason; too much of it is an error.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray.data
import torch
from safetensors.torch import load_file, save_file

from moe_core.data import latents, splits, webdataset
from moe_core.errors import DataError
from tasks import outs
from tasks.places import SHARDS, SOURCE, TEACHER
from tasks.source_files import tars_of
from tasks.stage import Stage, execute

SHARE_OF_CPU = 0.5
"""What a reader and an encoder each claim of Ray: both must fit where there is one CPU."""


def shard(stage: Stage) -> None:
    """Writes data/shards/: shards, their indices, and the manifest."""
    params, config = stage.params, stage.params.data.shard
    tars = tars_of(stage.root)
    parts = stage.root / SHARDS.parent / ".shards.parts"
    shutil.rmtree(parts, ignore_errors=True)
    parts.mkdir(parents=True)
    try:
        with stage.ray(), outs.folder(stage.root / SHARDS) as folder:
            chunks = _encode(stage, tars, parts)
            rejects = [webdataset.Reject(**reject) for chunk in chunks for reject in chunk["rejects"]]
            places = [(chunk["part"], row, key) for chunk in chunks for row, key in enumerate(chunk["keys"])]
            webdataset.check_rejects(len(places), rejects, len(tars), config.max_reject_share)
            names = splits.assign(
                [key for _, _, key in places], config.validation_samples, config.calibration_samples, params.seed
            )
            chosen = {
                name: [place[:2] for place, own in zip(places, names, strict=True) if own == name]
                for name in splits.SPLITS
            }
            shards = _write(chosen, parts, folder, config.samples_per_shard)
            # The hash that DVC has of the source: the shards' origin.
            manifest = latents.write_manifest(folder, shards, rejects, {"md5": stage.identity.deps[str(SOURCE)]})
    finally:
        shutil.rmtree(parts)
    counts = {f"{name}_samples": split["samples"] for name, split in manifest["splits"].items()}
    dropped = {f"rejected_{reason}": found["count"] for reason, found in manifest["rejects"].items()}
    stage.summary({**counts, "rejected": len(rejects), **dropped})


def _encode(stage: Stage, tars: list[Path], parts: Path) -> list[dict[str, Any]]:
    """The first pass; returns the chunks in order, each with its samples' records and its rejects."""
    config, compute = stage.params.data.shard, stage.params.compute
    # It tells of every plan that it runs; the stage has its own progress.
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    read = partial(
        _read_tar,
        size=config.batch_size,
        max_caption_chars=config.max_caption_chars,
        resolution=stage.params.model.resolution,
    )
    found = (
        ray.data.from_items(
            [{"tar": str(tar), "number": i} for i, tar in enumerate(tars)], override_num_blocks=len(tars)
        )
        .flat_map(read, num_cpus=SHARE_OF_CPU)
        .map(
            _Encoder,
            fn_constructor_args=(str(stage.root / TEACHER), str(parts), config.batch_size, compute.cpus_per_worker),
            compute=ray.data.ActorPoolStrategy(size=max(compute.num_workers, 1)),
            num_cpus=SHARE_OF_CPU,
            num_gpus=int(compute.use_gpu),
        )
    )
    chunks = []
    for row in found.iter_rows():
        if row["error"]:
            raise DataError(row["error"])
        chunks.append({**row, "keys": json.loads(row["keys"]), "rejects": json.loads(row["rejects"])})
        stage.progress.update("encode", len(chunks), len(chunks))
    return sorted(chunks, key=lambda chunk: (chunk["number"], chunk["chunk"]))


def _read_tar(row: dict[str, Any], size: int, max_caption_chars: int, resolution: int) -> Iterator[dict[str, Any]]:
    """In a task: the samples of a tar in chunks of `size`, decoded; rejects go with the chunk in which they were met.

    An error of ours goes with the last chunk: raised here, Ray would tell of it in a hundred lines.
    """
    chunk = 0
    pictures: list[np.ndarray] = []
    records: list[dict[str, Any]] = []
    rejects: list[dict[str, str]] = []
    error = ""

    def cut() -> dict[str, Any]:
        nonlocal chunk
        made = {
            "number": row["number"],
            "chunk": chunk,
            "pictures": b"".join(picture.tobytes() for picture in pictures),
            "resolution": resolution,
            "records": json.dumps(records),
            "rejects": json.dumps(rejects),
            "error": error,
        }
        chunk += 1
        for filled in (pictures, records, rejects):
            filled.clear()
        return made

    try:
        for sample in webdataset.read_samples(Path(row["tar"]), max_caption_chars, check_images=False):
            found = webdataset.decode_or_reject(sample, resolution) if isinstance(sample, webdataset.Sample) else sample
            if isinstance(found, webdataset.Reject):
                rejects.append({"key": found.key, "reason": found.reason, "detail": found.detail})
            elif isinstance(sample, webdataset.Sample):
                pictures.append(found)
                records.append({"key": sample.key, "caption": sample.caption, "meta": sample.meta})
            if len(pictures) == size:
                yield cut()
    except DataError as told:
        error = str(told)
    if pictures or rejects or error:
        yield cut()


class _Encoder:
    """In an actor: the teacher's VAE."""

    def __init__(self, teacher: str, parts: str, size: int, threads: int) -> None:
        # diffusers loads in the actors, not in the driver, where it would cost seconds for nothing.
        from diffusers import AutoencoderKL

        from moe_core import teacher_training

        torch.set_num_threads(threads)
        self.encode = teacher_training.encode
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.vae = AutoencoderKL.from_pretrained(teacher, subfolder="vae").to(device).eval()
        self.parts, self.size = Path(parts), size

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Encodes a chunk into a part; a short chunk is filled up, so that the VAE always sees the same shape."""
        side, records = row["resolution"], json.loads(row["records"])
        name = f"{row['number']:06d}-{row['chunk']:06d}"
        if records:
            pictures = torch.frombuffer(bytearray(row["pictures"]), dtype=torch.uint8).view(len(records), side, side, 3)
            filled = torch.cat([pictures, pictures.new_zeros(self.size - len(records), side, side, 3)])
            encoded = self.encode(self.vae, filled)[: len(records)]
            save_file({"latents": encoded.contiguous()}, self.parts / f"{name}.safetensors")
            (self.parts / f"{name}.json").write_text(row["records"])
        keys = json.dumps([record["key"] for record in records])
        return {"number": row["number"], "chunk": row["chunk"], "part": name, "keys": keys} | {
            key: row[key] for key in ("rejects", "error")
        }


def _write(
    chosen: dict[str, list[tuple[str, int]]], parts: Path, folder: Path, size: int
) -> dict[str, Sequence[latents.Shard]]:
    """The second pass: cuts each split, in the order of the source, into shards; returns them by split."""
    plan = [
        {"split": split, "number": number, "rows": json.dumps(rows[first : first + size])}
        for split, rows in chosen.items()
        for number, first in enumerate(range(0, len(rows), size))
    ]
    write = partial(_write_shard, parts=parts, folder=folder)
    found = ray.data.from_items(plan, override_num_blocks=len(plan)).map(write, num_cpus=SHARE_OF_CPU).take_all()
    written = {(row["split"], row["number"]): latents.Shard(**json.loads(row["shard"])) for row in found}
    return {split: [written[key] for key in sorted(written) if key[0] == split] for split in chosen}


def _write_shard(row: dict[str, Any], parts: Path, folder: Path) -> dict[str, Any]:
    """In a task: one shard, from the parts that have its rows."""
    opened: dict[str, tuple[torch.Tensor, list[dict[str, Any]]]] = {}
    rows = []
    for part, index in json.loads(row["rows"]):
        if part not in opened:
            opened[part] = (
                load_file(parts / f"{part}.safetensors")["latents"],
                json.loads((parts / f"{part}.json").read_text()),
            )
        encoded, records = opened[part]
        record = records[index]
        rows.append(latents.LatentRow(record["key"], encoded[index], record["caption"], record["meta"]))
    shard = latents.write_shard(folder, row["split"], row["number"], rows)
    return {"split": row["split"], "number": row["number"], "shard": json.dumps(asdict(shard))}


if __name__ == "__main__":
    execute("shard", shard)
