"""Section `studies`: trainings that differ in one thing each, repeated over seeds and budgets, and what is claimed of them.

- An arm is one stage of the pipeline with some parameters changed; it may go on from another arm's model.
- A run is an arm with a budget and a seed. `arm_params` says with which parameters it trains: the study's own, so that the stage's code
  is the one that trains everything else.
- A claim sets two arms against each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from moe_core.config.agreement import checkpoints
from moe_core.config.section import Section
from moe_core.config.sparse import MoBGroupsConfig

ArmStage = Literal["shared_expert_kd", "moe_kd", "mob_kd", "baseline"]
Measure = Literal["kd_loss", "teacher_distance", "accuracy", "fid"]

RISING: frozenset[str] = frozenset({"accuracy"})
"""Measures of which more is better."""
AFTER: Mapping[str, tuple[str, ...]] = {
    "shared_expert_kd": (),
    "moe_kd": ("shared_expert_kd",),
    "mob_kd": ("moe_kd", "mob_kd"),
    "baseline": ("baseline",),
}
"""Stage -> those whose model it can start from; each but `moe_kd` can start from the teacher too, `moe_kd` if it is joint."""
TEMPLATES = {"shared_expert_kd": "shared_expert", "moe_kd": "moe", "mob_kd": "mob"}
"""Stage -> its section of `kd`."""
WARMUP, VALIDATIONS = 10, 5
"""A run warms up for a tenth of its steps at most, and validates five times or six."""


class ArmLevelConfig(Section):
    """mob_kd: the groups, as in `mob.levels`."""

    double: MoBGroupsConfig
    single: MoBGroupsConfig


class ArmConfig(Section):
    """One training of a study."""

    stage: ArmStage
    after: str | None = Field(description="arm from whose model it goes on; null: the teacher")
    share: int = Field(gt=0, description="how many times the budget's steps it trains")
    joint: bool = Field(description="moe_kd: as kd.joint")
    moe: dict[str, Any] = Field(description="changes of section moe; an arm that goes on from it has them too")
    mob: dict[str, Any] = Field(description="changes of section mob, other than levels")
    level: ArmLevelConfig | None = Field(description="mob_kd: its groups")
    baseline: dict[str, Any] | None = Field(
        description="baseline: what section baselines says of it, other than init and kd"
    )
    kd: dict[str, Any] = Field(
        description="changes of the stage's section of kd; a baseline has that of moe, one of depth that of mob"
    )

    @model_validator(mode="after")
    def _fits_the_stage(self) -> ArmConfig:
        for name, value, stage in (("level", self.level, "mob_kd"), ("baseline", self.baseline, "baseline")):
            if (value is not None) != (self.stage == stage):
                raise ValueError(
                    f"stage is {self.stage}, and {name} {'missing' if value is None else 'given'}; it belongs to {stage} alone"
                )
        for section, own in (("mob", "levels"), ("baseline", "init"), ("baseline", "kd")):
            if own in (getattr(self, section) or {}):
                raise ValueError(f"{section} has {own}; it follows from the arm itself")
        if self.mob and self.stage != "mob_kd":
            raise ValueError(f"mob is {self.mob}, and stage {self.stage}, which has no groups")
        if self.joint and self.stage != "moe_kd":
            raise ValueError(f"joint is true, and stage {self.stage}; only moe_kd can be")
        optimizer = self.kd.get("optimizer", {})
        given = [key for key in ("steps", "batch_size") if key in optimizer] + [
            key for key in ("validate_every",) if key in self.kd
        ]
        if given:
            raise ValueError(f"kd has {given[0]}; it follows from the study's budgets and batch_size")
        if self.stage == "moe_kd" and self.joint == (self.after is not None):
            raise ValueError(
                f"joint is {str(self.joint).lower()}, and after is {self.after}; a joint moe_kd starts from the teacher, another from shared experts"
            )
        return self


class ClaimConfig(Section):
    """Of one arm against another: measure(better) <= ratio * measure(than), or for accuracy measure(better) >= measure(than) / ratio."""

    says: str = Field(description="a sentence")
    source: str = Field(description="where it is from: a table of the paper, or `ours`")
    better: str
    than: str
    ratio: float = Field(gt=0)
    measures: tuple[Measure, ...] = Field(min_length=1)


class StudyConfig(Section):
    """Arms, repeated, and claims about them."""

    title: str
    seeds: tuple[int, ...] = Field(min_length=1)
    budgets: dict[str, int] = Field(
        min_length=1, description="name -> steps of an arm of share 1; small ones are run first"
    )
    batch_size: int = Field(gt=0, description="of every arm")
    prompts: int = Field(gt=1, description="of evaluation, the first so many: pictures of each run")
    arms: dict[str, ArmConfig] = Field(min_length=1)
    claims: dict[str, ClaimConfig]

    @model_validator(mode="after")
    def _names_exist(self) -> StudyConfig:
        for name, arm in self.arms.items():
            if not name.isidentifier():
                raise ValueError(f"arms has '{name}'; a name must be of letters, digits and _ alone")
            if arm.after is None:
                continue
            others = [other for other in self.arms if other != name]
            if arm.after not in others:
                raise ValueError(f"arms.{name}.after is {arm.after}; it must be one of the others: {', '.join(others)}")
            if (start := self.arms[arm.after].stage) not in AFTER[arm.stage]:
                possible = ", ".join(AFTER[arm.stage]) or "none"
                raise ValueError(
                    f"arms.{name}.after is {arm.after}, of stage {start}; {arm.stage} can go on from {possible}"
                )
        for name in self.arms:
            seen, here = [name], self.arms[name].after
            while here is not None:
                if here in seen:
                    raise ValueError(f"arms.{name}.after leads in a circle: {', '.join([*seen, here])}")
                seen, here = [*seen, here], self.arms[here].after
        for name, claim in self.claims.items():
            for key in ("better", "than"):
                if (arm_name := getattr(claim, key)) not in self.arms:
                    raise ValueError(f"claims.{name}.{key} is {arm_name}; the arms are {', '.join(self.arms)}")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds is {list(self.seeds)}; a seed that comes twice is one run")
        return self

    def line(self, name: str) -> list[str]:
        """An arm and those that it goes on from, the first one first."""
        after = self.arms[name].after
        return [*(self.line(after) if after else []), name]

    def order(self) -> list[str]:
        """All arms, each after those that it goes on from."""
        return list(dict.fromkeys(one for name in self.arms for one in self.line(name)))

    def steps(self, name: str, budget: str) -> int:
        """Steps of an arm, those that it goes on from included."""
        return sum(self.arms[one].share for one in self.line(name)) * self.budgets[budget]


def arm_params(values: Mapping[str, Any], study: StudyConfig, name: str, budget: str, seed: int) -> dict[str, Any]:
    """The plain parameters of a run: `values`, those of the experiment, with the arm's changes and none of what the arm does not use."""
    line = study.line(name)
    moe = {**values["moe"]}
    for one in line:
        moe |= study.arms[one].moe
    kd = {**values["kd"], "joint": any(study.arms[one].joint for one in line)}
    baselines: dict[str, Any] = {}
    levels: dict[str, Any] = {}
    mob = {**values["mob"], "levels": levels}
    for one in line:
        own = study.arms[one]
        template = TEMPLATES.get(own.stage) or (
            "moe" if (own.baseline or {}).get("method") == "diff_pruning" else "mob"
        )
        trained = _stage(values["kd"][template], own, study, budget)
        if own.stage == "baseline":
            baselines[one] = {**(own.baseline or {}), "init": place(study, own.after), "kd": trained}
            continue
        kd[template] = trained
        if own.level is not None:
            mob |= own.mob
            levels[one] = {"init": place(study, own.after), **own.level.model_dump(mode="json")}
    return {
        **values,
        "seed": seed,
        "moe": moe,
        "mob": mob,
        "kd": kd,
        "baselines": baselines,
        "models": models(levels, baselines),
        "studies": {},
    }


