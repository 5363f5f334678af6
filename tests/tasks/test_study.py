"""Studies: runs by the stages' own code, in Ray tasks; killed and found again; what they say of claims."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import yaml
from PIL import Image

from moe_core.config import Params, parse
from moe_core.errors import ConfigError, DataError, TrainingError
from moe_core.transformer import FluxMoETransformer2DModel
from tasks import study, study_arms
from tasks.inspection import Inspector
from tasks.params import compose
from tasks.phase import NOTES, PRODUCT
from tasks.study_arms import Run
from tests.tasks.test_plan import SAMPLES, checkout_with_importance

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = 3

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray", "ignore::ResourceWarning")


def params(*overrides: str) -> Params:
    """The claims' arms on the demo's model, with few samples and steps, and nobody to judge pictures."""
    few = [
        "studies=paper",
        "moe=1s12e2a",
        "mob=small",
        "studies.paper.budgets.short=2",
        "~studies.paper.budgets.long",
        "studies.paper.seeds=[0,1]",
        f"studies.paper.prompts={PROMPTS}",
        "studies.paper.batch_size=4",
        "eval.classifier=null",
        "model.num_inference_steps=2",
        f"kd.validation_samples={SAMPLES}",
        f"kd.importance_batch_size={SAMPLES}",
        *(f"data.shard.{split}_samples={SAMPLES}" for split in ("validation", "calibration")),
    ]
    return parse(Params, yaml.safe_load(compose(ROOT, [*few, *overrides])))


@pytest.fixture(scope="module")
def small() -> Params:
    return params()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, small: Params) -> Path:
    """A checkout with what the runs read."""
    folder = checkout_with_importance(tmp_path_factory.mktemp("checkout"), small)
    pictures = folder / "data" / "images" / "teacher" / "own"
    pictures.mkdir(parents=True)
    lines = []
    for number in range(PROMPTS + 1):
        lines.append(json.dumps({"tag": "single_object", "prompt": "red seven", "include": []}) + "\n")
        Image.fromarray(np.full((16, 16, 3), 40 * number, np.uint8)).save(pictures / f"{number:05d}-00.png")
    (folder / "data" / "prompts.jsonl").write_text("".join(lines))
    return folder


def runs(small: Params, *names: str, deps: dict[str, str] | None = None) -> list[Run]:
    """The first seed's runs of these arms."""
    found = study_arms.runs(small, small.studies["paper"], deps or {"code": "1"})
    return [run for run in found if run.arm in names and run.seed == 0]


def make(root: Path, home: Path, small: Params, run: Run, needs_model: bool = True) -> dict[str, Any]:
    return study_arms.work(root, home, small, PROMPTS, run, needs_model)


def test_every_arm_of_the_claims_trains_and_is_measured(root: Path, small: Params, tmp_path: Path) -> None:
    results = {}
    for run in [run for run in study_arms.runs(small, small.studies["paper"], {}) if run.seed == 0]:
        results[run.arm] = make(root, tmp_path, small, run)["result"]
    assert list(results) == list(small.studies["paper"].arms)
    for arm, result in results.items():
        assert result["measures"].keys() == {"kd_loss", "teacher_distance"}, arm
        assert result["curve"][0][0] == 0
        assert result["curve"][-1][0] == 2 * small.studies["paper"].arms[arm].share
    # The same active size, but for routers; groups have as many active blocks as what is dropped leaves.
    assert results["half_moe"]["params"]["activated"] - results["moe"]["params"]["activated"] == 20 * 2 * 48
    assert results["plus"]["params"] == results["joint"]["params"] == results["moe"]["params"]
    routers = 3 * (48 + 48)
    assert results["mob_m"]["params"]["activated"] == results["lite_m"]["params"]["activated"] + routers
    assert results["lite_s"]["params"] == results["bk_s"]["params"]


