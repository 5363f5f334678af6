"""How near a model's picture is to the teacher's from the same prompt and noise."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moe_core.errors import DataError


def distances(made: NDArray[np.uint8], reference: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Root mean squared difference a picture, [N], in units of the full range (0 the same, 1 black against white).

    Both uint8 [N, S, S, 3]; raises DataError if the shapes differ or there is no picture.
    """
    if made.shape != reference.shape or not len(made):
        raise DataError(
            f"pictures are {list(made.shape)} and the reference {list(reference.shape)};"
            " the shapes must be the same, with at least one picture"
        )
    # A picture at a time: in fp64 two hundred of FLUX's size would take ten gigabytes.
    return np.array([_distance(own, other) for own, other in zip(made, reference, strict=True)])


def mean_distance(made: NDArray[np.uint8], reference: NDArray[np.uint8]) -> float:
    """The mean of `distances`."""
    return float(distances(made, reference).mean())


def _distance(made: NDArray[np.uint8], reference: NDArray[np.uint8]) -> float:
    difference = made.astype(np.float64) / 255 - reference.astype(np.float64) / 255
    return float(np.sqrt((difference**2).mean()))
