"""Scenes are deterministic, show what their records say, and share no digit with the evaluator."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from moe_core.config import KINDS, EmbeddedDataConfig
from moe_core.data import embedded
from moe_core.data.sources import decoding, webdataset
from moe_core.data.sources.samples import Sample
from moe_core.errors import DataError
from tests.moe_core.sources_made import FIELDS, FILTERS


def _config(**changes: object) -> EmbeddedDataConfig:
    return EmbeddedDataConfig.model_validate({"samples": 12, "kinds": KINDS, "generator_share": 0.4, **changes})


def test_a_scene_is_a_function_of_seed_and_index():
    config = _config()
    once, again = embedded.make_scene(config, 3, 17), embedded.make_scene(config, 3, 17)
    assert np.array_equal(once.image, again.image)
    assert once.record == again.record
    others = [embedded.make_scene(config, seed, index) for seed, index in ((4, 17), (3, 18))]
    assert all(not np.array_equal(once.image, other.image) for other in others)


def test_generator_and_evaluator_share_no_digit():
    config = _config()
    ours, _ = embedded.generator_digits(config)
    theirs, _ = embedded.evaluator_digits(config)
    assert len(ours) + len(theirs) == 1797
    assert not {image.tobytes() for image in ours} & {image.tobytes() for image in theirs}


def test_a_picture_shows_as_many_digits_as_its_record_asks_for():
    config = _config()
    for index in range(120):
        scene = embedded.make_scene(config, 0, index)
        cells = scene.image.reshape(2, 8, 2, 8, 3).swapaxes(1, 2).reshape(4, -1)
        assert np.count_nonzero(cells.sum(1)) == sum(item["count"] for item in scene.record["include"])


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_its_own_record(kind: str):
    (record,) = embedded.make_prompts(_config(kinds=(kind,)), 0, 1)
    assert record["tag"] == kind
    assert record["prompt"]
    has = {key for item in record["include"] for key in item}
    assert ("color" in has) == (kind in ("colors", "color_attr"))
    assert ("position" in has) == (kind == "position")


@pytest.mark.parametrize("kinds", [KINDS, (*KINDS, "two_object", "color_attr")])
def test_prompts_are_dealt_evenly_over_the_kinds(kinds):
    tags = [record["tag"] for record in embedded.make_prompts(_config(kinds=kinds), 0, 60)]
    assert {tag: tags.count(tag) for tag in KINDS} == dict.fromkeys(KINDS, 10)


def test_articles_go_by_sound():
    prompts = " ".join(record["prompt"] for record in embedded.make_prompts(_config(), 1, 600))
    assert "a one" in prompts
    assert "an eight" in prompts
    assert "an one" not in prompts
    assert "a eight" not in prompts


def test_the_vocabulary_holds_every_word_of_every_prompt():
    known = {word for caption in embedded.captions_vocabulary() for word in caption.split()}
    used = {word for record in embedded.make_prompts(_config(), 1, 600) for word in record["prompt"].split()}
    assert used <= known


def test_the_source_is_the_same_bytes_twice_and_reads_back(tmp_path: Path):
    config = _config()
    hashes = []
    for name in ("a", "b"):
        (tar,) = embedded.write_source(tmp_path / name, config, seed=5)
        hashes.append(hashlib.sha256(tar.read_bytes()).hexdigest())
    assert hashes[0] == hashes[1]
    samples = list(webdataset.read_samples(tmp_path / "a" / "embedded-000000.tar", "a", FIELDS, FILTERS))
    assert len(samples) == 12
    for index, sample in enumerate(samples):
        assert isinstance(sample, Sample)
        scene = embedded.make_scene(config, 5, index)
        assert sample.caption == scene.prompt
        assert sample.meta == scene.record
        picture = decoding.decode(sample, ((16, 16),), FILTERS)
        assert isinstance(picture, decoding.Picture)
        assert np.array_equal(picture.pixels, scene.image)


def test_a_larger_canvas_shows_the_same_scene_larger():
    small = embedded.make_scene(_config(), 0, 0).image
    large = embedded.make_scene(_config(canvas=32), 0, 0).image
    assert np.array_equal(large, small.repeat(2, 0).repeat(2, 1))


def test_a_grid_of_one_shows_one_large_digit():
    config = _config(grid=1, kinds=("single_object", "colors"), max_digits=1)
    scene = embedded.make_scene(config, 0, 0)
    assert scene.image.shape == (16, 16, 3)
    assert np.array_equal(scene.image, scene.image[::2, ::2].repeat(2, 0).repeat(2, 1))
    assert scene.image.any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"canvas": 20}, "canvas is 20"),
        ({"grid": 1, "kinds": ("position",)}, "grid 1"),
        ({"colours": ("red", "mauve")}, "mauve"),
        ({"kinds": ("two_object",), "max_digits": 1}, "max_digits is 1"),
    ],
)
def test_impossible_scenes_are_refused(tmp_path: Path, changes: dict[str, object], message: str):
    with pytest.raises(DataError, match=message):
        embedded.write_source(tmp_path, _config(**changes), seed=0)