def place(study: StudyConfig, name: str | None) -> str:
    """Where the stage that makes an arm's model leaves it, below data/."""
    if name is None:
        return "teacher"
    arm = study.arms[name]
    own = {
        "mob_kd": f"mob/{name}",
        "baseline": f"baselines/{name}",
        "moe_kd": "moe",
        "shared_expert_kd": "shared_expert",
    }
    return f"checkpoints/{own[arm.stage]}"


def models(levels: Mapping[str, Any], baselines: Mapping[str, Any]) -> dict[str, Any]:
    """Section `models` of a run: its pictures are judged by the study, which reads none of it."""
    return {
        name: {"checkpoint": path, "reference": "data/images/teacher"}
        for name, path in checkpoints(levels, baselines).items()
    }


def _stage(base: Mapping[str, Any], arm: ArmConfig, study: StudyConfig, budget: str) -> dict[str, Any]:
    """A stage's section of `kd` with the arm's changes and the budget's steps."""
    steps = arm.share * study.budgets[budget]
    changes = {**arm.kd}
    optimizer = {**base["optimizer"], **changes.pop("optimizer", {}), "steps": steps, "batch_size": study.batch_size}
    optimizer["warmup_steps"] = min(optimizer["warmup_steps"], steps // WARMUP)
    return {**base, **changes, "optimizer": optimizer, "validate_every": max(1, steps // VALIDATIONS)}
