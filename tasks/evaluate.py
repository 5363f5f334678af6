"""Stage `evaluate@MODEL`: pictures from the same noise for every model, and every metric but latency."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from moe_core import noise
from moe_core.config import EmbeddedDataConfig, Params
from moe_core.data import embedded
from moe_core.errors import ConfigError, DataError
from moe_core.metrics import fid, fidelity, geneval, routing_use, scene_detector
from moe_core.metrics.classifier import DigitClassifier
from tasks import generation, outs
from tasks.generation import Made, Unit
from tasks.places import DENSE, EVALUATIONS, EVALUATOR, IMAGES, PROMPTS
from tasks.prompts import read_prompts
from tasks.stage import Stage, execute

INTERVAL = "95 %, Agresti-Coull within each kind"
REAL_SCENES = 1000
VALIDATION_BATCH = 64
SHEET = 8
"""Pictures that MLflow shows side by side."""


def evaluate(name: str, folder: Path, stage: Stage) -> None:
    """Writes data/images/<model>/ and data/evaluations/<model>.json; `folder` holds the model's transformer."""
    params, root = stage.params, stage.root
    dense = name == DENSE
    records = read_prompts(root / PROMPTS)
    reference = None if dense else _pictures(root / IMAGES / DENSE, len(records))
    size = params.eval.batch_size
    cuts = [list(range(first, min(first + size, len(records)))) for first in range(0, len(records), size)]
    units = [Unit(cut, [records[i]["prompt"] for i in cut]) for cut in cuts]
    with contextlib.nullcontext() if params.compute.num_workers == 0 else stage.ray():
        done = partial(stage.progress.update, "generate")
        made = generation.make((root, params, folder, dense), units, VALIDATION_BATCH, done)
    images = np.concatenate([unit.images for unit in made.pictures])
    classifier = DigitClassifier.load(root / EVALUATOR)
    scenes = _scenes(params)
    found = scene_detector.detect(images, classifier, scenes.grid)
    correct = [geneval.is_correct(record, seen) for record, seen in zip(records, found, strict=True)]
    with outs.folder(root / IMAGES / name) as out:
        _write_pictures(out, images, records, correct)
    report = {
        "model": name,
        "prompts": len(records),
        "nfe": params.model.num_inference_steps,
        **_accuracy(records, correct),
        "fid": fid.frechet_distance(_real(scenes, params.seed), images, classifier, scenes.grid),
        "fid_reference": f"{REAL_SCENES} scenes of the training data's kind that no model has seen",
        "teacher_distance": 0.0 if reference is None else fidelity.mean_distance(images, reference),
        "kd_loss": made.validation["distill"],
        "kd_loss_relative": made.validation["distill_relative"],
        **made.cost,
        **_routing(made),
    }
    outs.write_json(root / EVALUATIONS / f"{name}.json", report)
    stage.summary(
        {key: report[key] for key in ("accuracy", "fid", "teacher_distance", "kd_loss", "flops")}
        | {f"accuracy_{kind}": value for kind, value in report["accuracy_by_kind"].items()}
        | {f"params_{key}": report["params"][key] for key in ("total", "activated", "activated_paper")}
    )
    stage.run.image("pictures.png", _sheet(images[:SHEET]))


def _pictures(folder: Path, count: int) -> NDArray[np.uint8]:
    paths = sorted(folder.glob("*.png"))
    if len(paths) != count:
        raise DataError(
            f"{folder} has {len(paths)} pictures, but there are {count} prompts; `dvc repro evaluate@{DENSE}` makes them"
        )
    return np.stack([np.asarray(Image.open(path)) for path in paths])


def _write_pictures(
    folder: Path, images: NDArray[np.uint8], records: list[dict[str, Any]], correct: list[bool]
) -> None:
    lines = []
    for index, (image, record, right) in enumerate(zip(images, records, correct, strict=True)):
        file = f"{index:05d}.png"
        Image.fromarray(image).save(folder / file)
        lines.append({"index": index, "file": file, "tag": record["tag"], "prompt": record["prompt"], "correct": right})
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def _scenes(params: Params) -> EmbeddedDataConfig:
    if params.data.embedded is None:
        raise ConfigError("data.embedded is null; evaluation knows the embedded digits only")
    return params.data.embedded


def _real(config: EmbeddedDataConfig, run_seed: int) -> NDArray[np.uint8]:
    """Scenes past those of the data set: of the same kind, made of the same digits, never trained on."""
    seed = noise.derive_seed(run_seed, "source")
    return np.stack([embedded.make_scene(config, seed, config.samples + i).image for i in range(REAL_SCENES)])


def _accuracy(records: list[dict[str, Any]], correct: list[bool]) -> dict[str, Any]:
    """Accuracy by kind and overall (the mean of the kinds), with the interval of the overall one.

    Agresti-Coull adds two right and two wrong answers to each kind, so that a kind without a fault does not count as certain.
    """
    score = geneval.aggregate(records, correct)
    variance = 0.0
    for kind, count in score["counts"].items():
        share = (score["by_kind"][kind] * count + 2) / (count + 4)
        variance += share * (1 - share) / (count + 4)
    half = 1.96 * math.sqrt(variance) / len(score["counts"])
    overall = score["overall"]
    return {
        "accuracy": overall,
        "accuracy_low": max(overall - half, 0.0),
        "accuracy_high": min(overall + half, 1.0),
        "interval": INTERVAL,
        "accuracy_by_kind": score["by_kind"],
        "prompts_by_kind": score["counts"],
    }


def _routing(made: Made) -> dict[str, Any]:
    experts, experts_by_step = routing_use.shares(routing_use.merge(unit.experts for unit in made.pictures))
    blocks, blocks_by_step = routing_use.shares(routing_use.merge(unit.blocks for unit in made.pictures))
    return {
        "expert_use": experts,
        "expert_use_by_timestep": experts_by_step,
        "block_use": blocks,
        "block_use_by_timestep": blocks_by_step,
    }


def _sheet(images: NDArray[np.uint8]) -> Image.Image:
    """Some pictures side by side."""
    return Image.fromarray(np.concatenate(list(images), axis=1))


if __name__ == "__main__":
    execute(f"evaluate@{sys.argv[1]}", partial(evaluate, sys.argv[1], Path(sys.argv[2])))
