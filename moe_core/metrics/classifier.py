"""A small convolutional classifier of handwritten digits: the evaluator's eye.

- Trained on digits that no scene shows, and tested on a contiguous part of those, so that no writer's hand is in both.
- Sees ink only ([B, 1, 8, 8] in [0, 1]): colour is measured apart, in `scene_detector`.
- `features` gives its last hidden layer, in which `metrics.fid` compares distributions.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moe_core.config import ClassifierConfig
from moe_core.errors import CheckpointError, DataError

CLASSES = 10
FEATURES = 64
"""Width of the last hidden layer."""
_WEIGHTS, _CONFIG = "classifier.safetensors", "classifier.json"


class DigitClassifier(nn.Module):
    """Three convolutions and two linear layers; about 45,000 weights at width 16."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.convolutions = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(32 * width, FEATURES),
            nn.ReLU(),
        )
        self.head = nn.Linear(FEATURES, CLASSES)

    def features(self, ink: Tensor) -> Tensor:
        """[B, 1, 8, 8] ink in [0, 1] -> [B, 64]."""
        return self.convolutions(ink)

    def forward(self, ink: Tensor) -> Tensor:
        """[B, 1, 8, 8] ink in [0, 1] -> logits [B, 10]."""
        return self.head(self.features(ink))

    def save(self, folder: Path) -> None:
        """Writes weights and width into an existing folder."""
        save_file(self.state_dict(), folder / _WEIGHTS)
        (folder / _CONFIG).write_text(json.dumps({"width": self.width}) + "\n")

    @classmethod
    def load(cls, folder: Path) -> DigitClassifier:
        """Reads what `save` wrote. Raises CheckpointError if a file is missing or does not fit."""
        for name in (_WEIGHTS, _CONFIG):
            if not (folder / name).is_file():
                raise CheckpointError(f"{folder / name} is missing; a classifier folder holds {_WEIGHTS} and {_CONFIG}")
        classifier = cls(json.loads((folder / _CONFIG).read_text())["width"])
        try:
            classifier.load_state_dict(load_file(folder / _WEIGHTS))
        except RuntimeError as error:
            raise CheckpointError(
                f"{folder / _WEIGHTS} does not fit the classifier of {folder / _CONFIG}: {error}"
            ) from None
        return classifier.eval()


def train_classifier(
    images: NDArray[np.float32], classes: NDArray[np.int64], config: ClassifierConfig, seed: int
) -> tuple[DigitClassifier, dict[str, float]]:
    """Trains on the leading digits and tests on the trailing `test_share` of them.

    `images` [N, 8, 8] ink in [0, 1], `classes` [N]. Returns the classifier in eval mode and
    {"accuracy", "train_accuracy", "train_digits", "test_digits"}. Raises DataError for too few digits.
    """
    cut = len(images) - math.ceil(config.test_share * len(images))
    if len(images) != len(classes) or cut < CLASSES or len(images) - cut < 1:
        raise DataError(
            f"{len(images)} digits with {len(classes)} classes;"
            f" training needs at least {CLASSES} digits and one to test on, a class each"
        )
    ink, target = torch.from_numpy(images)[:, None], torch.from_numpy(classes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        classifier = DigitClassifier(config.width).train()
        optimizer = torch.optim.AdamW(classifier.parameters(), lr=config.learning_rate, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, config.steps)
        for _ in range(config.steps):
            rows = torch.randint(cut, (config.batch_size,), generator=generator)
            loss = F.cross_entropy(classifier(augment(ink[rows], generator)), target[rows], label_smoothing=0.05)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    classifier.eval()
    return classifier, {
        "accuracy": accuracy(classifier, images[cut:], classes[cut:]),
        "train_accuracy": accuracy(classifier, images[:cut], classes[:cut]),
        "train_digits": float(cut),
        "test_digits": float(len(images) - cut),
    }


@torch.inference_mode()
def accuracy(classifier: DigitClassifier, images: NDArray[np.float32], classes: NDArray[np.int64]) -> float:
    """Share of digits [N, 8, 8] that are read as their class [N]."""
    predicted = classifier(torch.from_numpy(images)[:, None]).argmax(1)
    return float((predicted == torch.from_numpy(classes)).float().mean())


def augment(ink: Tensor, generator: torch.Generator) -> Tensor:
    """Small random rotation, scale, shear, shift, brightness and noise: other people's hands, from few digits."""
    count = len(ink)

    def around(spread: float, *shape: int) -> Tensor:
        return (torch.rand(count, *shape, generator=generator) - 0.5) * spread

    angle, scale, shear, shift = around(0.5), 1 + around(0.3, 2), around(0.4), around(0.25, 2)
    affine = torch.zeros(count, 2, 3)
    affine[:, 0, 0], affine[:, 0, 1] = angle.cos() * scale[:, 0], shear - angle.sin()
    affine[:, 1, 0], affine[:, 1, 1] = angle.sin(), angle.cos() * scale[:, 1]
    affine[:, :, 2] = shift
    grid = F.affine_grid(affine, list(ink.shape), align_corners=False)
    moved = F.grid_sample(ink, grid, align_corners=False) * (1 + around(0.4, 1, 1, 1))
    return moved.clamp(0, 1) + 0.05 * torch.randn(ink.shape, generator=generator)
