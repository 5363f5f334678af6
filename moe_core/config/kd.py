"""Section `kd`: the distillation stages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, model_validator

from moe_core.config.section import Section
from moe_core.config.training import OptimizerConfig, TimestepConfig

Part = Literal[
    "shared", "conditioning", "experts", "router", "group_blocks", "block_router", "gap_blocks", "rest", "all"
]
"""Parts of a student, as `kd.*.train` names them."""


NOT_YET: Mapping[str, set[str]] = {
    "shared_expert": {"experts", "router", "group_blocks", "block_router", "gap_blocks"},
    "moe": {"group_blocks", "block_router", "gap_blocks"},
    "mob": {"gap_blocks"},
}
"""Parts that a stage's student does not have: they come with a later stage, or with a baseline."""


class KDStageConfig(Section):
    """One distillation stage."""

    optimizer: OptimizerConfig
    lambda_feature: float = Field(1.0, ge=0)
    lambda_balance: float = Field(1e-2, ge=0)
    train: tuple[Part, ...] = Field(min_length=1, description="parts of the student whose weights change")
    rates: Mapping[Part, Annotated[float, Field(gt=0)]] = Field(
        {},
        description="learning rate of a part over the optimizer's; 1 for parts that are not named. On the command line: one more"
        " `+kd.moe.rates.router=0.1`, none `~kd.moe.rates`",
    )
    gradient_checkpointing: bool = False
    validate_every: int = Field(gt=0)

    @model_validator(mode="after")
    def _rates_are_of_what_trains(self) -> KDStageConfig:
        if "all" in self.rates:
            raise ValueError("rates has all; the rate of all parts is optimizer.learning_rate")
        if idle := [part for part in self.rates if part not in self.train and "all" not in self.train]:
            raise ValueError(
                f"rates has {idle[0]}, which does not train; train is {', '.join(self.train)} (an override ~...rates drops a preset's)"
            )
        return self


class KDConfig(Section):
    """The distillation pipeline, Sec. 3.2."""

    timesteps: TimestepConfig
    validation_samples: int = Field(gt=0, description="fixed samples, noise and timesteps of the validation loss")
    importance_batch_size: int = Field(gt=0)
    calibration_tokens: int = Field(
        gt=0,
        description="about how many tokens of each FFN stage importance keeps, for conversions that are fitted to them",
    )
    joint_steps: int = Field(
        gt=0,
        description="steps of shared_expert and moe together: moe=plus, which trains at once, gives them to kd.moe",
    )
    joint: bool = Field(
        False, description="moe_kd starts from the teacher instead of the trained shared experts (Table 5)"
    )
    shared_expert: KDStageConfig
    moe: KDStageConfig
    mob: KDStageConfig

    @model_validator(mode="after")
    def _parts_are_there(self) -> KDConfig:
        for stage, missing in NOT_YET.items():
            for key in ("train", "rates"):
                if absent := [part for part in getattr(getattr(self, stage), key) if part in missing]:
                    raise ValueError(f"{stage}.{key} has {absent[0]}; the model of that stage has none yet")
        return self
