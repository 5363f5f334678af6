"""What the evaluator says of pictures: right or wrong by its detector, accuracy by GenEval's rules, FID against real scenes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moe_core import noise
from moe_core.config import EmbeddedDataConfig, Params
from moe_core.data import embedded
from moe_core.errors import ConfigError
from moe_core.metrics import aggregate, fid, geneval, scene_detector
from moe_core.metrics.classifier import DigitClassifier
from moe_core.metrics.scorer import Measure
from tasks.places import EVALUATOR

INTERVAL = "bootstrap over prompts"
REAL_SCENES = 1000
REFERENCE = f"{REAL_SCENES} scenes of the training data's kind that no model has seen"


@dataclass(frozen=True)
class Judgement:
    """Of one model's pictures."""

    correct: list[bool]
    """a picture"""
    accuracy: float
    """the mean of the kinds'"""
    accuracy_low: float
    accuracy_high: float
    accuracy_by_kind: dict[str, float]
    prompts_by_kind: dict[str, int]
    fid: float
    interval: str = INTERVAL
    fid_reference: str = REFERENCE

    def as_dict(self) -> dict[str, Any]:
        """All but the single pictures."""
        return {key: value for key, value in asdict(self).items() if key != "correct"}

    def summary(self) -> dict[str, Any]:
        """What models are compared by."""
        kinds = {f"accuracy_{kind}": value for kind, value in self.accuracy_by_kind.items()}
        return {"accuracy": self.accuracy, "fid": self.fid, **kinds}


def judge(root: Path, params: Params, records: list[dict[str, Any]], images: NDArray[np.uint8]) -> Judgement | None:
    """Of pictures uint8 [N, S, S, 3] of as many GenEval records; None where `eval.classifier` is null."""
    if params.eval.classifier is None:
        return None
    scenes = params.data.embedded
    if scenes is None:
        raise ConfigError("eval.classifier knows the embedded digits only, and data.embedded is null")
    classifier = DigitClassifier.load(root / EVALUATOR)
    found = scene_detector.detect(images, classifier, scenes.grid)
    correct = [geneval.is_correct(record, seen) for record, seen in zip(records, found, strict=True)]
    score = geneval.aggregate(records, correct)
    low, high = _interval(records, correct, params.seed)
    real = _real(scenes, params.seed)
    return Judgement(
        correct=correct,
        accuracy=score["overall"],
        accuracy_low=low,
        accuracy_high=high,
        accuracy_by_kind=score["by_kind"],
        prompts_by_kind=score["counts"],
        fid=fid.frechet_distance(real, images, classifier, scenes.grid),
    )


def _interval(records: list[dict[str, Any]], correct: list[bool], run_seed: int) -> tuple[float, float]:
    """Of the overall accuracy, as the suites' own measures have it."""
    prompts = pd.DataFrame({"kind": [record["tag"] for record in records], "correct": correct})
    measure = Measure("accuracy", "correct", over_kinds=True, binary=True)
    found = aggregate.estimate(prompts, measure, noise.derive_seed(run_seed, aggregate.DRAWS))
    return found.low, found.high


def _real(config: EmbeddedDataConfig, run_seed: int) -> NDArray[np.uint8]:
    """Scenes past those of the data set: of the same kind, made of the same digits, never trained on."""
    seed = noise.derive_seed(run_seed, "source")
    return np.stack([embedded.make_scene(config, seed, config.samples + i).image for i in range(REAL_SCENES)])
