"""The scorers of the embedded data set's scenes, by the digit classifier that stage `evaluator` trained.

- `scenes`: right or wrong, twice: `exact` wants just what the prompt asks for and nothing else; `geneval` follows GenEval's own rules.
- `scene_features`: 67 numbers a picture, for FID and KID against features of real scenes.
- `scene_distance`: how far the picture is, in the classifier's features, from the reference model's from the same noise.
- Each picture is judged by itself. The classifier is small and stays on the CPU, whatever the device.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moe_core.errors import DataError
from moe_core.metrics.scorer import Asset, Measure, MissingAsset, Row, Sample, ScorerSpec, SetMeasure, stack

if TYPE_CHECKING:
    from moe_core.metrics.classifier import DigitClassifier
    from moe_core.metrics.fid import SceneFeatures
    from moe_core.metrics.geneval_verdict import Detection
    from moe_core.metrics.scene_detector import Detection as Found

JUDGE = "scene_judge"
JUDGE_FILE = "judge.json"
"""{"grid": cells a side}"""
FEATURES_FILE = "real_features.safetensors"
"""One matrix `features` [N, 67]: `scene_features` of real scenes."""

_JUDGE_FILES = ("classifier.safetensors", "classifier.json", JUDGE_FILE)
_WHAT = "the digit classifier and its grid, as stage evaluator writes them for embedded data"
_ASSET = Asset(JUDGE, _WHAT, _JUDGE_FILES)
_WITH_FEATURES = Asset(JUDGE, f"{_WHAT}, with features of real scenes", (*_JUDGE_FILES, FEATURES_FILE))

SPECS = (
    ScorerSpec(
        "scenes",
        "moe_core.metrics.scene_scorers:load_scenes",
        measures=(
            Measure("exact", "exact", over_kinds=True, by_kind=True, binary=True),
            Measure("scene_geneval", "geneval", over_kinds=True, by_kind=True, binary=True),
        ),
        assets=(_ASSET,),
    ),
    ScorerSpec(
        "scene_features",
        "moe_core.metrics.scene_scorers:load_features",
        set_measures=(
            SetMeasure("scene_fid", "features", "fid", JUDGE, FEATURES_FILE),
            SetMeasure("scene_kid", "features", "kid", JUDGE, FEATURES_FILE),
        ),
        assets=(_WITH_FEATURES,),
    ),
    ScorerSpec(
        "scene_distance",
        "moe_core.metrics.scene_scorers:load_distance",
        measures=(Measure("feature_distance", "feature_distance", rising=False),),
        assets=(_ASSET,),
        needs_reference=True,
    ),
)


@dataclass(frozen=True)
class SceneScorer:
    """Columns `exact` and `geneval`: whether the picture is right by `geneval.is_correct` and by GenEval's own rules."""

    classifier: DigitClassifier
    grid: int

    def score(self, samples: Sequence[Sample]) -> list[Row]:
        """Raises DataError for a prompt without a GenEval record, or a picture that is no scene."""
        from moe_core.metrics import geneval, geneval_verdict
        from moe_core.metrics.scene_detector import detect

        pictures = stack(samples)
        cell = pictures.shape[1] // self.grid
        rows: list[Row] = []
        for sample, found in zip(samples, detect(pictures, self.classifier, self.grid), strict=True):
            record = sample.prompt.record
            exact = geneval.is_correct(record, found)
            official = geneval_verdict.verdict(_excluding(record), _boxes(found, cell))
            rows.append({"exact": exact, "geneval": official.correct})
        return rows


@dataclass(frozen=True)
class FeatureScorer:
    """Column `features`: the 67 numbers of `fid.SceneFeatures`."""

    features: SceneFeatures

    def score(self, samples: Sequence[Sample]) -> list[Row]:
        """Raises DataError for a picture that is no scene."""
        pictures = torch.from_numpy(stack(samples)).permute(0, 3, 1, 2)
        with torch.inference_mode():
            return [{"features": row} for row in self.features(pictures).double().tolist()]


@dataclass(frozen=True)
class DistanceScorer:
    """Column `feature_distance` (`moe_core.metrics.similarity`)."""

    classifier: DigitClassifier
    grid: int

    def score(self, samples: Sequence[Sample]) -> list[Row]:
        """Raises DataError for a picture that is no scene or not of its reference's size, EvaluationError without a reference."""
        from moe_core.metrics import similarity

        made, reference = stack(samples), stack(samples, references=True)
        distances = similarity.feature_distance(made, reference, self.classifier, self.grid)
        return [{"feature_distance": float(distance)} for distance in distances]


def load_scenes(assets: Mapping[str, str], device: torch.device) -> SceneScorer:
    """Raises MissingAsset or DataError for a folder that is not the evaluator's, CheckpointError for weights that do not fit."""
    return SceneScorer(*_judge(assets))


def load_features(assets: Mapping[str, str], device: torch.device) -> FeatureScorer:
    """As `load_scenes`."""
    from moe_core.metrics.fid import SceneFeatures

    return FeatureScorer(SceneFeatures(*_judge(assets)))


def load_distance(assets: Mapping[str, str], device: torch.device) -> DistanceScorer:
    """As `load_scenes`."""
    return DistanceScorer(*_judge(assets))


def _boxes(found: Sequence[Found], cell: int) -> list[Detection]:
    """For GenEval's rules: an object's box is its cell, the surest first.

    Its thresholds are of Mask2Former's confidences. Here ink says whether there is an object, so all are of confidence 1.
    """
    from moe_core.metrics.geneval_verdict import Detection

    boxes = []
    for one in sorted(found, key=lambda one: -one.confidence):
        left, top = float(cell * one.column), float(cell * one.row)
        boxes.append(Detection(one.name, (left, top, left + cell, top + cell), colour=one.color))
    return boxes


def _excluding(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """A record of kind counting with the clause that GenEval's own have: fewer than one more than are asked for."""
    if record["tag"] != "counting" or "exclude" in record:
        return record
    more = [{"class": item["class"], "count": item["count"] + 1} for item in record["include"]]
    return {**record, "exclude": more}


def _judge(assets: Mapping[str, str]) -> tuple[DigitClassifier, int]:
    """The classifier and the grid."""
    from moe_core.metrics.classifier import DigitClassifier

    folder = Path(assets[JUDGE])
    path = folder / JUDGE_FILE
    if not path.is_file():
        raise MissingAsset(f'{path} is missing; it must say how many cells a side a scene has: {{"grid": 2}}')
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is no JSON: {error}") from None
    grid = told.get("grid") if isinstance(told, dict) else None
    if type(grid) is not int or grid < 1:
        raise DataError(f'{path} says {told!r}; it must be {{"grid": n}} with n at least 1')
    return DigitClassifier.load(folder), grid
