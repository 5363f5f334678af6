"""Stage `shard`: image-text pairs in, latents in deterministic shards out, on Ray Data.

- First pass: units of the source are read, decoded, cut to buckets and encoded with the teacher's VAE into parts. Second pass: splits
  are dealt, duplicates dropped, and the shards written from the parts.
- The same shards byte for byte, whatever the number of workers and restarts: finished units and shards lie in the resume folder, and
  are not made again.
- What is broken is dropped and counted by reason; too much of it is an error. What is filtered is counted, too.
- The driver holds 48 bytes a sample, and for moments as many again: 10 GB for 100 million samples.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import ray.data
from numpy.typing import NDArray

from moe_core.config import LATENT_PATCH
from moe_core.data import duplicates, shard_files, splits
from moe_core.data.latents import Shard
from moe_core.data.sources.reading import doubled
from moe_core.data.sources.samples import MAX_EXAMPLES, RejectCount, check_rejects
from moe_core.data.sources.units import Unit
from moe_core.errors import ConfigError
from tasks import outs
from tasks.places import SHARDS, SOURCE, TEACHER
from tasks.shard_parts import ENTRY, Parts
from tasks.shard_workers import Encoder, Reader, Writer
from tasks.source_files import source_of, units_of
from tasks.stage import Stage, execute, workers

SHARE_OF_CPU = 0.5
"""What a reader and an encoder each claim of Ray: both must fit where there is one CPU."""
BLOCK_BYTES = 16 * 2**20
"""Of chunks that go from a reader to an encoder at once; Ray's own default, 128 MB, keeps encoders waiting."""


def shard(stage: Stage) -> None:
    """Writes data/shards/: shards, their indices, and the manifest."""
    assert stage.resume is not None
    config = stage.params.data.shard
    check_buckets(stage)
    units = units_of(stage.root)
    parts = Parts(stage.resume.path / "parts")
    written = stage.resume.path / "shards"
    with stage.ray():
        _ray_settings()
        _encode(stage, units, parts)
        rejects = parts.rejects(len(units))
        kept = _without_doubles(parts, len(units), rejects, stage.params.data.filters.drop_duplicates)
        check_rejects(len(kept), rejects, len(units), config.max_reject_share)
        shards = _write(stage, kept, parts, written)
    with outs.folder(stage.root / SHARDS) as folder:
        for listed in shards.values():
            for made in listed:
                for name in (made.file, Path(made.file).with_suffix(".jsonl").name):
                    _link(written / name, folder / name)
        # The hash that DVC has of the source: the shards' origin.
        origin = {"md5": stage.identity.deps[str(SOURCE)]}
        manifest = shard_files.write_manifest(folder, shards, rejects, origin)
    counts = {f"{name}_samples": split["samples"] for name, split in manifest["splits"].items()}
    dropped = {f"rejected_{reason}": found["count"] for reason, found in manifest["rejects"].items()}
    stage.summary({**counts, "rejected": sum(rejects.counts.values()), **dropped})


def check_buckets(stage: Stage) -> None:
    """Raises ConfigError for a bucket whose latents FLUX could not cut into patches."""
    config = json.loads((stage.root / TEACHER / "vae" / "config.json").read_text())
    unit = LATENT_PATCH * 2 ** (len(config["block_out_channels"]) - 1)
    for bucket in stage.params.data.buckets_or(stage.params.model.resolution):
        if any(side % unit for side in bucket):
            raise ConfigError(
                f"data.buckets has {list(bucket)} (null: model.resolution); with this teacher's VAE both sides must be"
                f" multiples of {unit}"
            )


def _ray_settings() -> None:
    # It tells of every plan that it runs; the stage has its own progress.
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.target_max_block_size = BLOCK_BYTES


@dataclass
class _Open:
    """A unit of which chunks have come back, but not all."""

    entries: dict[int, NDArray[Any]] = field(default_factory=dict)
    order: dict[int, NDArray[Any]] = field(default_factory=dict)
    chunks: int | None = None
    rejects: dict[str, Any] = field(default_factory=dict)


