"""All pictures of the source in memory, for a teacher that is trained here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moe_core.config import Params
from moe_core.data import embedded, splits, webdataset
from moe_core.errors import DataError
from tasks.source import tars_of


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

    Raises DataError where no sample is left.
    """
    samples = [s for tar in tars_of(root) for s in webdataset.read_samples(tar) if isinstance(s, webdataset.Sample)]
    config = params.data.shard
    split = splits.assign([s.key for s in samples], config.validation_samples, config.calibration_samples, params.seed)
    chosen = {name: [s for s, own in zip(samples, split, strict=True) if own == name] for name in splits.SPLITS}
    if not chosen["val"]:
        raise DataError("data.shard.validation_samples leaves no picture to validate the teacher on")
    vocabulary = embedded.captions_vocabulary() if params.data.kind == "embedded" else [s.caption for s in samples]
    return Pictures(
        _stack(chosen["train"], params.model.resolution),
        [s.caption for s in chosen["train"]],
        _stack(chosen["val"], params.model.resolution),
        [s.caption for s in chosen["val"]],
        vocabulary,
    )


def _stack(samples: list[webdataset.Sample], resolution: int) -> Tensor:
    return torch.from_numpy(np.stack([webdataset.decode(sample, resolution) for sample in samples]))
