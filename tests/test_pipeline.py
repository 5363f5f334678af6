"""The whole pipeline in a clone: real DVC, Ray workers, MLflow database, a real FLUX pipeline; only few steps and few samples."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from dvc.repo import Repo

from flows.parameters import compose
from moe_core.sampling import load_pipeline
from tasks.tracking import metrics_frame
from tests.clones import clone, dvc

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1500),
    # MLflow's use of SQLAlchemy and others'.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"),
]

FEW_STEPS = [
    "model.training.vae.steps=20",
    "model.training.vae.warmup_steps=2",
    "model.training.text.steps=20",
    "model.training.text.warmup_steps=2",
    "model.training.transformer.steps=10",
    "model.training.transformer.batch_size=16",
    "model.training.transformer.warmup_steps=2",
    "model.training.validate_every=10",
    "data.embedded.samples=400",
    "data.shard.samples_per_shard=100",
    "data.shard.validation_samples=32",
    "data.shard.calibration_samples=32",
    *[
        f"kd.{stage}.optimizer.{key}"
        for stage in ("shared_expert", "moe", "mob")
        for key in ("steps=4", "batch_size=8", "warmup_steps=1")
    ],
    *[f"kd.{stage}.validate_every=4" for stage in ("shared_expert", "moe", "mob")],
    "kd.validation_samples=16",
    "kd.importance_batch_size=16",
    "eval.prompts=20",
    "eval.sanity=20",
    "eval.contrastive.steps=40",
    "eval.contrastive.scenes=300",
    "eval.batch_size=10",
    "eval.latency_rounds=1",
    "compute.checkpoint_every=4",
]

MODELS = ("teacher", "shared", "L", "M", "S", "XS")
LEVELS = ("M", "S", "XS")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone in which `dvc repro` has run to its end."""
    folder = tmp_path_factory.mktemp("pipeline") / "clone"
    clone(folder)
    compose(folder, "demo", FEW_STEPS)
    dvc(folder, "repro")
    return folder


def test_every_stage_stands_and_is_logged(checkout: Path) -> None:
    assert (checkout / "reports" / "index.html").stat().st_size > 10_000
    for folder in ("evaluations", "inspections"):
        assert {file.stem for file in (checkout / "data" / folder).glob("*.json")} == set(MODELS)
    for model in MODELS:
        told = json.loads((checkout / "data" / "evaluations" / f"{model}.json").read_text())["suites"]["own"]
        assert {"exact", "scene_fid", "clip_score"} <= told["measures"].keys()
        assert ("psnr" in told["measures"]) == (model != "teacher")
        assert len(list((checkout / "data" / "images" / model / "own").glob("*.png"))) == 20
    assert "psnr" in json.loads((checkout / "reports" / "sanity.json").read_text())["measures"]
    with Repo(str(checkout)) as repo:
        stages = {stage.name.replace("@", "-") for stage in repo.index.stages}
    assert stages <= set(metrics_frame(checkout)["stage"]) | {"report"}


def test_a_second_repro_does_nothing(checkout: Path) -> None:
    assert "Running stage" not in dvc(checkout, "repro")


def test_checkout_brings_the_outs_back(checkout: Path) -> None:
    outs = [checkout / "data" / name for name in ("teacher", "checkpoints", "shards", "images", "evaluations")]
    for out in outs:
        shutil.rmtree(out)
    dvc(checkout, "checkout")
    assert all(any(out.iterdir()) for out in outs)
    assert "Running stage" not in dvc(checkout, "repro")


def test_a_mob_parameter_reruns_mob_evaluation_and_report_only(checkout: Path) -> None:
    file = checkout / "params.yaml"
    before = file.read_text()
    values = yaml.safe_load(before)
    values["mob"]["alpha"] = 0.25
    file.write_text(yaml.safe_dump(values))
    try:
        with Repo(str(checkout)) as repo, repo.lock:
            graph = repo.index.graph
            changed = {stage for stage in repo.index.stages if stage.changed()}
            # An edge leads from a stage to what it depends on.
            while more := {stage for stage in graph for one in graph.successors(stage) if one in changed} - changed:
                changed |= more
            names = {stage.name for stage in changed}
    finally:
        file.write_text(before)
    assert names == {
        *(f"{kind}@{level}" for kind in ("mob_kd", "generate", "evaluate") for level in LEVELS),
        "latency",
        "report",
    }


def test_metrics_and_plots_show_something(checkout: Path) -> None:
    shown = dvc(checkout, "metrics", "show")
    assert all(f"reports/stages/evaluate-{model}.json" in shown for model in MODELS)
    page = dvc(checkout, "plots", "show").strip().removeprefix("file://")
    assert "vega" in Path(page).read_text().lower()


@pytest.mark.parametrize("level", ["moe", "mob/XS"])
def test_the_result_runs_in_a_flux_pipeline(checkout: Path, level: str) -> None:
    pipe = load_pipeline(checkout / "data" / "teacher", checkout / "data" / "checkpoints" / level)
    image = pipe("a red seven", height=16, width=16, num_inference_steps=2, max_sequence_length=8).images[0]
    assert image.size == (16, 16)
