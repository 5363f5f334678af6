"""Decoding and buckets: what is cut, what is turned, what is decoded smaller, what is refused unread."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from moe_core.config import FiltersConfig
from moe_core.data.sources import decoding
from moe_core.data.sources.decoding import Picture, decode, nearest
from moe_core.data.sources.samples import Reject, Sample
from tests.moe_core.sources_made import FILTERS, bomb, image, png

BUCKETS = ((64, 64), (96, 48), (48, 96))


def _decoded(content: bytes, *buckets: tuple[int, int]) -> Picture:
    picture = decode(Sample("k", content, "x"), buckets or BUCKETS, FILTERS)
    assert isinstance(picture, Picture), picture
    return picture


def _photo(width: int, height: int, quality: int = 95) -> bytes:
    """Something with shapes and grain."""
    rng = np.random.default_rng(width * height)
    soft = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    grainy = np.clip(np.asarray(soft) + rng.integers(-20, 21, (height, width, 1)), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(grainy).save(file, "JPEG", quality=quality)
    return file.getvalue()


def test_pictures_are_cut_centred_and_resized():
    picture = _decoded(image(40, 20), (16, 16))
    assert picture.pixels.shape == (16, 16, 3)
    assert np.array_equal(picture.pixels[8, 8], (200, 30, 10))


@pytest.mark.parametrize(
    ("size", "bucket"),
    [((300, 300), 0), ((270, 200), 0), ((400, 200), 1), ((1000, 10), 1), ((200, 400), 2), ((30, 40), 0)],
)
def test_a_picture_goes_to_the_nearest_aspect_ratio(size: tuple[int, int], bucket: int):
    picture = _decoded(image(*size))
    assert picture.bucket == bucket
    assert picture.pixels.shape == (*BUCKETS[bucket][::-1], 3)


def test_nearest_is_by_factor_and_of_two_as_near_the_first():
    assert nearest(1, 1, ((1, 2), (2, 1))) == 0
    assert nearest(1.41, 1, ((1, 1), (2, 1))) == 0
    assert nearest(1.42, 1, ((1, 1), (2, 1))) == 1
    assert nearest(1, 3, ((1, 1), (1, 2), (1, 4))) == 2


def test_a_turned_picture_goes_to_the_bucket_of_how_it_is_seen():
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = _decoded(image(400, 200, kind="JPEG", exif=exif.tobytes()))
    assert picture.bucket == 2
    assert picture.pixels.shape == (96, 48, 3)


@pytest.mark.parametrize("size", [(64, 64), (127, 127), (128, 128), (256, 300), (1000, 600), (600, 1000)])
def test_a_jpeg_decoded_smaller_looks_as_one_decoded_whole(size: tuple[int, int]):
    content = _photo(*size)
    picture = _decoded(content)
    bucket = BUCKETS[picture.bucket]
    whole = ImageOps.fit(Image.open(io.BytesIO(content)).convert("RGB"), bucket, Image.Resampling.BICUBIC)
    error = np.abs(picture.pixels.astype(int) - np.asarray(whole).astype(int))
    assert error.mean() < 1.5
    assert error.max() < 24
    if min(size) < 128:
        assert not error.any()


def test_other_formats_are_decoded_whole():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (400, 400, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    expected = ImageOps.fit(Image.fromarray(pixels), (64, 64), Image.Resampling.BICUBIC)
    assert np.array_equal(_decoded(file.getvalue()).pixels, np.asarray(expected))


def _saved(picture: Image.Image, kind: str = "PNG", **more: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **more)
    return file.getvalue()


def test_16_bit_grey_is_scaled():
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    content = _saved(Image.fromarray(ramp))
    assert Image.open(io.BytesIO(content)).mode == "I;16"
    pixels = _decoded(content, (256, 256)).pixels
    assert np.array_equal(pixels, np.repeat(ramp[..., None] // 256, 3, 2))
    assert pixels.mean() == 127.5


def test_16_bit_grey_is_the_grey_of_16_bit_colour():
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 65536, (64, 64)).astype(">u2")
    assert np.array_equal(_decoded(png(grey, 16, 0)).pixels, _decoded(png(np.repeat(grey, 3, 1), 16, 2)).pixels)


def test_16_bit_grey_is_turned_and_resized():
    exif = Image.Exif()
    exif[0x0112] = 6
    ramp = np.repeat(np.linspace(0, 65535, 400).astype(np.uint16)[None], 200, 0)
    picture = _decoded(_saved(Image.fromarray(ramp), exif=exif.tobytes()))
    assert picture.pixels.shape == (96, 48, 3)
    assert np.abs(picture.pixels[:, 24, 0] - np.linspace(0, 255, 96)).max() < 3


@pytest.mark.parametrize("mode", ["LA", "RGBA", "P"])
def test_transparency_is_dropped(mode: str):
    grey = np.tile(np.arange(64, dtype=np.uint8) * 4, (64, 1))
    picture = Image.fromarray(grey)
    if mode == "P":
        content = _saved(picture.convert("P"), transparency=bytes(range(256)))
    else:
        picture = picture.convert(mode)
        picture.putalpha(Image.fromarray(grey.T.copy()))
        content = _saved(picture)
    assert Image.open(io.BytesIO(content)).mode == mode
    assert np.array_equal(_decoded(content).pixels, np.repeat(grey[..., None], 3, 2))


def test_a_jpeg_of_printing_inks_has_the_colours_seen():
    inks = Image.new("CMYK", (64, 64), (0, 255, 255, 0))
    red = _decoded(_saved(inks, "JPEG")).pixels.astype(int)
    assert np.abs(red - (255, 0, 0)).max() < 4


@pytest.mark.parametrize("mode", ["I", "F"])
def test_values_without_a_white_are_refused(mode: str, monkeypatch: pytest.MonkeyPatch):
    sample = Sample("k", _saved(Image.new(mode, (64, 64), 1000), "TIFF"), "x")
    found = decode(sample, BUCKETS, FILTERS)
    assert isinstance(found, Reject)
    assert found.reason == "broken_image"
    # Whatever format they come in.
    monkeypatch.setattr(decoding, "_FORMATS", ("TIFF",))
    found = decode(sample, BUCKETS, FILTERS)
    assert isinstance(found, Reject)
    assert found.reason == "broken_image"
    assert f"mode {mode} has no white" in found.detail


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "broken_image"),
        (b"GIF89a" + b"0" * 50, "broken_image"),
        (_photo(200, 200)[:900], "broken_image"),
        (bomb(), "oversized_image"),
        (image()[:50], "broken_image"),
    ],
)
def test_what_is_no_picture_is_a_reject(content: bytes, reason: str):
    found = decode(Sample("k", content, "x"), BUCKETS, FILTERS)
    assert isinstance(found, Reject)
    assert (found.key, found.reason) == ("k", reason)


def test_bytes_changed_at_random_give_a_picture_or_a_reject():
    rng = np.random.default_rng(1)
    originals = [_photo(90, 70), image(50, 40), image(50, 40, kind="WEBP")]
    rejects = 0
    for number in range(300):
        content = bytearray(originals[number % 3])
        for place in rng.integers(0, len(content), rng.integers(1, 12)):
            content[place] = rng.integers(256)
        rejects += isinstance(decode(Sample("k", bytes(content), "x"), BUCKETS, FILTERS), Reject)
    assert 0 < rejects < 300


def test_size_is_judged_by_the_header_alone():
    filters = FiltersConfig(min_side=60)
    cut = _photo(200, 50)[:900]
    found = decode(Sample("k", cut, "x"), BUCKETS, filters)
    assert isinstance(found, Reject)
    assert found.reason == "min_side"
