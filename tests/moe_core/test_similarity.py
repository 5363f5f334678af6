"""PSNR, SSIM and the feature distance against slow references on small pictures."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moe_core.config import EmbeddedDataConfig
from moe_core.data import embedded
from moe_core.errors import DataError
from moe_core.metrics.classifier import DigitClassifier
from moe_core.metrics.similarity import PSNR_CAP, SMALL_WINDOW, Pictures, feature_distance, psnr, ssim

SCENES = EmbeddedDataConfig(samples=10, kinds=("single_object", "two_object", "color_attr"), generator_share=0.4)


@pytest.fixture(scope="module")
def classifier() -> DigitClassifier:
    torch.manual_seed(0)
    made = DigitClassifier(4)
    # Statistics of their own, as after training: else batch normalisation does nothing.
    for module in made.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean, std=0.1)
            torch.nn.init.uniform_(module.bias, -0.2, 0.2)
    return made.eval()


def _scenes(first: int, count: int) -> Pictures:
    return np.stack([embedded.make_scene(SCENES, 0, first + i).image for i in range(count)])


def _noisy(pictures: Pictures, deviation: float) -> Pictures:
    noise = np.random.default_rng(0).standard_normal(pictures.shape)
    return (pictures + deviation * noise).round().clip(0, 255).astype(np.uint8)


def test_psnr_by_hand():
    black = np.zeros((2, 16, 16, 3), np.uint8)
    other = black.copy()
    other[0] = 255
    other[1, :8] = 51
    # All of the range: 0 dB. A fifth of it on half the picture: mean square 1/50.
    assert psnr(other, black) == pytest.approx([0.0, 10 * np.log10(50)])


def test_psnr_of_the_same_picture_is_that_of_rounding():
    pictures = _scenes(0, 3)
    almost = pictures.copy()
    almost[0, 0, 0, 0] ^= 1
    assert psnr(almost, pictures) == pytest.approx([PSNR_CAP] * 3)
    assert pytest.approx(58.92, abs=0.01) == PSNR_CAP


def _slow_ssim(one: np.ndarray, other: np.ndarray) -> float:
    """Uniform windows at every place of a mirrored picture, population moments."""
    pad = SMALL_WINDOW // 2
    x, y = (np.pad(p / 255.0, ((pad, pad), (pad, pad), (0, 0)), mode="reflect") for p in (one, other))
    values = []
    for top in range(one.shape[0]):
        for left in range(one.shape[1]):
            for channel in range(3):
                a = x[top : top + SMALL_WINDOW, left : left + SMALL_WINDOW, channel]
                b = y[top : top + SMALL_WINDOW, left : left + SMALL_WINDOW, channel]
                both = ((a - a.mean()) * (b - b.mean())).mean()
                light = (2 * a.mean() * b.mean() + 1e-4) / (a.mean() ** 2 + b.mean() ** 2 + 1e-4)
                values.append(light * (2 * both + 9e-4) / (a.var() + b.var() + 9e-4))
    return float(np.mean(values))


def test_ssim_of_small_pictures_is_that_of_plain_loops():
    reference = _scenes(0, 2)
    made = _noisy(reference, 30)
    slow = [_slow_ssim(one, other) for one, other in zip(made, reference, strict=True)]
    assert ssim(made, reference) == pytest.approx(slow, rel=1e-9)
    assert ssim(reference, reference) == pytest.approx([1, 1])


def test_ssim_of_larger_pictures_has_the_papers_window():
    rng = np.random.default_rng(0)
    reference = rng.integers(0, 256, (1, 64, 64, 3), dtype=np.uint8)
    made = _noisy(reference, 40)
    axis = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    window = np.outer(axis, axis) / axis.sum() ** 2
    values = []
    x, y = (np.pad(p[0] / 255.0, ((5, 5), (5, 5), (0, 0)), mode="reflect") for p in (made, reference))
    for top in range(64):
        for left in range(64):
            for channel in range(3):
                a, b = (p[top : top + 11, left : left + 11, channel] for p in (x, y))
                mean_a, mean_b = (window * a).sum(), (window * b).sum()
                var_a, var_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
                both = (window * (a - mean_a) * (b - mean_b)).sum()
                light = (2 * mean_a * mean_b + 1e-4) / (mean_a**2 + mean_b**2 + 1e-4)
                values.append(light * (2 * both + 9e-4) / (var_a + var_b + 9e-4))
    assert ssim(made, reference) == pytest.approx([np.mean(values)], rel=1e-6)


def test_feature_distance_is_that_of_plain_loops(classifier: DigitClassifier):
    made, reference = _scenes(0, 2), _scenes(5, 2)
    slow = []
    for one, other in zip(made, reference, strict=True):
        parts = []
        for top in (0, 8):
            for left in (0, 8):
                for channel in range(3):
                    maps = []
                    for picture in (one, other):
                        cell = picture[top : top + 8, left : left + 8, channel].astype(np.float32) / 255
                        x = torch.from_numpy(cell)[None, None]
                        found = []
                        for place, module in enumerate(classifier.convolutions[:10]):
                            x = module(x)
                            if place in (2, 5, 9):
                                found.append(x[0].detach().double().numpy())
                        maps.append(found)
                    for a, b in zip(*maps, strict=True):
                        unit = [m / np.maximum(np.sqrt((m**2).sum(0)), 1e-10) for m in (a, b)]
                        parts.append(((unit[0] - unit[1]) ** 2).sum(0).mean())
        slow.append(np.mean(parts))
    assert min(slow) > 0.01
    assert feature_distance(made, reference, classifier, 2) == pytest.approx(slow, rel=1e-4)


def test_feature_distance_sees_colour_and_grows_with_noise(classifier: DigitClassifier):
    pictures = _scenes(0, 4)
    assert feature_distance(pictures, pictures, classifier, 2) == pytest.approx([0] * 4)
    assert (feature_distance(pictures[..., ::-1].copy(), pictures, classifier, 2).max()) > 0.01
    steps = [feature_distance(_noisy(pictures, d), pictures, classifier, 2).mean() for d in (10, 30, 90)]
    assert steps == sorted(steps)


def test_a_row_is_the_same_in_any_batch(classifier: DigitClassifier):
    made, reference = _noisy(_scenes(0, 4), 20), _scenes(0, 4)
    for measure in (psnr, ssim, lambda a, b: feature_distance(a, b, classifier, 2)):
        assert measure(made, reference)[2:3] == pytest.approx(measure(made[2:3], reference[2:3]), rel=1e-6)


def test_faults_are_named(classifier: DigitClassifier):
    pictures = _scenes(0, 2)
    with pytest.raises(DataError, match="the same"):
        psnr(pictures, pictures[:1])
    with pytest.raises(DataError, match="float64"):
        ssim(pictures.astype(np.float64), pictures)
    with pytest.raises(DataError, match="at least 7"):
        ssim(pictures[:, :4], pictures[:, :4])
    with pytest.raises(DataError, match="multiple of 16"):
        feature_distance(pictures[:, :8, :8], pictures[:, :8, :8], classifier, 2)
