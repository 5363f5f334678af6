"""Pictures and prompts made worse in steps, to see whether a metric notices: a metric that does not fall says nothing of that fault.

- Three kinds: `blur` takes detail away, `noise` adds what is not there, `swap` leaves the pictures as they are and asks for something else.
- Five levels, 0 to 4; level 0 changes nothing. The idea is that of Heusel et al. 2017, fig. 3.
- Deterministic. A picture has the same noise at every level, only stronger, so that levels differ in strength alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageFilter

from moe_core.errors import DataError
from moe_core.metrics.scorer import Prompt

KINDS = ("blur", "noise", "swap")
LEVELS = (0, 1, 2, 3, 4)
BLUR = (0.0, 1 / 64, 1 / 32, 1 / 16, 1 / 8)
"""Standard deviation of the Gaussian, in shares of the picture's shorter side: a quarter to two pixels of 16."""
NOISE = (0.0, 0.05, 0.1, 0.2, 0.4)
"""Standard deviation of the Gaussian noise, in shares of the full range."""
SWAP = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Share of the pictures that are given another's prompt."""
_SEED = 20_240_607


def corrupt(
    images: Sequence[Image.Image], prompts: Sequence[Prompt], kind: str, level: int
) -> tuple[list[Image.Image], list[Prompt]]:
    """The pictures, RGB, and the prompt of each, made worse. New lists; no picture is changed in place.

    `swap`: prompts change places among a share of the pictures, each for one of another text, so that the set of prompts stays as it is.
    Raises DataError for an unknown kind or level, unequal lengths, or too few different prompts to swap.
    """
    if kind not in KINDS or level not in LEVELS:
        raise DataError(
            f"corruption is '{kind}' at level {level}; it must be one of {', '.join(KINDS)} at level 0 to 4"
        )
    if len(images) != len(prompts):
        raise DataError(f"there are {len(images)} pictures and {len(prompts)} prompts; each picture has one prompt")
    if level == 0:
        return list(images), list(prompts)
    if kind == "blur":
        return [_blurred(image, BLUR[level]) for image in images], list(prompts)
    if kind == "noise":
        return [_noisy(image, NOISE[level], number) for number, image in enumerate(images)], list(prompts)
    return list(images), _swapped(prompts, SWAP[level])


def _blurred(image: Image.Image, share: float) -> Image.Image:
    return image.convert("RGB").filter(ImageFilter.GaussianBlur(share * min(image.size)))


def _noisy(image: Image.Image, deviation: float, number: int) -> Image.Image:
    pixels = np.asarray(image.convert("RGB"), np.float64)
    noise = np.random.default_rng([_SEED, number]).standard_normal(pixels.shape)
    return Image.fromarray(np.round(pixels + 255 * deviation * noise).clip(0, 255).astype(np.uint8))


def _swapped(prompts: Sequence[Prompt], share: float) -> list[Prompt]:
    # The pictures of a lower level are among those of a higher one.
    chosen = np.random.default_rng(_SEED).permutation(len(prompts))[: round(share * len(prompts))]
    # In the order of their texts, half the way round is another text, unless one text has more than half of all.
    order = sorted(chosen.tolist(), key=lambda row: (prompts[row].text, row))
    half = len(order) // 2
    swapped = list(prompts)
    for place, row in enumerate(order):
        swapped[row] = prompts[order[(place + half) % len(order)]]
        if swapped[row].text == prompts[row].text:
            raise DataError(
                f"'{prompts[row].text}' cannot be swapped for another prompt among {len(order)} of {len(prompts)};"
                " at least two must be swapped, and no text may have more than half of them"
            )
    return swapped