def _encode(stage: Stage, units: list[Unit], parts: Parts) -> None:
    """The first pass, over the units that are not finished."""
    params, compute = stage.params, stage.params.compute
    config = params.data.shard
    todo = [number for number in range(len(units)) if not parts.finished(number)]
    for number in todo:
        parts.begin(number)
    if not todo:
        return
    buckets = params.data.buckets_or(params.model.resolution)
    source = source_of(stage.root, params.data)
    rows = [{"number": number, "unit": json.dumps(units[number].as_dict())} for number in todo]
    tokens = params.model.max_sequence_length if config.text_embeddings == "stored" else None
    found = (
        ray.data.from_items(rows, override_num_blocks=len(rows))
        .flat_map(Reader(source, buckets, params.data.filters, config.batch_size, params.seed), num_cpus=SHARE_OF_CPU)
        .map_batches(
            Encoder,
            batch_size=None,
            batch_format="pyarrow",
            zero_copy_batch=True,
            fn_constructor_args=(
                str(stage.root / TEACHER),
                str(parts.folder),
                buckets,
                config.batch_size,
                compute.cpus_per_worker,
                tokens,
            ),
            compute=ray.data.ActorPoolStrategy(size=max(compute.num_workers, 1)),
            num_cpus=SHARE_OF_CPU,
            num_gpus=int(compute.use_gpu),
        )
    )
    waiting: defaultdict[int, _Open] = defaultdict(_Open)
    done = len(units) - len(todo)
    for row in found.iter_rows():
        number = int(row["unit"])
        unit = waiting[number]
        if row["chunks"] >= 0:
            unit.chunks, unit.rejects = int(row["chunks"]), json.loads(row["rejects"])
        else:
            unit.entries[int(row["chunk"])] = np.frombuffer(row["entries"], ENTRY)
            unit.order[int(row["chunk"])] = np.frombuffer(row["order"], np.int32)
        if unit.chunks == len(unit.entries):
            _finish(parts, number, waiting.pop(number))
            done += 1
            stage.progress.update("encode", done, len(units))


def _finish(parts: Parts, number: int, unit: _Open) -> None:
    """Puts a unit's entries into the source's order, over its buckets."""
    chunks = sorted(unit.entries)
    entries = np.concatenate([np.empty(0, ENTRY), *(unit.entries[chunk] for chunk in chunks)])
    order = np.concatenate([np.empty(0, np.int32), *(unit.order[chunk] for chunk in chunks)])
    parts.finish(number, [entries[np.argsort(order)]], unit.rejects)


def _without_doubles(parts: Parts, units: int, rejects: RejectCount, drop: bool) -> NDArray[Any]:
    """The entries of what is kept, in the source's order: of samples of one key the first, and of equal images if they are dropped."""
    index = _first(parts, parts.index(units), "key", "duplicate_key", rejects)
    return _first(parts, index, "image", "duplicate_image", rejects) if drop else index


def _first(parts: Parts, index: NDArray[Any], column: str, reason: str, rejects: RejectCount) -> NDArray[Any]:
    """The entries whose hash in `column` is the first of its kind; the others are counted."""
    first = duplicates.first_of_each(index[column])
    if len(again := np.flatnonzero(~first)):
        examples = [doubled(parts.key(index[row]), reason) for row in again[:MAX_EXAMPLES]]
        rejects.add_many(reason, len(again), [{"key": e.key, "detail": e.detail} for e in examples])
        return index[first]
    return index


def _write(stage: Stage, kept: NDArray[Any], parts: Parts, folder: Path) -> dict[str, list[Shard]]:
    """The second pass: cuts each split, bucket by bucket and in the order of the source, into shards; returns them by split."""
    params, config = stage.params, stage.params.data.shard
    buckets = params.data.buckets_or(params.model.resolution)
    dealt = splits.assign(kept["key"], config.validation_samples, config.calibration_samples)
    folder.mkdir(exist_ok=True)
    listed, partial = folder / "places.npy", folder / ".places.partial.npy"
    # On disk, not beside `kept`: writers read their part of it.
    places = np.lib.format.open_memmap(partial, "w+", ENTRY, (len(kept),))
    plan: list[dict[str, Any]] = []
    first = 0
    for code, split in enumerate(splits.SPLITS):
        number = 0
        for bucket in range(len(buckets)):
            chosen = kept[(dealt == code) & (kept["bucket"] == bucket)]
            places[first : first + len(chosen)] = chosen
            for start in range(0, len(chosen), config.samples_per_shard):
                end = min(start + config.samples_per_shard, len(chosen))
                plan.append({"split": split, "number": number, "first": first + start, "end": first + end})
                number += 1
            first += len(chosen)
    places.flush()
    partial.replace(listed)
    writer = Writer(parts.folder, listed, folder, buckets)
    made = ray.data.from_items(plan, override_num_blocks=len(plan)).map(writer, num_cpus=SHARE_OF_CPU)
    for done, _ in enumerate(made.iter_rows(), 1):
        stage.progress.update("write", done, len(plan))
    shards: dict[str, list[Shard]] = {split: [] for split in splits.SPLITS}
    for row in plan:
        line = json.loads((folder / f"{row['split']}-{row['number']:05d}.json").read_text())
        shards[row["split"]].append(Shard(**{**line, "bucket": tuple(line["bucket"])}))
    return shards


def _link(made: Path, target: Path) -> None:
    """Another name for a file that will not be written again; a copy where the resume folder is on another file system."""
    try:
        os.link(made, target)
    except OSError:
        shutil.copyfile(made, target)


if __name__ == "__main__":
    execute("shard", shard, resumable=True, joins=workers)
