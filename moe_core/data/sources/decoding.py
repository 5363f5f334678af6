"""Decodes images that others have made, and cuts them to a bucket: sizes are checked before anything is decompressed.

- A picture goes to the bucket of the nearest aspect ratio, is cut there centred, and resized (bicubic).
- A JPEG at least twice as large as its bucket is decoded at a half, a quarter or an eighth, still no smaller than twice the
  bucket: libjpeg leaves out what the resizing would, at a fraction of the time. Other formats are decoded whole.
- Of 16 bits the upper eight are kept. Transparency is dropped: a pixel has the colour that is stored under it.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from moe_core.config import FiltersConfig
from moe_core.data.sources.records import size_reject
from moe_core.data.sources.samples import Reject, Sample

MAX_PIXELS = 64_000_000
"""Largest image that is decoded; beyond that it counts as a decompression bomb."""
_FORMATS = ("PNG", "JPEG", "WEBP")
_ORIENTATION = 0x0112
_TURNED = range(5, 9)
"""EXIF orientations that exchange width and height."""
_SPARE = 2
"""How many times the bucket's sides a JPEG must keep when it is decoded smaller."""


@dataclass(frozen=True)
class Picture:
    """uint8 [height, width, 3] of the bucket with this number."""

    bucket: int
    pixels: NDArray[np.uint8]


def nearest(width: float, height: float, buckets: Sequence[tuple[int, int]]) -> int:
    """The number of the bucket [width, height] whose aspect ratio is nearest by factor; of two as near, the first."""
    ratio = math.log(width / height)
    return min(range(len(buckets)), key=lambda i: abs(math.log(buckets[i][0] / buckets[i][1]) - ratio))


def decode(sample: Sample, buckets: Sequence[tuple[int, int]], filters: FiltersConfig) -> Picture | Reject:
    """The picture in its bucket, or why there is none: not wanted, too large to decode, or broken."""
    try:
        with warnings.catch_warnings():
            # Pillow warns of large pictures below its own limit, which are checked here, and of odd metadata.
            warnings.simplefilter("ignore")
            return _decode(sample, buckets, filters)
    except MemoryError:
        raise
    except Image.DecompressionBombError as error:
        return Reject(sample.key, "oversized_image", f"{sample.key}: {error}; at most {MAX_PIXELS} pixels are decoded")
    except Exception as error:  # noqa: BLE001 - Pillow's decoders raise whatever hostile bytes lead them to; the bytes are at fault
        return Reject(
            sample.key,
            "broken_image",
            f"{sample.key}: image of {len(sample.image)} bytes cannot be decoded ({str(error) or type(error).__name__});"
            " it must be PNG, JPEG or WebP",
        )


def _decode(sample: Sample, buckets: Sequence[tuple[int, int]], filters: FiltersConfig) -> Picture | Reject:
    image = Image.open(io.BytesIO(sample.image), formats=_FORMATS)
    width, height = image.size
    if width * height > MAX_PIXELS:
        size = f"{width} x {height} = {width * height} pixels"
        return Reject(sample.key, "oversized_image", f"{sample.key}: image is {size}; at most {MAX_PIXELS} are decoded")
    if unwanted := size_reject(sample.key, width, height, filters):
        return unwanted
    turned = image.getexif().get(_ORIENTATION) in _TURNED
    number = nearest(*((height, width) if turned else (width, height)), buckets)
    bucket = buckets[number]
    needed = bucket[::-1] if turned else bucket
    image.draft(None, (needed[0] * _SPARE, needed[1] * _SPARE))
    ImageOps.exif_transpose(image, in_place=True)
    # Both would copy a picture that they do not change.
    picture: Image.Image = image if image.mode == "RGB" else _rgb(image)
    if picture.size != bucket:
        picture = ImageOps.fit(picture, bucket, Image.Resampling.BICUBIC)
    return Picture(number, np.asarray(picture))


def _rgb(image: Image.Image) -> Image.Image:
    """The picture in mode RGB; raises ValueError if nothing says which of its values is white."""
    if image.mode.startswith("I;16"):
        # `convert` would make everything from 255 on white. Pillow keeps the upper byte of 16-bit colour, so grey is cut likewise.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"its mode {image.mode} has no white")
    return image.convert("RGB")
