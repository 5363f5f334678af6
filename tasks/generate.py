"""Stage `generate@MODEL`: the pictures that every suite asks for, from the same noise for every model; and what the model is and costs."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from moe_core.config import Params
from moe_core.pipeline_source import PipelineSource
from tasks import generation, inspection, outs, suites
from tasks.places import DENSE, IMAGES, INSPECTIONS, TEACHER
from tasks.stage import Stage, execute, workers

SHEET = 8
"""Pictures that MLflow shows side by side."""


def generate(name: str, folder: Path, stage: Stage) -> None:
    """Writes data/images/<model>/<suite>/ and data/inspections/<model>.json; `folder` holds the model's transformer."""
    assert stage.resume is not None
    root, params = stage.root, stage.params
    found = suites.read(root, params.eval)
    making = stage.resume.path / "images"
    source = source_of(root, params, None if name == DENSE else folder)
    work = [
        unit
        for suite in found
        for unit in generation.units(making / suite.name, suites.pictures(suite, params.seed), params.eval.batch_size)
    ]
    with contextlib.nullcontext() if params.compute.num_workers == 0 else stage.ray():
        made = sum(len(unit.pictures) for unit in work if not unit.is_done)
        seconds = generation.make(source, work, params.compute, partial(stage.progress.pictures, "generate"))
        own = [prompt.text for prompt in found[0].prompts]
        report = inspection.inspect(root, params, folder, name == DENSE, own)
    with outs.folder(root / IMAGES / name) as out:
        shutil.copytree(making, out, dirs_exist_ok=True, copy_function=_link)
    outs.write_json(root / INSPECTIONS / f"{name}.json", {"model": name} | report)
    count = sum(len(unit.pictures) for unit in work)
    stage.summary(
        {"pictures": count, "kd_loss": report["kd_loss"], "flops": report["flops"]}
        | {f"params_{key}": report["params"][key] for key in ("total", "activated", "activated_paper")}
    )
    if made:
        # Of those of this attempt: a killed one's are there already.
        stage.run.metrics({"seconds_a_picture": seconds / made})
    stage.run.image("pictures.png", sheet(root / IMAGES / name / found[0].name, SHEET))


def source_of(root: Path, params: Params, transformer: Path | None) -> PipelineSource:
    """The teacher's pipeline with a transformer in it, called as `model` says."""
    model = params.model
    return PipelineSource(
        place=str(root / TEACHER),
        transformer=None if transformer is None else root / transformer,
        precision=model.precision,
        arguments={
            "height": model.resolution,
            "width": model.resolution,
            "num_inference_steps": model.num_inference_steps,
            "guidance_scale": model.guidance_scale,
            "max_sequence_length": model.max_sequence_length,
        },
        expert_backend=params.compute.expert_backend,
        compile=params.compute.compile,
    )


def sheet(folder: Path, count: int) -> Image.Image:
    """Some pictures side by side."""
    files = sorted(folder.glob("*.png"))[:count]
    return Image.fromarray(np.concatenate([np.asarray(Image.open(file).convert("RGB")) for file in files], axis=1))


def _link(source: str, target: str) -> None:
    """Pictures are many and never changed: a second name for a file, where the file system has such."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


if __name__ == "__main__":
    execute(f"generate@{sys.argv[1]}", partial(generate, sys.argv[1], Path(sys.argv[2])), resumable=True, joins=workers)
