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

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from moe_core.data.embedded import COLOURS, DIGIT_NAMES, DIGIT_PIXELS, Scene
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
def detect(images: NDArray[np.uint8], classifier: DigitClassifier, grid: int) -> list[list[Detection]]:
    """The digits in pictures uint8 [B, S, S, 3] of `grid` x `grid` cells.

    Raises DataError for another type or shape, or an S that is no multiple of 8 * grid.
    """
    cells = cut_cells(images, grid)
    ink = cells.amax(1)
    probabilities = classifier(ink[:, None]).softmax(1)
    found: list[list[Detection]] = [[] for _ in range(len(images))]
    for cell in torch.nonzero(ink.sum((1, 2)) > MIN_INK).flatten().tolist():
        picture, place = divmod(cell, grid**2)
        row, column = divmod(place, grid)
        confidence, digit = probabilities[cell].max(0)
        colour = _colour(cells[cell].numpy(), ink[cell].numpy())
        found[picture].append(Detection(DIGIT_NAMES[int(digit)], colour, row, column, float(confidence)))
    return found


def cut_cells(images: NDArray[np.uint8], grid: int) -> Tensor:
    """Pictures uint8 [B, S, S, 3] -> their cells, row by row, at a digit's size: [B * grid^2, 3, 8, 8] in [0, 1]."""
    unit = grid * DIGIT_PIXELS
    square = images.ndim == 4 and images.shape[3] == 3 and images.shape[1] == images.shape[2]
    if images.dtype != np.uint8 or not square or images.shape[1] % unit:
        raise DataError(
            f"images are {images.dtype} {list(images.shape)};"
            f" they must be uint8 [B, S, S, 3] with S a multiple of {unit}"
        )
    small = F.adaptive_avg_pool2d(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255, unit)
    cells = small.unflatten(3, (grid, DIGIT_PIXELS)).unflatten(2, (grid, DIGIT_PIXELS))
    return cells.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)


def own_accuracy(scenes: Sequence[Scene], classifier: DigitClassifier, grid: int) -> float:
    """Share of real scenes that are found to be what their own record says: the ceiling of every model."""
    found = detect(np.stack([scene.image for scene in scenes]), classifier, grid)
    correct = [is_correct(scene.record, detections) for scene, detections in zip(scenes, found, strict=True)]
    return float(np.mean(correct))


def _colour(pixels: NDArray[np.float32], ink: NDArray[np.float32]) -> str:
    """Nearest known colour of a cell [3, 8, 8], weighted by its ink [8, 8], brightness left out."""
    mean = (pixels * ink).sum((1, 2))
    mean = mean / mean.max()
    return min(COLOURS, key=lambda name: float(((np.array(COLOURS[name]) - mean) ** 2).sum()))
