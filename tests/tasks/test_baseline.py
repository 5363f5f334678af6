"""Stage `baseline`: what each method leaves of a teacher, trained by the real loop; the presets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from moe_core import accounting
from moe_core.config import Params
from moe_core.transformer import PARTS, FluxMoETransformer2DModel
from tasks import moe_kd, training
from tasks.phase import PRODUCT, Phase
from tasks.plan_costs import Costs
from tasks.plan_teacher import describe
from tests.tasks.test_plan import CPU, SAMPLES, checkout_with_importance, params


@pytest.fixture(scope="module")
def small() -> Params:
    """The preset's models with few samples and two steps."""
    names = ("pruned_1_5", "pruned_1_5_fitted", "pruned_2", "lite_m", "lite_s", "bk_m", "bk_s")
    few = {"batch_size": 4, "steps": 2, "warmup_steps": 0}
    return params(
        "baselines=demo",
        *(f"baselines.{name}.kd.optimizer.{key}={value}" for name in names for key, value in few.items()),
        *(f"data.shard.{split}_samples={SAMPLES}" for split in ("validation", "calibration")),
        f"kd.validation_samples={SAMPLES}",
        f"kd.importance_batch_size={SAMPLES}",
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, small: Params) -> Path:
    return checkout_with_importance(tmp_path_factory.mktemp("checkout"), small)


@pytest.fixture(scope="module")
def made(root: Path, small: Params) -> dict[str, FluxMoETransformer2DModel]:
    """Each baseline of the preset, after its two steps."""
    found = {}
    for name, baseline in small.baselines.items():
        arguments = {"root": str(root), "params": small.model_dump(mode="json"), "made": str(root / "made" / name)}
        job = Phase(name, "tasks.baseline:build", {**arguments, "name": name}, baseline.kd.optimizer, 10, 10, 10)
        (root / "made").mkdir(exist_ok=True)
        training.run([job], root, CPU, 1, 0)
        place = root / small.models[name].checkpoint
        place.parent.mkdir(parents=True, exist_ok=True)
        (root / name / PRODUCT).rename(place)
        found[name] = FluxMoETransformer2DModel.from_pretrained(place)
    return found


def test_pruned_ffns_are_as_wide_as_the_sparse_models_active_ones(
    made: dict[str, FluxMoETransformer2DModel], small: Params
) -> None:
    costs = Costs(small, describe(small.model))
    sparse, pruned = (accounting.count(costs.configs[name]).by_kind() for name in ("L", "pruned_1_5"))
    # Both have the same compressed conditioning and attention; L has routers besides.
    for kind in ("attention", "adaln"):
        assert pruned[kind].activated == sparse[kind].activated
    routers = 20 * small.moe.num_experts * made["pruned_1_5"].inner_dim
    assert pruned["ffn"].activated == sparse["ffn"].activated - routers
    assert accounting.count(made["pruned_1_5"]).total == sum(kind.total for kind in pruned.values())
    assert made["pruned_2"].config["moe"]["shared_ratio"] == 2


def test_blocks_are_dropped_in_two_steps_each_by_its_rule(
    made: dict[str, FluxMoETransformer2DModel], root: Path
) -> None:
    change = json.loads((root / "data" / "importance" / "block_change.json").read_text())
    error = dict(zip(change["blocks"], change["mse"], strict=True))
    least = {
        kind: sorted(sorted(range(1, count), key=lambda i: error[f"{blocks}.{i}"])[:gone])
        for kind, blocks, count, gone in (
            ("double", "transformer_blocks", 5, 2),
            ("single", "single_transformer_blocks", 12, 3),
        )
    }
    assert made["lite_m"].config["dropped_blocks"] == {"double": least["double"], "single": []}
    assert made["lite_s"].config["dropped_blocks"] == least
    assert made["bk_m"].config["dropped_blocks"] == {"double": [1, 3], "single": []}
    assert made["bk_s"].config["dropped_blocks"]["double"] == [1, 3]
    for name in ("lite_s", "bk_s"):
        assert len(made[name].transformer_blocks) == 3
        assert len(made[name].single_transformer_blocks) == 9


def test_lite_changes_blocks_before_gaps_alone(made: dict[str, FluxMoETransformer2DModel], root: Path) -> None:
    start = FluxMoETransformer2DModel.from_pretrained(root / "made" / "lite_m").state_dict()
    for name, weight in made["lite_m"].state_dict().items():
        before_gap = made["lite_m"].part_of(name) == "gap_blocks"
        assert torch.equal(weight, start[name]) != before_gap, name


def test_the_plan_counts_what_is_made(made: dict[str, FluxMoETransformer2DModel], small: Params) -> None:
    configs = Costs(small, describe(small.model)).configs
    for name, model in made.items():
        assert accounting.count(configs[name]) == accounting.count(model), name


def test_a_parts_rate_is_that_of_its_parameters_alone(root: Path, small: Params) -> None:
    kd = small.kd.moe.model_copy(update={"rates": {"conditioning": 0.25, "experts": 2.0}})
    changed = small.model_copy(update={"kd": small.kd.model_copy(update={"moe": kd})})
    trainee = moe_kd.build(CPU, str(root), changed.model_dump(mode="json"), str(root / "rated"))
    parts = trainee.student.parts()
    factors = {
        part: {
            trainee.rates.get(f"student.{n}")
            for n, p in trainee.student.named_parameters()
            if any(p is own for own in parameters)
        }
        for part, parameters in parts.items()
        if parameters
    }
    assert factors == {"shared": {None}, "conditioning": {0.25}, "experts": {2.0}, "router": {None}, "rest": {None}}
    assert all(name in dict(trainee.module.named_parameters()) for name in trainee.rates)


def test_groups_of_small_plus_keep_the_routers_that_were_drawn() -> None:
    assert {*PARTS} - {*params("mob=small-plus").kd.mob.train} == {"block_router", "gap_blocks"}


def test_presets_fit_their_models() -> None:
    for experiment in ("demo", "scenes"):
        small = params(f"experiment={experiment}", f"baselines={experiment}")
        assert small.kd.joint
        for name in ("pruned_1_5", "pruned_1_5_fitted", "pruned_2"):
            assert small.baselines[name].kd.optimizer == small.kd.moe.optimizer
            assert small.baselines[name].kd.train == small.kd.moe.train
    flux = params("experiment=flux1-moe-s", "baselines=flux1", "data.path=/tars", "compute=h100x8")
    assert flux.baselines["pruned_1_5"].kd.optimizer.steps == sum(
        stage.optimizer.steps for stage in (flux.kd.shared_expert, flux.kd.moe)
    )
    configs = Costs(flux, describe(flux.model)).configs
    assert (configs["lite_9_26"]["num_layers"], configs["lite_9_26"]["num_single_layers"]) == (9, 26)


@pytest.mark.parametrize("experiment", ["demo", "scenes", "flux1-moe-l", "hyperflux-moe-xs"])
def test_both_recipes_have_the_same_steps(experiment: str) -> None:
    choices = [f"experiment={experiment}", *(["data.path=/tars"] if "flux" in experiment else [])]
    plus, paper = (params(*choices, f"moe={moe}") for moe in ("plus", "1s12e2a"))
    assert plus.kd.joint
    assert not paper.kd.joint
    staged = paper.kd.shared_expert.optimizer.steps + paper.kd.moe.optimizer.steps
    assert plus.kd.moe.optimizer.steps == plus.kd.joint_steps == staged
    for key in ("shared_ratio", "normal_ratio", "num_experts", "top_k", "dense_double_blocks", "conditioning_dim"):
        assert getattr(plus.moe, key) == getattr(paper.moe, key)
