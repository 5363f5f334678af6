"""A FLUX.1 preset from the first stage to the report, with a small model's folder, a folder of pictures and a baseline."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from diffusers import FluxTransformer2DModel
from PIL import Image

from flows.parameters import compose
from moe_core.data.embedded import captions_vocabulary
from moe_core.small_flux import build_pipeline
from tests.clones import clone, dvc
from tests.moe_core.tiny_pipeline import SIZES, tiny_config

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    # MLflow's use of SQLAlchemy and others'.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"),
]

SMALL = [
    "model.source=folder",
    "model.resolution=16",
    "model.num_inference_steps=2",
    "model.max_sequence_length=8",
    "data=folder",
    "data.shard.validation_samples=4",
    "data.shard.calibration_samples=8",
    "data.shard.batch_size=8",
    "moe.dense_double_blocks=[0]",
    "moe.conditioning_dim=16",
    *[
        f"kd.{stage}.{key}"
        for stage in ("shared_expert", "moe")
        for key in (
            *("optimizer.steps=2", "optimizer.batch_size=4", "optimizer.micro_batch=2", "optimizer.warmup_steps=1"),
            "validate_every=2",
        )
    ],
    "kd.validation_samples=4",
    "eval.prompts=3",
    "eval.latency_rounds=1",
    "+models.lite={checkpoint: data/baselines/lite, reference: data/images/teacher}",
]


def write_data(folder: Path) -> None:
    """Pictures with captions beside them."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(24):
        picture = generator.integers(0, 255, (24, 24, 3), dtype=np.uint8)
        Image.fromarray(picture).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a red seven {number}")


def write_models(teacher: Path, lite: Path) -> None:
    """A pipeline, and a transformer of fewer blocks."""
    sizes = {**SIZES["transformer"], "num_layers": 2, "num_single_layers": 2}
    pipeline = build_pipeline(tiny_config(transformer=sizes), captions_vocabulary(), 0)
    pipeline.save_pretrained(teacher)
    FluxTransformer2DModel.from_config({**pipeline.transformer.config, "num_single_layers": 1}).save_pretrained(lite)


def test_a_flux_preset_ends_with_a_report_in_which_nobody_judged(tmp_path: Path) -> None:
    checkout = tmp_path / "clone"
    clone(checkout)
    write_data(tmp_path / "pictures")
    write_models(tmp_path / "teacher", checkout / "data" / "baselines" / "lite")
    dvc(checkout, "add", "data/baselines/lite")
    found = subprocess.run(["git", "add", "-nA"], cwd=checkout, capture_output=True, text=True, check=True).stdout
    assert "data/baselines/lite.dvc" in found
    places = [f"model.path={tmp_path / 'teacher'}", f"data.path={tmp_path / 'pictures'}"]
    compose(checkout, "flux1-moe-l", [*SMALL, *places])
    dvc(checkout, "repro")
    for model in ("teacher", "shared", "L", "lite"):
        own = json.loads((checkout / "data" / "evaluations" / f"{model}.json").read_text())
        assert own["judged"] is None
        assert (own["teacher_distance"] == 0) == (own["kd_loss"] == 0) == (model == "teacher")
        assert len(list((checkout / "data" / "images" / model / "own").glob("*.png"))) == 3
        # The teacher is what others are compared with, and there is nobody else to ask.
        suite = own["suites"]["own"]
        assert suite["measures"].keys() == (set() if model == "teacher" else {"psnr", "ssim", "rmse"})
        assert ("similarity" in suite["not_measured"]) == (model == "teacher")
    rows = (checkout / "reports" / "report.md").read_text()
    assert "Nobody judged" in rows
    assert "PSNR to the teacher" in rows
    assert "| lite (baseline) |" in rows
    assert "Running stage" not in dvc(checkout, "repro")
