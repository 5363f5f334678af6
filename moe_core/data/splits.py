"""Which sample belongs to which split: decided by the sample's key alone, so that neither order nor workers matter."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import pairwise

from moe_core.errors import DataError

SPLITS = ("train", "val", "calibration")


def assign(keys: Sequence[str], validation: int, calibration: int, seed: int) -> list[str]:
    """The split of each key: the `validation` smallest hashes of (seed, key) are "val", the next `calibration` ones
    "calibration".

    Raises DataError where nothing would be left to train on, or a key stands twice.
    """
    if len(keys) <= validation + calibration:
        raise DataError(
            f"there are {len(keys)} good samples;"
            f" data.shard keeps {validation} for validation and {calibration} for calibration,"
            f" so at least {validation + calibration + 1} are needed"
        )
    ranked = sorted(
        range(len(keys)), key=lambda row: (hashlib.sha256(f"{seed}/{keys[row]}".encode()).digest(), keys[row])
    )
    for row, following in pairwise(ranked):
        if keys[row] == keys[following]:
            raise DataError(f"sample key '{keys[row]}' stands twice; keys must differ")
    split = ["train"] * len(keys)
    for rank, row in enumerate(ranked[: validation + calibration]):
        split[row] = "val" if rank < validation else "calibration"
    return split
