"""Which sample belongs to which split: decided by the sample's key alone, so that neither order nor workers matter."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from moe_core.errors import DataError

SPLITS = ("train", "val", "calibration")
DIGEST_BYTES = 16


def digest(seed: int, key: str) -> bytes:
    """The leading 16 bytes of SHA-256 of seed and key: by which splits are dealt, and equal keys are found."""
    return hashlib.sha256(f"{seed}/{key}".encode()).digest()[:DIGEST_BYTES]


def assign(digests: NDArray[np.uint8], validation: int, calibration: int) -> NDArray[np.int8]:
    """The split of each of the digests [N, 16], by its number in SPLITS: the `validation` smallest are "val", the next
    `calibration` ones "calibration".

    Raises DataError where nothing would be left to train on.
    """
    wanted = validation + calibration
    if len(digests) <= wanted:
        raise DataError(
            f"there are {len(digests)} good samples;"
            f" data.shard keeps {validation} for validation and {calibration} for calibration,"
            f" so at least {wanted + 1} are needed"
        )
    split = np.zeros(len(digests), np.int8)
    if not wanted:
        return split
    halves = np.ascontiguousarray(digests).view(">u8")
    limit = np.partition(halves[:, 0], wanted - 1)[wanted - 1]
    candidates = np.flatnonzero(halves[:, 0] <= limit)
    ranked = candidates[np.lexsort((halves[candidates, 1], halves[candidates, 0]))]
    split[ranked[:validation]] = SPLITS.index("val")
    split[ranked[validation:wanted]] = SPLITS.index("calibration")
    return split
