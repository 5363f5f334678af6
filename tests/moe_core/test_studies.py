"""Section `studies`: with which parameters a run trains, and which studies are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from moe_core.config import Params, arm_params, parse
from moe_core.errors import ConfigError
from tasks.params import compose

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def values() -> dict[str, Any]:
    return yaml.safe_load(compose(ROOT, ["experiment=claims"]))


def run(values: dict[str, Any], arm: str, budget: str = "short", seed: int = 3) -> Params:
    study = parse(Params, values).studies["paper"]
    return parse(Params, arm_params(values, study, arm, budget, seed))


def test_arms_of_a_table_have_the_same_steps_and_data(values: dict[str, Any]) -> None:
    study = parse(Params, values).studies["paper"]
    for name, claim in study.claims.items():
        same = study.steps(claim.better, "long") == study.steps(claim.than, "long")
        # What trained on has more steps than what it trained on from.
        assert same == (name != "normal_experts"), name
    assert study.budgets["long"] == 10 * study.budgets["short"]
    assert len(study.seeds) == 5


def test_a_run_has_its_changes_its_steps_and_nothing_of_other_arms(values: dict[str, Any]) -> None:
    moe = run(values, "moe")
    assert (moe.seed, moe.kd.joint, moe.kd.moe.optimizer.steps, moe.kd.moe.train) == (
        3,
        False,
        16,
        ("experts", "router"),
    )
    assert moe.kd.moe.optimizer.batch_size == 64
    assert moe.kd.moe.optimizer.warmup_steps == 1
    assert not moe.baselines
    assert not moe.mob.levels
    assert not moe.studies
    half = run(values, "half_moe")
    assert (half.moe.shared_ratio, half.moe.num_experts, half.moe.top_k) == (0.5, 14, 4)
    plus = run(values, "plus", "long")
    assert (plus.moe.refit, plus.kd.joint, plus.kd.moe.train, plus.kd.moe.optimizer.steps) == (
        True,
        True,
        ("all",),
        320,
    )


def test_a_run_that_goes_on_from_another_one_finds_it_where_its_stage_leaves_it(values: dict[str, Any]) -> None:
    lite = run(values, "lite_s")
    assert {name: made.init for name, made in lite.baselines.items()} == {
        "lite_m": "teacher",
        "lite_s": "checkpoints/baselines/lite_m",
    }
    # Depth is distilled as the levels are.
    assert lite.baselines["lite_s"].kd.optimizer.learning_rate == lite.kd.mob.optimizer.learning_rate
    mob = run(values, "mob_s")
    assert {name: level.init for name, level in mob.mob.levels.items()} == {
        "mob_m": "teacher",
        "mob_s": "checkpoints/mob/mob_m",
    }
    assert run(values, "groups_1x12").mob.active == 4


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"arms": {"moe": {"after": "none"}}}, r"arms.moe.after is none; it must be one of the others: shared"),
        ({"arms": {"mob_m": {"after": "mob_s"}}}, r"arms.mob_m.after leads in a circle: mob_m, mob_s, mob_m"),
        (
            {"arms": {"mob_s": {"after": "shared"}}},
            r"after is shared, of stage shared_expert_kd; mob_kd can go on from moe_kd, mob_kd",
        ),
        ({"arms": {"moe": {"joint": True}}}, r"joint is true, and after is shared"),
        ({"arms": {"moe": {"moe": {"top_k": 13}}}}, r"studies.paper.arms.moe: .*top_k is 13, but there are 12 experts"),
        (
            {"arms": {"plus": {"kd": {"optimizer": {"rate": 1}}}}},
            r"studies.paper.arms.plus: kd.moe.optimizer.rate is 1",
        ),
        ({"arms": {"lite_m": {"kd": {"train": ["experts"]}}}}, r"studies.paper.arms.lite_m: .*kd.train has experts"),
        ({"arms": {"groups_2x6": {"mob": {"active": 7}}}}, r"mob.active is 7, but .*groups of 6 blocks"),
        ({"arms": {"bk_m": {"baseline": {"init": "teacher"}}}}, r"baseline has init; it follows from the arm itself"),
        ({"arms": {"mob_m": {"level": None}}}, r"stage is mob_kd, and level missing"),
        ({"claims": {"taylor": {"than": "nothing"}}}, r"claims.taylor.than is nothing; the arms are shared, moe"),
        (
            {"arms": {"plus": {"kd": {"optimizer": {"steps": 5}}}}},
            r"kd has steps; it follows from the study's budgets and batch_size",
        ),
        ({"arms": {"moe": {"mob": {"active": 2}}}}, r"mob is {'active': 2}, and stage moe_kd, which has no groups"),
        ({"arms": {"bk_m": {"joint": True}}}, r"joint is true, and stage baseline; only moe_kd can be"),
        ({"prompts": 601}, r"studies.paper.prompts is 601, but eval.prompts makes 600"),
        ({"seeds": [1, 1]}, r"seeds is \[1, 1\]; a seed that comes twice is one run"),
    ],
)
def test_what_cannot_be_run_is_refused_before_any_work(
    values: dict[str, Any], change: dict[str, Any], told: str
) -> None:
    changed = yaml.safe_load(yaml.safe_dump(values, sort_keys=False))
    _merge(changed["studies"]["paper"], change)
    with pytest.raises(ConfigError, match=told):
        parse(Params, changed)


def _merge(into: dict[str, Any], change: dict[str, Any]) -> None:
    for key, value in change.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value
