"""How alike two pictures are: PSNR, SSIM, and a distance in the digit classifier's feature maps.

- All compare a picture with a reference from the same prompt and noise; another, equally good picture is punished.
- Each picture alone: a row does not depend on its neighbours.
- PSNR and SSIM are for pictures of any size; the feature distance is for scenes of digits alone, where LPIPS' own networks see nothing.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from moe_core.errors import DataError
from moe_core.metrics.classifier import DigitClassifier
from moe_core.metrics.scene_detector import cut_cells

Pictures = NDArray[np.uint8]
PSNR_CAP = 10 * math.log10(12 * 255**2)
"""58.9 dB: the mean square error of rounding to 8 bits, a twelfth of a level squared."""
SMALL_SIDE = 64
"""Shorter sides have SSIM's small window."""
SMALL_WINDOW = 7
_LARGE_WINDOW, _LARGE_SIGMA = 11, 1.5
_EPSILON = 1e-10


def psnr(made: Pictures, reference: Pictures) -> NDArray[np.float64]:
    """Peak signal-to-noise ratio a picture in dB, [N], of uint8 [N, H, W, 3]; mean square error over pixels and channels.

    Identical pictures would have infinitely many dB, and one of them would make the mean infinite. So the error is taken to be at least
    that of rounding to 8 bits: no picture has more than `PSNR_CAP`. Raises DataError if the shapes differ or there is no picture.
    """
    return np.array(
        [
            min(float(peak_signal_noise_ratio(one, other, data_range=1.0)), PSNR_CAP)
            for one, other in _pairs(made, reference)
        ]
    )


def ssim(made: Pictures, reference: Pictures) -> NDArray[np.float64]:
    """Structural similarity a picture, [N], of uint8 [N, H, W, 3]; 1 is the same (Wang et al. 2004).

    Mean over the three channels and all places, edges mirrored (torchmetrics). Window: 11 x 11 Gaussian of sigma 1.5, the paper's, where
    both sides are at least `SMALL_SIDE`; else 7 x 7 uniform, as 11 pixels are more than a digit's cell.
    Raises DataError as `psnr` does, and for a side under `SMALL_WINDOW`.
    """
    pairs = _pairs(made, reference)
    short = min(made.shape[1:3])
    if short < SMALL_WINDOW:
        raise DataError(
            f"pictures are {list(made.shape[1:3])} pixels; SSIM's window needs at least {SMALL_WINDOW} a side"
        )
    small = short < SMALL_SIDE
    return np.array(
        [
            float(
                structural_similarity_index_measure(
                    one,
                    other,
                    gaussian_kernel=not small,
                    sigma=_LARGE_SIGMA,
                    kernel_size=SMALL_WINDOW if small else _LARGE_WINDOW,
                    data_range=1.0,
                )
            )
            for one, other in pairs
        ]
    )


@torch.inference_mode()
def feature_distance(
    made: Pictures, reference: Pictures, classifier: DigitClassifier, grid: int
) -> NDArray[np.float64]:
    """Distance of scenes uint8 [N, S, S, 3] in the classifier's feature maps, [N], from 0 to 2.

    LPIPS without learned weights (Zhang et al. 2018, eq. 1 with w = 1): after each convolution's ReLU, features are scaled to unit
    length at every place; squared differences are summed over channels, then averaged over places and over the three layers (LPIPS
    sums over layers). Each colour channel of a cell is read as ink, and cells and channels are averaged: so colour counts.
    Raises DataError as `psnr` does, and for an S that is no multiple of 8 * grid.
    """
    _check(made, reference)
    ours, theirs = (_unit_maps(pictures, classifier, grid) for pictures in (made, reference))
    layers = [
        (one - other).square().sum(1).mean((1, 2)).unflatten(0, (len(made), -1)).mean(1)
        for one, other in zip(ours, theirs, strict=True)
    ]
    return torch.stack(layers).mean(0).double().numpy()


def _unit_maps(pictures: Pictures, classifier: DigitClassifier, grid: int) -> list[Tensor]:
    """Of each layer [N * cells * 3, C, H, W], of unit length over C."""
    maps = []
    x = cut_cells(pictures, grid).flatten(0, 1)[:, None]
    for module in classifier.eval().convolutions:
        if isinstance(module, nn.Flatten):
            break
        x = module(x)
        if isinstance(module, nn.ReLU):
            maps.append(F.normalize(x, dim=1, eps=_EPSILON))
    return maps


def _pairs(made: Pictures, reference: Pictures) -> list[tuple[Tensor, Tensor]]:
    """As float64 [1, 3, H, W] in [0, 1]."""
    _check(made, reference)
    return [(_scaled(one), _scaled(other)) for one, other in zip(made, reference, strict=True)]


def _scaled(picture: Pictures) -> Tensor:
    return torch.from_numpy(picture).permute(2, 0, 1)[None].double() / 255


def _check(made: Pictures, reference: Pictures) -> None:
    if made.shape != reference.shape or made.ndim != 4 or made.shape[-1] != 3 or not len(made):
        raise DataError(
            f"pictures are {list(made.shape)} and the reference {list(reference.shape)};"
            " both must be the same [N, H, W, 3], with at least one picture"
        )
    if made.dtype != np.uint8 or reference.dtype != np.uint8:
        raise DataError(f"pictures are {made.dtype} and the reference {reference.dtype}; both must be uint8")
