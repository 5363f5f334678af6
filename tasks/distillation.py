"""What the three distillation stages share, from the driver: training, the checkpoint, the summary."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moe_core.config import KDStageConfig
from tasks import curves, outs
from tasks.run_training import train_stage
from tasks.stage import Stage


def distil(
    stage: Stage,
    builder: str,
    config: KDStageConfig,
    checkpoint: Path,
    describe: Callable[[Path], dict[str, Any]],
    **arguments: Any,
) -> None:
    """Trains a student and puts it at `checkpoint`; `describe` reads from the finished folder what else the summary says."""
    assert stage.resume is not None
    params = {"root": str(stage.root), "params": stage.params.model_dump(mode="json"), **arguments}
    params["made"] = str(stage.resume.path / "student")
    trained = train_stage(stage, [("train", builder, params, config.optimizer, config.validate_every)])
    with outs.folder(stage.root / checkpoint) as folder:
        shutil.copytree(trained.product, folder, dirs_exist_ok=True)
    points = trained.points["train"]
    first = next(point for point in points if point.split == "validation")
    metrics = {
        "steps": config.optimizer.steps,
        **{f"train_{name}": value for name, value in curves.last(points, "train").items() if name != "grad_norm"},
        **{f"validation_{name}": value for name, value in curves.last(points, "validation").items()},
        **{f"before_{name}": value for name, value in first.values.items()},
    }
    stage.summary(metrics, **describe(stage.root / checkpoint))
    stage.run.model(stage.file_name, checkpoint, metrics)
