"""All pictures of the source in memory, for a teacher that is trained here."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moe_core.config import Params, ShardConfig
from moe_core.data import embedded, splits, webdataset
from moe_core.errors import DataError
from tasks.source_files import tars_of


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
    """Reads every tar. The splits are those of stage `shard`: what it keeps for validation or calibration is not trained on.

    Raises DataError where no sample is left, or too many are broken: here already, before a teacher is trained on the rest.
    """
    config = params.data.shard
    keys, captions, decoded = _read(root, config, params.model.resolution)
    split = splits.assign(keys, config.validation_samples, config.calibration_samples, params.seed)
    rows = {name: [i for i, own in enumerate(split) if own == name] for name in splits.SPLITS}
    if not rows["val"]:
        raise DataError("data.shard.validation_samples leaves no picture to validate the teacher on")
    return Pictures(
        decoded[rows["train"]],
        [captions[i] for i in rows["train"]],
        decoded[rows["val"]],
        [captions[i] for i in rows["val"]],
        embedded.captions_vocabulary() if params.data.kind == "embedded" else captions,
    )


# The phases of a teacher run one after the other in the same worker.
@functools.lru_cache(maxsize=1)
def _read(root: Path, config: ShardConfig, resolution: int) -> tuple[list[str], list[str], Tensor]:
    """Keys, captions and pictures of the samples that stage `shard` keeps, in order."""
    keys, captions, decoded, rejects = [], [], [], []
    tars = tars_of(root)
    for tar in tars:
        for sample in webdataset.read_samples(tar, config.max_caption_chars, check_images=False):
            found = webdataset.decode_or_reject(sample, resolution) if isinstance(sample, webdataset.Sample) else sample
            if isinstance(found, webdataset.Reject):
                rejects.append(found)
            elif isinstance(sample, webdataset.Sample):
                keys.append(sample.key)
                captions.append(sample.caption)
                decoded.append(found)
    webdataset.check_rejects(len(keys), rejects, len(tars), config.max_reject_share)
    return keys, captions, torch.from_numpy(np.stack(decoded))
