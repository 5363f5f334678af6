"""The scorers of scenes, loaded by their specs from a folder as the evaluator's, on real scenes and on wrong ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from moe_core.config import ClassifierConfig, EmbeddedDataConfig
from moe_core.data import embedded
from moe_core.errors import DataError, EvaluationError
from moe_core.metrics import fid, likeness, scene_scorers, set_distance
from moe_core.metrics.classifier import DigitClassifier, train_classifier
from moe_core.metrics.scorer import MissingAsset, Prompt, Row, Sample, ScorerSpec

SCENES = EmbeddedDataConfig(
    samples=10, kinds=("single_object", "two_object", "counting", "position"), generator_share=0.4
)
SPECS = {spec.name: spec for spec in (*scene_scorers.SPECS, likeness.SPEC)}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def classifier() -> DigitClassifier:
    config = ClassifierConfig(steps=150, batch_size=128, learning_rate=3e-3, width=8, test_share=0.3)
    return train_classifier(*embedded.evaluator_digits(SCENES), config, seed=0)[0]


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory, classifier: DigitClassifier) -> Path:
    folder = tmp_path_factory.mktemp("judge")
    classifier.save(folder)
    (folder / "judge.json").write_text('{"grid": 2}')
    (folder / "real_features.safetensors").touch()
    return folder


def _score(name: str, judge: Path, samples: list[Sample]) -> list[Row]:
    return SPECS[name].load({"scene_judge": str(judge)}, CPU).score(samples)


def _real(count: int) -> list[Sample]:
    scenes = [embedded.make_scene(SCENES, 0, index) for index in range(count)]
    return [
        Sample(Prompt(str(i), s.prompt, s.record["tag"], s.record), 0, Image.fromarray(s.image))
        for i, s in enumerate(scenes)
    ]


def _drawn(record: dict[str, Any], *placed: tuple[int, int, str]) -> Sample:
    """A picture of (cell, class, colour) triples, of digits that are plainly of their class."""
    images, classes = embedded.generator_digits(SCENES)
    shown = [(cell, images[classes == digit][0], colour) for cell, digit, colour in placed]
    picture = Image.fromarray(embedded.render(shown, 16, 2))
    return Sample(Prompt("x", record["prompt"], record["tag"], record), 0, picture)


def _record(tag: str, prompt: str, *include: dict[str, Any]) -> dict[str, Any]:
    return {"tag": tag, "prompt": prompt, "include": list(include)}


SEVEN = {"class": "seven", "count": 1}
A_SEVEN = _record("single_object", "a seven", SEVEN)
RED_SEVEN = _record("colors", "a red seven", {**SEVEN, "color": "red"})
TWO_SEVENS = _record("counting", "two sevens", {"class": "seven", "count": 2})
LEFT = _record(
    "position", "a seven left of a zero", {"class": "zero", "count": 1}, {**SEVEN, "position": ["left of", 0]}
)
ABOVE = _record("position", "a seven above a zero", {"class": "zero", "count": 1}, {**SEVEN, "position": ["above", 0]})


@pytest.mark.parametrize(
    ("record", "placed", "exact", "official"),
    [
        (A_SEVEN, [(0, 7, "red")], True, True),
        (A_SEVEN, [(0, 0, "red")], False, False),
        (A_SEVEN, [], False, False),
        # Bystanders pass with GenEval, of another class and of the same.
        (A_SEVEN, [(0, 7, "red"), (3, 0, "blue")], False, True),
        (A_SEVEN, [(0, 7, "red"), (3, 7, "blue")], False, True),
        (RED_SEVEN, [(2, 7, "red")], True, True),
        (RED_SEVEN, [(2, 7, "blue")], False, False),
        (TWO_SEVENS, [(0, 7, "red"), (3, 7, "red")], True, True),
        (TWO_SEVENS, [(0, 7, "red")], False, False),
        # But not one more of what is counted.
        (TWO_SEVENS, [(0, 7, "red"), (1, 7, "red"), (3, 7, "red")], False, False),
        (TWO_SEVENS, [(0, 7, "red"), (1, 7, "red"), (3, 0, "red")], False, True),
        (LEFT, [(0, 7, "red"), (1, 0, "red")], True, True),
        (LEFT, [(1, 7, "red"), (0, 0, "red")], False, False),
        # On the diagonal it is left of the other and above it.
        (LEFT, [(0, 7, "red"), (3, 0, "red")], True, True),
        (ABOVE, [(0, 7, "red"), (3, 0, "red")], True, True),
        (ABOVE, [(0, 7, "red"), (1, 0, "red")], False, False),
    ],
)
def test_verdicts(judge: Path, record: dict[str, Any], placed: list[tuple[int, int, str]], exact: bool, official: bool):
    (row,) = _score("scenes", judge, [_drawn(record, *placed)])
    assert row == {"exact": exact, "geneval": official}


def test_real_scenes_are_right_and_swapped_ones_are_not(judge: Path):
    samples = _real(200)
    rows = _score("scenes", judge, samples)
    assert np.mean([row["exact"] for row in rows]) > 0.85
    assert all(row["geneval"] for row in rows if row["exact"])
    others = [Sample(s.prompt, 0, o.image) for s, o in zip(samples, samples[1:] + samples[:1], strict=True)]
    assert np.mean([row["exact"] for row in _score("scenes", judge, others)]) < 0.15


def test_features_give_the_fid_that_torchmetrics_gives(judge: Path, classifier: DigitClassifier):
    samples = _real(120)
    rows = np.array([row["features"] for row in _score("scene_features", judge, samples)])
    assert rows.shape == (120, 67)
    assert rows.dtype == np.float64
    pictures = np.stack([np.asarray(sample.image) for sample in samples])
    # One half of real scenes against the other, so unlike that the covariances are singular: near, not equal.
    known = fid.frechet_distance(pictures[:60], pictures[60:], classifier, 2)
    assert set_distance.frechet_distance(rows[:60], rows[60:]) == pytest.approx(known, rel=1e-2)


def test_likeness_is_best_for_the_reference_itself(judge: Path):
    samples = [Sample(s.prompt, 0, s.image, s.image) for s in _real(3)]
    for row in _score("similarity", judge, samples):
        assert row == {"psnr": pytest.approx(58.92, abs=0.01), "ssim": pytest.approx(1), "rmse": 0}
    for row in _score("scene_distance", judge, samples):
        assert row == {"feature_distance": pytest.approx(0, abs=1e-9)}
    black = [Sample(samples[0].prompt, 0, Image.new("RGB", (16, 16)), samples[0].image)]
    (row,) = _score("similarity", judge, black)
    rmse = float(np.sqrt((np.asarray(samples[0].image, np.float64) ** 2).mean()) / 255)
    assert row["rmse"] == pytest.approx(rmse)
    assert row["psnr"] == pytest.approx(-20 * np.log10(rmse))
    assert row["ssim"] < 0.95
    (row,) = _score("scene_distance", judge, black)
    assert row["feature_distance"] > 0.01


def test_similarity_is_of_any_pictures_and_without_a_judge():
    (row,) = _score(
        "similarity", None, [Sample(Prompt("p", "a cat"), 0, *(Image.new("RGB", (30, 30), c) for c in ("red", "blue")))]
    )
    assert row["rmse"] == pytest.approx((2 / 3) ** 0.5)


@pytest.mark.parametrize("name", sorted(SPECS))
def test_a_row_is_the_same_alone_and_its_columns_are_those_measured(judge: Path, name: str):
    samples = [Sample(s.prompt, 0, s.image, o.image) for s, o in zip(_real(4), _real(5)[1:], strict=True)]
    spec = SPECS[name]
    rows = _score(name, judge, samples)
    (alone,) = _score(name, judge, samples[2:3])
    assert set(alone) == {measure.column for measure in (*spec.measures, *spec.set_measures)}
    for column, value in alone.items():
        assert rows[2][column] == pytest.approx(value, rel=1e-5, abs=1e-6)
    json.dumps(rows)


@pytest.mark.parametrize("spec", scene_scorers.SPECS, ids=lambda spec: spec.name)
def test_what_is_missing_is_named(judge: Path, classifier: DigitClassifier, tmp_path: Path, spec: ScorerSpec):
    with pytest.raises(MissingAsset, match="scene_judge"):
        spec.load({}, CPU)
    classifier.save(tmp_path)
    with pytest.raises(MissingAsset, match=r"judge\.json"):
        spec.load({"scene_judge": str(tmp_path)}, CPU)
    (tmp_path / "real_features.safetensors").touch()
    for content, said in (
        ("{", "no JSON"),
        ('{"grid": 0}', "'grid': 0"),
        ("[2]", r"\[2\]"),
        ('{"grid": true}', "True"),
    ):
        (tmp_path / "judge.json").write_text(content)
        with pytest.raises(DataError, match=said):
            spec.load({"scene_judge": str(tmp_path)}, CPU)


def test_wrong_pictures_are_named(judge: Path):
    prompt = Prompt("p7", "a seven", "single_object", A_SEVEN)
    small, large = Image.new("RGB", (16, 16)), Image.new("RGB", (32, 32))
    with pytest.raises(DataError, match=r"\(16, 16\), \(32, 32\)"):
        _score("scenes", judge, [Sample(prompt, 0, small), Sample(prompt, 1, large)])
    with pytest.raises(DataError, match="multiple of 16"):
        _score("scene_features", judge, [Sample(prompt, 0, Image.new("RGB", (24, 24)))])
    for name in ("similarity", "scene_distance"):
        with pytest.raises(EvaluationError, match="prompt p7, picture 3"):
            _score(name, judge, [Sample(prompt, 3, small)])
    with pytest.raises(DataError, match="include"):
        _score("scenes", judge, [Sample(Prompt("p", "a seven"), 0, small)])
