"""Stage `teacher`: the dense model as a complete diffusers `FluxPipeline` folder.

- `model.source: train` trains a small one from nothing: the VAE, then the text encoders, then the transformer.
- `folder` and `hub` take a given one: `tasks.given_teacher`.
"""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_core.config import Params, parse
from tasks import curves, given_teacher, outs
from tasks.places import CURVES, TEACHER
from tasks.run_training import train_stage
from tasks.stage import Stage, execute, workers

if TYPE_CHECKING:
    import torch
    from diffusers import FluxPipeline

    from moe_core.training import Trainee
    from tasks.pictures import Pictures


def teacher(stage: Stage) -> None:
    """Writes data/teacher/."""
    model = stage.params.model
    if model.training is None or model.source != "train":
        found = given_teacher.write(stage.params, stage.root / TEACHER, partial(stage.progress.update, "copy"))
        # Nothing was trained: dvc.yaml lists the curves all the same.
        for name in ("teacher-vae", "teacher-text", "teacher"):
            curves.write(stage.root / CURVES / f"{name}.csv", [])
        stage.summary({}, **found)
        return
    assert stage.resume is not None
    shared = {"root": str(stage.root), "params": stage.params.model_dump(mode="json")}
    finished = {name: str(stage.resume.path / name / "product") for name in ("vae", "text")}
    config = model.training
    trained = train_stage(
        stage,
        [
            ("vae", "tasks.teacher:build_vae", shared, config.vae, config.validate_every),
            ("text", "tasks.teacher:build_text", shared, config.text, config.validate_every),
            (
                "transformer",
                "tasks.teacher:build_transformer",
                shared | finished,
                config.transformer,
                config.validate_every,
            ),
        ],
    )
    with outs.folder(stage.root / TEACHER) as folder:
        shutil.copytree(trained.product, folder, dirs_exist_ok=True)
    metrics = {
        f"{phase}_{split}_loss": curves.last(points, split)["loss"]
        for phase, points in trained.points.items()
        for split in ("train", "validation")
    }
    steps = {f"{phase}_steps": getattr(config, phase).steps for phase in trained.points}
    stage.summary({**metrics, **steps})
    stage.run.model("teacher", TEACHER, metrics)


def build_vae(device: torch.device, root: str, params: dict[str, Any]) -> Trainee:
    """In a worker: the VAE of a new pipeline, and the pictures."""
    # Torch and diffusers load in the workers, not in the driver, where they would cost seconds for nothing.
    from moe_core import noise, teacher_training

    config, found, pipeline = _new(root, params)
    assert config.model.vae is not None
    seed = noise.derive_seed(config.seed, "teacher-vae")
    vae = pipeline.vae.to(device)
    return teacher_training.VAETrainee(vae, config.model.vae.kl_weight, found.train, found.validation, seed)


def build_text(device: torch.device, root: str, params: dict[str, Any]) -> Trainee:
    """In a worker: the text encoders of the same pipeline, and the captions."""
    # In the workers only, as above.
    from moe_core import noise, text_training

    config, found, pipeline = _new(root, params)
    assert config.model.text is not None
    return text_training.TextTrainee(
        pipeline.to(device),
        config.model.max_sequence_length,
        config.model.text.context_words,
        found.train_captions,
        found.validation_captions,
        noise.derive_seed(config.seed, "teacher-text"),
    )


def build_transformer(device: torch.device, root: str, params: dict[str, Any], vae: str, text: str) -> Trainee:
    """In a worker: the same pipeline with the trained VAE and text encoders, and the pictures' latents."""
    # In the workers only, as above.
    import torch

    from moe_core import noise, small_flux, teacher_training
    from moe_core.teacher_training import LatentCaptions

    config, found, pipeline = _new(root, params)
    assert config.model.training is not None
    small_flux.put_finished(pipeline, Path(vae), Path(text))
    pipeline.to(device)
    size = config.data.shard.batch_size
    latents = [
        torch.cat([teacher_training.encode(pipeline.vae, part) for part in images.split(size)])
        for images in (found.train, found.validation)
    ]
    return teacher_training.FlowTrainee(
        pipeline,
        config.model.guidance_scale,
        config.model.max_sequence_length,
        LatentCaptions(latents[0], found.train_captions),
        LatentCaptions(latents[1], found.validation_captions),
        config.model.training.timesteps,
        noise.derive_seed(config.seed, "teacher-transformer"),
    )


def _trains(params: Params) -> bool:
    return params.model.source == "train" and workers(params)


def _new(root: str, params: dict[str, Any]) -> tuple[Params, Pictures, FluxPipeline]:
    """The parameters, the pictures, and a new pipeline for them: the same in every phase."""
    from moe_core import noise, small_flux
    from tasks import pictures

    config = parse(Params, params)
    found = pictures.load(Path(root), config)
    seed = noise.derive_seed(config.seed, "teacher-weights")
    return config, found, small_flux.build_pipeline(config.model, found.vocabulary, seed)


if __name__ == "__main__":
    execute("teacher", teacher, resumable=True, joins=_trains)
