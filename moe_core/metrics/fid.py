"""Frechet distance in the classifier's feature space, by torchmetrics.

Inception's features say nothing of 16-pixel scenes; those of the digit classifier do. A picture's features: the mean
over its cells of [last hidden layer of the cell's ink, cell's mean colour], 67 numbers, so that a few hundred
pictures determine the covariance.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from moe_core.errors import DataError
from moe_core.metrics.classifier import FEATURES, DigitClassifier
from moe_core.metrics.scene_detector import cut_cells

MIN_PICTURES = 2
_BATCH = 256


class SceneFeatures(nn.Module):
    """uint8 [B, 3, S, S] of `grid` x `grid` cells -> [B, 67]."""

    num_features = FEATURES + 3

    def __init__(self, classifier: DigitClassifier, grid: int) -> None:
        super().__init__()
        self.classifier = classifier.eval()
        self.grid = grid

    def forward(self, pictures: Tensor) -> Tensor:
        """Features of whole scenes."""
        cells = cut_cells(pictures.permute(0, 2, 3, 1).numpy(), self.grid)
        ink = self.classifier.features(cells.amax(1, keepdim=True))
        return torch.cat([ink, cells.mean((2, 3))], 1).unflatten(0, (-1, self.grid**2)).mean(1)


@torch.inference_mode()
def features(pictures: NDArray[np.uint8], classifier: DigitClassifier, grid: int) -> NDArray[np.float32]:
    """Of pictures uint8 [N, S, S, 3]: [N, 67]."""
    extractor = SceneFeatures(classifier, grid)
    parts = torch.from_numpy(pictures).permute(0, 3, 1, 2).split(_BATCH)
    return torch.cat([extractor(part) for part in parts]).numpy().astype(np.float32)


@torch.inference_mode()
def frechet_distance(real: NDArray[np.uint8], made: NDArray[np.uint8], classifier: DigitClassifier, grid: int) -> float:
    """Distance between real and made pictures, uint8 [N, S, S, 3]. Raises DataError for fewer than two of either."""
    for name, pictures in (("real", real), ("made", made)):
        if len(pictures) < MIN_PICTURES:
            raise DataError(f"there are {len(pictures)} {name} pictures; the distance needs at least {MIN_PICTURES}")
    metric = FrechetInceptionDistance(feature=SceneFeatures(classifier, grid))
    for pictures, is_real in ((real, True), (made, False)):
        for part in torch.from_numpy(pictures).permute(0, 3, 1, 2).split(_BATCH):
            metric.update(part, real=is_real)
    return float(metric.compute())
