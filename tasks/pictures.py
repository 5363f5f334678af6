"""All pictures of the source in memory, for a teacher that is trained here."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe_core.config import Params
from moe_core.data import duplicates, embedded, splits
from moe_core.data.sources.reading import Kept, doubled, keep
from moe_core.data.sources.samples import RejectCount, check_rejects
from moe_core.errors import DataError
from tasks.source_files import source_of, units_of


@dataclass(frozen=True)
class Pictures:
    """uint8 [N, S, S, 3] and captions, of the training split and of the validation split."""

    train: Tensor
    train_captions: list[str]
    validation: Tensor
    validation_captions: list[str]
    vocabulary: list[str]
    """captions that hold every word a prompt may use"""


def load(root: Path, params: Params) -> Pictures:
    """Reads every unit, each picture cut to a square of `model.resolution`. The splits are those of stage `shard`: what it keeps for
    validation or calibration is not trained on.

    Raises DataError where no sample is left, or too many are broken: here already, before a teacher is trained on the rest.
    """
    # The parameters are no key for a cache; their text is.
    read = _read(root, params.model_dump_json())
    split = read.split
    rows = {name: np.flatnonzero(split == code).tolist() for code, name in enumerate(splits.SPLITS)}
    if not rows["val"]:
        raise DataError("data.shard.validation_samples leaves no picture to validate the teacher on")
    return Pictures(
        read.pictures[rows["train"]],
        [read.captions[i] for i in rows["train"]],
        read.pictures[rows["val"]],
        [read.captions[i] for i in rows["val"]],
        embedded.captions_vocabulary() if params.data.kind == "embedded" else read.captions,
    )


@dataclass(frozen=True)
class _Read:
    """What stage `shard` keeps, in order; `split` [N] as `splits.assign` gives it."""

    captions: list[str]
    pictures: Tensor
    split: NDArray[np.int8]


# The phases of a teacher run one after the other in the same worker.
@functools.lru_cache(maxsize=1)
def _read(root: Path, text: str) -> _Read:
    params = Params.model_validate_json(text)
    data, config = params.data, params.data.shard
    side = params.model.resolution
    source, units = source_of(root, data), units_of(root)
    kept: list[Kept] = []
    rejects = RejectCount()
    for unit in units:
        for entry in keep(source, unit, ((side, side),), data.filters):
            if isinstance(entry, Kept):
                # Its bytes are decoded: they need not stay.
                kept.append(replace(entry, sample=replace(entry.sample, image=b"")))
            else:
                rejects.add(entry)
    keys = _hashes([splits.digest(params.seed, entry.sample.key) for entry in kept])
    kept, keys = _without(kept, keys, keys, rejects, "duplicate_key")
    if data.filters.drop_duplicates:
        kept, keys = _without(kept, keys, _hashes([entry.digest for entry in kept]), rejects, "duplicate_image")
    check_rejects(len(kept), rejects, len(units), config.max_reject_share)
    split = splits.assign(keys, config.validation_samples, config.calibration_samples)
    pictures = torch.from_numpy(np.stack([entry.picture.pixels for entry in kept]))
    return _Read([entry.sample.caption for entry in kept], pictures, split)


def _hashes(digests: list[bytes]) -> NDArray[np.uint8]:
    return np.frombuffer(b"".join(digests), np.uint8).reshape(len(digests), splits.DIGEST_BYTES)


def _without(
    kept: list[Kept], keys: NDArray[np.uint8], digests: NDArray[np.uint8], rejects: RejectCount, reason: str
) -> tuple[list[Kept], NDArray[np.uint8]]:
    """The samples, and their keys' hashes, whose digest is the first of its kind."""
    first = duplicates.first_of_each(digests)
    for entry, stays in zip(kept, first):
        if not stays:
            rejects.add(doubled(entry.sample.key, reason))
    return [entry for entry, stays in zip(kept, first) if stays], keys[first]
