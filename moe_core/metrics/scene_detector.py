"""Finds the digits of a scene: which cells hold one, of which class and colour. The part that Mask2Former and CLIP play
in GenEval.

- A cell holds an object if its ink (the brightest channel, summed) is more than `MIN_INK`. The faintest real digit has
  twice that.
- Class: the classifier on the cell's ink. Colour: the nearest of the known colours to the ink-weighted mean colour.
- The detector's own error is measured on real renderings (`own_accuracy`); a model cannot do better than that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moe_core.data.embedded import CELLS, COLOURS, DIGIT_NAMES, DIGIT_PIXELS, Scene
from moe_core.errors import DataError
from moe_core.metrics.classifier import DigitClassifier
from moe_core.metrics.geneval import is_correct

MIN_INK = 8.0
"""Least ink of an object, in units of one fully lit pixel of 64."""


@dataclass(frozen=True)
class Detection:
    """One digit found in a scene."""

    name: str
    """Class, as in GenEval's records: "seven"."""
    color: str
    row: int
    """0 top, 1 bottom."""
    column: int
    """0 left, 1 right."""
    confidence: float
    """The classifier's probability of the class."""


@torch.inference_mode()
def detect(images: NDArray[np.uint8], classifier: DigitClassifier) -> list[list[Detection]]:
    """The digits in pictures [B, S, S, 3] of uint8, S a multiple of 16. Raises DataError for another shape or type."""
    if (
        images.ndim != 4
        or images.shape[3] != 3
        or images.shape[1] != images.shape[2]
        or images.shape[1] % (2 * DIGIT_PIXELS)
        or images.dtype != np.uint8
    ):
        raise DataError(
            f"images are {images.dtype} {list(images.shape)};"
            f" they must be uint8 [B, S, S, 3] with S a multiple of {2 * DIGIT_PIXELS}"
        )
    count, side = images.shape[0], images.shape[1]
    scale = side // (2 * DIGIT_PIXELS)
    small = (
        images.astype(np.float32).reshape(count, 2 * DIGIT_PIXELS, scale, 2 * DIGIT_PIXELS, scale, 3).mean((2, 4)) / 255
    )
    cells = (
        small.reshape(count, 2, DIGIT_PIXELS, 2, DIGIT_PIXELS, 3)
        .swapaxes(2, 3)
        .reshape(count * CELLS, DIGIT_PIXELS, DIGIT_PIXELS, 3)
    )
    ink = cells.max(3)
    probabilities = classifier(torch.from_numpy(ink)[:, None]).softmax(1).numpy()
    found: list[list[Detection]] = [[] for _ in range(count)]
    for cell in np.flatnonzero(ink.sum((1, 2)) > MIN_INK):
        picture, place = divmod(int(cell), CELLS)
        row, column = divmod(place, 2)
        best = int(probabilities[cell].argmax())
        found[picture].append(
            Detection(DIGIT_NAMES[best], _colour(cells[cell], ink[cell]), row, column, float(probabilities[cell, best]))
        )
    return found


def own_accuracy(scenes: Sequence[Scene], classifier: DigitClassifier) -> float:
    """Share of real scenes that are found to be what their own record says: the ceiling of every model."""
    found = detect(np.stack([scene.image for scene in scenes]), classifier)
    return float(
        np.mean([is_correct(scene.record, detections) for scene, detections in zip(scenes, found, strict=True)])
    )


def as_dicts(detections: Sequence[Detection]) -> list[dict[str, Any]]:
    """For JSON."""
    return [
        {"class": d.name, "color": d.color, "row": d.row, "column": d.column, "confidence": round(d.confidence, 4)}
        for d in detections
    ]


def _colour(pixels: NDArray[np.float32], ink: NDArray[np.float32]) -> str:
    """Nearest known colour of a cell [8, 8, 3], weighted by its ink [8, 8], brightness left out."""
    mean = (pixels * ink[:, :, None]).sum((0, 1))
    mean = mean / mean.max()
    return min(COLOURS, key=lambda name: float(((np.array(COLOURS[name]) - mean) ** 2).sum()))
