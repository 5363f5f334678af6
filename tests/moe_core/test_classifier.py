"""The evaluator's eye on digits it has not seen, and the detector's own error on real scenes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from moe_core.config import KINDS, ClassifierConfig, EmbeddedDataConfig
from moe_core.data import embedded
from moe_core.errors import CheckpointError, DataError
from moe_core.metrics import classifier as classifiers
from moe_core.metrics import fid, fidelity, scene_detector
from moe_core.metrics.classifier import DigitClassifier

SCENES = EmbeddedDataConfig(samples=1, kinds=KINDS, generator_share=0.4)
CONFIG = ClassifierConfig(steps=400, batch_size=128, learning_rate=3e-3, width=16)


@pytest.fixture(scope="module")
def trained() -> tuple[DigitClassifier, dict[str, float]]:
    return classifiers.train_classifier(*embedded.evaluator_digits(SCENES), CONFIG, seed=0)


def test_digits_of_unseen_hands_are_read(trained: tuple[DigitClassifier, dict[str, float]]):
    classifier, metrics = trained
    assert metrics["accuracy"] >= 0.95
    assert metrics["test_digits"] > 300
    assert classifiers.accuracy(classifier, *embedded.generator_digits(SCENES)) >= 0.95


def test_training_is_a_function_of_the_seed():
    short = CONFIG.model_copy(update={"steps": 3})
    digits = embedded.evaluator_digits(SCENES)
    torch.manual_seed(3)
    first, _ = classifiers.train_classifier(*digits, short, seed=1)
    torch.manual_seed(4)
    second, _ = classifiers.train_classifier(*digits, short, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_too_few_digits_are_refused():
    images, classes = embedded.evaluator_digits(SCENES)
    with pytest.raises(DataError, match="5 digits"):
        classifiers.train_classifier(images[:5], classes[:5], CONFIG, seed=0)


def test_it_is_saved_and_loaded(trained: tuple[DigitClassifier, dict[str, float]], tmp_path: Path):
    classifier, _ = trained
    with pytest.raises(CheckpointError, match="is missing"):
        DigitClassifier.load(tmp_path)
    classifier.save(tmp_path)
    ink = torch.rand(4, 1, 8, 8)
    assert torch.equal(DigitClassifier.load(tmp_path)(ink), classifier(ink))
    (tmp_path / "classifier.json").write_text('{"width": 8}')
    with pytest.raises(CheckpointError, match="does not fit"):
        DigitClassifier.load(tmp_path)


def test_real_scenes_are_found_to_be_what_they_are(trained: tuple[DigitClassifier, dict[str, float]]):
    scenes = [embedded.make_scene(SCENES, 0, index) for index in range(300)]
    assert scene_detector.own_accuracy(scenes, trained[0], SCENES.grid) >= 0.93


@pytest.mark.parametrize(("grid", "canvas"), [(1, 16), (2, 16), (2, 32)])
def test_place_and_colour_are_found_exactly(trained: tuple[DigitClassifier, dict[str, float]], grid: int, canvas: int):
    images, _ = embedded.generator_digits(SCENES)
    for cell in range(grid**2):
        for colour in embedded.COLOURS:
            picture = embedded.render([(cell, images[cell], colour)], canvas, grid)
            ((found,),) = scene_detector.detect(picture[None], trained[0], grid)
            assert (found.row, found.column, found.color) == (*divmod(cell, grid), colour)


def test_an_empty_picture_shows_nothing(trained: tuple[DigitClassifier, dict[str, float]]):
    assert scene_detector.detect(np.zeros((1, 16, 16, 3), np.uint8), trained[0], 2) == [[]]


def test_other_pictures_are_refused(trained: tuple[DigitClassifier, dict[str, float]]):
    with pytest.raises(DataError, match=r"float32 \[1, 16, 16, 3\]; they must be uint8"):
        scene_detector.detect(np.zeros((1, 16, 16, 3), np.float32), trained[0], 2)
    with pytest.raises(DataError, match="multiple of 16"):
        scene_detector.detect(np.zeros((1, 24, 24, 3), np.uint8), trained[0], 2)


def test_frechet_distance_grows_with_the_difference(trained: tuple[DigitClassifier, dict[str, float]]):
    pictures = np.stack([embedded.make_scene(SCENES, 0, index).image for index in range(400)])
    one_kind = SCENES.model_copy(update={"kinds": ("single_object",)})
    others = np.stack([embedded.make_scene(one_kind, 0, index).image for index in range(200)])
    noisy = np.clip(pictures[200:] + np.random.default_rng(0).normal(0, 60, pictures[200:].shape), 0, 255)
    same = fid.frechet_distance(pictures[:200], pictures[200:], trained[0], 2)
    assert same < fid.frechet_distance(pictures[:200], others, trained[0], 2)
    assert same < fid.frechet_distance(pictures[:200], noisy.astype(np.uint8), trained[0], 2)
    with pytest.raises(DataError, match="1 made pictures"):
        fid.frechet_distance(pictures, pictures[:1], trained[0], 2)


def test_distance_to_a_reference():
    black, white = np.zeros((2, 4, 4, 3), np.uint8), np.full((2, 4, 4, 3), 255, np.uint8)
    assert fidelity.distances(black, white).tolist() == [1.0, 1.0]
    assert fidelity.mean_distance(black, black) == 0.0
    with pytest.raises(DataError, match="the shapes must be the same"):
        fidelity.distances(black, white[:1])
