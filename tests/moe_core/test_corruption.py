"""Corrupted pictures and prompts: in steps, the same every time, and only what the kind says."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from moe_core.errors import DataError
from moe_core.metrics.corruption import KINDS, LEVELS, NOISE, corrupt
from moe_core.metrics.scorer import Prompt


def _images(count: int, side: tuple[int, int] = (16, 16)) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (side[1], side[0], 3), dtype=np.uint8)) for _ in range(count)]


def _prompts(texts: list[str]) -> list[Prompt]:
    return [Prompt(str(place), text) for place, text in enumerate(texts)]


PROMPTS = _prompts([f"a {n}" for n in range(5)] * 4)


def _pixels(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image, np.float64) for image in images])


@pytest.mark.parametrize("kind", KINDS)
def test_level_0_changes_nothing_and_every_level_is_the_same_again(kind: str):
    images = _images(20)
    for level in LEVELS:
        once, again = (corrupt(images, PROMPTS, kind, level) for _ in range(2))
        assert (_pixels(once[0]) == _pixels(again[0])).all()
        assert once[1] == again[1]
        unchanged = (_pixels(once[0]) == _pixels(images)).all() and once[1] == PROMPTS
        assert unchanged == (level == 0)
    assert (_pixels(images) == _pixels(_images(20))).all()


@pytest.mark.parametrize("kind", ["blur", "noise"])
@pytest.mark.parametrize("side", [(16, 16), (48, 32)])
def test_pictures_go_further_from_the_original_with_each_level(kind: str, side: tuple[int, int]):
    images = _images(5, side)
    errors = []
    for level in LEVELS:
        made, prompts = corrupt(images, PROMPTS[:5], kind, level)
        assert prompts == PROMPTS[:5]
        assert {(image.size, image.mode) for image in made} == {(side, "RGB")}
        errors.append(((_pixels(made) - _pixels(images)) ** 2).mean())
    assert all(less < more for less, more in pairwise(errors))


def test_noise_has_its_deviation_and_differs_between_pictures():
    grey = [Image.new("RGB", (64, 64), (128, 128, 128))] * 3
    for level in (1, 2):
        noise = _pixels(corrupt(grey, PROMPTS[:3], "noise", level)[0]) - 128
        assert noise.std() == pytest.approx(255 * NOISE[level], rel=0.02)
        assert abs(np.corrcoef(noise[0].ravel(), noise[1].ravel())[0, 1]) < 0.05


def test_blur_is_a_share_of_the_side():
    # A step edge in the middle: its width grows with the picture.
    widths = []
    for side in (64, 256):
        picture = np.zeros((side, side, 3), np.uint8)
        picture[:, side // 2 :] = 255
        (blurred,), _ = corrupt([Image.fromarray(picture)], PROMPTS[:1], "blur", 3)
        row = np.asarray(blurred)[side // 2, :, 0] / 255
        widths.append((np.searchsorted(row, 0.84) - np.searchsorted(row, 0.16)) / side)
    assert widths == pytest.approx([2 / 16, 2 / 16], abs=0.03)


def test_a_swap_exchanges_a_share_of_prompts_for_other_texts():
    images = _images(20)
    before: set[int] = set()
    for level, count in zip(LEVELS, (0, 5, 10, 15, 20), strict=True):
        made, prompts = corrupt(images, PROMPTS, "swap", level)
        assert made == images
        changed = {row for row in range(20) if prompts[row] != PROMPTS[row]}
        assert len(changed) == count
        assert all(prompts[row].text != PROMPTS[row].text for row in changed)
        assert sorted(p.id for p in prompts) == sorted(p.id for p in PROMPTS)
        assert before <= changed
        before = changed


def test_faults_are_named():
    images = _images(4)
    for kind, level in (("fog", 1), ("blur", 5)):
        with pytest.raises(DataError, match=f"'{kind}' at level {level}"):
            corrupt(images, PROMPTS[:4], kind, level)
    with pytest.raises(DataError, match="4 pictures and 3 prompts"):
        corrupt(images, PROMPTS[:3], "blur", 1)
    with pytest.raises(DataError, match="more than half"):
        corrupt(images, _prompts(["a", "a", "a", "b"]), "swap", 4)
    with pytest.raises(DataError, match="at least two"):
        corrupt(images, PROMPTS[:4], "swap", 1)