@pytest.mark.usefixtures("ray_session")
@pytest.mark.timeout(240)
def test_tasks_in_other_processes_come_to_the_same(root: Path, small: Params, tmp_path: Path) -> None:
    pair = runs(small, "shared", "moe")
    here = [make(root, tmp_path / "here", small, run)["result"] for run in pair]
    task = ray.remote(study_arms.work).options(num_cpus=1)
    there = [ray.get(task.remote(root, tmp_path / "there", small, PROMPTS, run, True))["result"] for run in pair]
    assert there == here


def test_a_run_killed_in_the_middle_goes_on_and_comes_to_the_same(root: Path, small: Params, tmp_path: Path) -> None:
    longer = params("studies.paper.budgets.short=6", "compute.checkpoint_every=2")
    [run] = runs(longer, "pruned_1_5")
    whole = make(root, tmp_path / "whole", longer, run)["result"]
    with pytest.MonkeyPatch.context() as patch:
        saved = study_arms.Phase

        def stopping(*args: Any, **more: Any) -> Any:
            # As a kill after a checkpoint and a step: the loop ends without a product.
            patch.setattr("tasks.training._Loop._validate", _stop_at(4))
            return saved(*args, **more)

        patch.setattr(study_arms, "Phase", stopping)
        with pytest.raises(KeyboardInterrupt):
            make(root, tmp_path / "killed", longer, run)
    assert not (tmp_path / "killed" / run.fingerprint / study_arms.RESULT).exists()
    resumed = make(root, tmp_path / "killed", longer, run)["result"]
    assert "goes on from" in (tmp_path / "killed" / run.fingerprint / NOTES).read_text()
    assert resumed["measures"] == whole["measures"]
    assert resumed["curve"] == whole["curve"]


def _stop_at(step: int) -> Any:
    from tasks.training import _Loop

    validate = _Loop._validate

    def stop(self: Any, trainee: Any, average: Any, at: int) -> None:
        if at >= step:
            raise KeyboardInterrupt
        validate(self, trainee, average, at)

    return stop


def test_a_run_is_found_again_by_what_decides_it(small: Params) -> None:
    before = {run.name: run.fingerprint for run in study_arms.runs(small, small.studies["paper"], {"code": "1"})}
    assert len(set(before.values())) == len(before)
    more = params("studies.paper.arms.plus.kd.lambda_balance=0.5", "studies.paper.claims.taylor.ratio=2")
    after = {run.name: run.fingerprint for run in study_arms.runs(more, more.studies["paper"], {"code": "1"})}
    assert {name for name in before if before[name] != after[name]} == {"plus-short-0", "plus-short-1"}
    # Where it runs is no part of it; code is, and so is the run it starts from.
    elsewhere = params("compute.cpus_per_worker=2")
    assert runs(elsewhere, "moe", deps={"code": "1"})[0].fingerprint == before["moe-short-0"]
    assert runs(small, "moe", deps={"code": "2"})[0].fingerprint != before["moe-short-0"]
    other = params("+studies.paper.arms.shared.kd.lambda_feature=0.5")
    assert runs(other, "moe", deps={"code": "1"})[0].fingerprint != before["moe-short-0"]


def test_a_finished_run_is_read_and_made_again_only_for_its_model(root: Path, small: Params, tmp_path: Path) -> None:
    [run] = runs(small, "pruned_2")
    made = make(root, tmp_path, small, run)
    folder = tmp_path / run.fingerprint
    study_arms.lighten(folder)
    assert [path.name for path in folder.iterdir()] == [study_arms.RESULT]
    assert make(root, tmp_path, small, run, needs_model=False) == made
    assert not (folder / study_arms.PHASE).exists()
    assert make(root, tmp_path, small, run)["result"] == made["result"]
    FluxMoETransformer2DModel.from_pretrained(folder / study_arms.PHASE / PRODUCT)


def test_an_error_names_the_run(root: Path, tmp_path: Path) -> None:
    hot = params("+studies.paper.arms.pruned_2.kd.optimizer={learning_rate: 1e30, optimizer: adamw, grad_clip: 1e30}")
    with pytest.raises(TrainingError, match=r"pruned_2-short-0: train: .* at step"):
        make(root, tmp_path, hot, runs(hot, "pruned_2")[0])


