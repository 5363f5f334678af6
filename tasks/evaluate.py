"""Stage `evaluate@MODEL`: pictures from the same noise for every model, and every metric but latency."""

from __future__ import annotations

import contextlib
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from moe_core.errors import DataError
from moe_core.metrics import fidelity, routing_use
from tasks import generation, judgement, outs
from tasks.generation import Made, Unit
from tasks.judgement import Judgement
from tasks.places import DENSE, EVALUATIONS, IMAGES, PROMPTS
from tasks.prompts import read_prompts
from tasks.stage import Stage, execute

SHEET = 8
"""Pictures that MLflow shows side by side."""


def evaluate(name: str, folder: Path, stage: Stage) -> None:
    """Writes data/images/<model>/ and data/evaluations/<model>.json; `folder` holds the model's transformer."""
    params, root = stage.params, stage.root
    dense = name == DENSE
    records = read_prompts(root / PROMPTS)
    reference = None if dense else read_pictures(root / IMAGES / DENSE, len(records))
    size = params.eval.batch_size
    cuts = [list(range(first, min(first + size, len(records)))) for first in range(0, len(records), size)]
    units = [Unit(cut, [records[i]["prompt"] for i in cut]) for cut in cuts]
    with contextlib.nullcontext() if params.compute.num_workers == 0 else stage.ray():
        done = partial(stage.progress.update, "generate")
        made = generation.make((root, params, folder, dense), units, size, done)
    images = np.concatenate([unit.images for unit in made.pictures])
    judged = judgement.judge(root, params, records, images)
    with outs.folder(root / IMAGES / name) as out:
        _write_pictures(out, images, records, judged)
    report = {
        "model": name,
        "prompts": len(records),
        "nfe": params.model.num_inference_steps,
        "judged": None if judged is None else judged.as_dict(),
        "teacher_distance": 0.0 if reference is None else fidelity.mean_distance(images, reference),
        "kd_loss": made.validation["distill"],
        "kd_loss_relative": made.validation["distill_relative"],
        **made.cost,
        **_routing(made),
    }
    outs.write_json(root / EVALUATIONS / f"{name}.json", report)
    stage.summary(
        ({} if judged is None else judged.summary())
        | {key: report[key] for key in ("teacher_distance", "kd_loss", "flops")}
        | {f"params_{key}": report["params"][key] for key in ("total", "activated", "activated_paper")}
    )
    stage.run.image("pictures.png", _sheet(images[:SHEET]))


def read_pictures(folder: Path, count: int) -> NDArray[np.uint8]:
    """The pictures of an evaluation, uint8 [N, S, S, 3]; raises DataError unless there are `count`."""
    paths = sorted(folder.glob("*.png"))
    if len(paths) != count:
        raise DataError(
            f"{folder} has {len(paths)} pictures, but there are {count} prompts; `dvc repro evaluate@{DENSE}` makes them"
        )
    return np.stack([np.asarray(Image.open(path)) for path in paths])


def _write_pictures(
    folder: Path, images: NDArray[np.uint8], records: list[dict[str, Any]], judged: Judgement | None
) -> None:
    lines = []
    for index, (image, record) in enumerate(zip(images, records, strict=True)):
        file = f"{index:05d}.png"
        Image.fromarray(image).save(folder / file)
        right = None if judged is None else judged.correct[index]
        lines.append({"index": index, "file": file, "tag": record["tag"], "prompt": record["prompt"], "correct": right})
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


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