def result(loss: float, accuracy: float | None = None) -> dict[str, Any]:
    measures = {"kd_loss": loss, "teacher_distance": loss} | (
        {} if accuracy is None else {"accuracy": accuracy, "fid": 100 * loss}
    )
    kinds = None if accuracy is None else {"counting": accuracy}
    return {
        "measures": measures,
        "accuracy_by_kind": kinds,
        "params": {"activated": 5000},
        "curve": [[0, 2 * loss], [2, loss]],
    }


def test_the_report_has_a_verdict_a_claim_and_a_curve_an_arm(small: Params) -> None:
    config = small.studies["paper"]
    losses = {arm: 0.1 + 0.01 * number for number, arm in enumerate(config.arms)}
    made = {
        (arm, "short", seed): result(losses[arm] + 0.0001 * seed, 0.5 + 0.1 * (arm == "moe") + 0.001 * seed)
        for arm in config.arms
        for seed in config.seeds
    }
    verdicts = {"short": study.judge(config, made, "short")}
    assert verdicts["short"]["taylor"]["kd_loss"].verdict == "holds"
    assert verdicts["short"]["normal_experts"]["kd_loss"].verdict == "does not hold here"
    assert verdicts["short"]["normal_experts"]["accuracy"].verdict == "holds"
    text = study.render(config, made, verdicts)
    row = next(line for line in text.splitlines() if "that it began with | Table 4" in line)
    assert "**does not hold here**; accuracy: holds" in row
    assert "| `groups_1x12` | 5 k | 0.26 ± 0.00064 |" in text
    assert (
        "| MoE at r_a 1.5 is better than FFNs cut to r 1.5 | moe / pruned_1_5 | 4 | KD loss | 0.1101 | 0.1201 | -0.01 ± "
        in text
    )
    table = study.frame(config, made)
    assert len(table) == 2 * len(config.arms)
    [row] = table[(table["arm"] == "moe") & (table["seed"] == 1)].to_dict("records")
    assert (row["steps"], row["activated"], row["kd_loss"], row["accuracy_counting"]) == (
        4,
        5000,
        losses["moe"] + 0.0001,
        0.601,
    )
    svg = study.study_figures.curves(config, made, "short")
    assert svg == study.study_figures.curves(config, made, "short")
    assert svg.count("<!-- groups_") == 3


def test_missing_runs_and_measures_are_named(small: Params, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"shared-short-0.json does not exist; `dvc repro study_runs@"):
        study.read_runs(tmp_path, small.studies["paper"])
    made = {(arm, "short", seed): result(0.1) for arm in small.studies["paper"].arms for seed in (0, 1)}
    with pytest.raises(ConfigError, match="a claim is about accuracy, which was not measured"):
        study.judge(small.studies["paper"], made, "short")


def test_a_study_without_claims_shows_its_arms(small: Params) -> None:
    config = small.studies["paper"].model_copy(update={"claims": {}})
    made = {(arm, "short", seed): result(0.1 + 0.01 * seed) for arm in config.arms for seed in config.seeds}
    text = study.render(config, made, {"short": study.judge(config, made, "short")})
    assert "Verdicts" not in text
    assert "| `plus` | 5 k | 0.105 ± " in text
    assert "<!-- All arms -->" in study.study_figures.curves(config, made, "short")


def test_every_run_is_measured_with_the_experiments_seed(root: Path, small: Params, tmp_path: Path) -> None:
    """One that trains with seed 1, measured: as the evaluation of the experiment, whose seed is 0, says of its model."""
    [run] = [r for r in study_arms.runs(small, small.studies["paper"], {}) if r.name == "pruned_2-short-1"]
    found = make(root, tmp_path, small, run)["result"]
    compute = small.compute.model_copy(update={"num_workers": 0})
    model = tmp_path / run.fingerprint / study_arms.PHASE / PRODUCT
    inspector = Inspector(root, small.model_copy(update={"compute": compute}), model, dense=False)
    assert found["measures"]["kd_loss"] == inspector.validation()["distill"]
    # The curve's noise is the run's.
    assert found["curve"][-1][1] != found["measures"]["kd_loss"]
