"""The whole of `params.yaml`."""

from __future__ import annotations

from pydantic import Field, ValidationError, model_validator

from moe_core.config.agreement import (
    check_baseline_starts,
    check_baselines,
    check_blocks,
    check_fit,
    check_levels,
    check_samples,
    check_widths,
    check_workers,
)
from moe_core.config.baselines import BaselineConfig
from moe_core.config.compute import ComputeConfig
from moe_core.config.data import DataConfig
from moe_core.config.evaluation import EvalConfig, EvaluatedModel
from moe_core.config.kd import KDConfig
from moe_core.config.model import ModelConfig
from moe_core.config.section import Section
from moe_core.config.sparse import MoBConfig, MoEConfig
from moe_core.config.studies import StudyConfig, arm_params


class Params(Section):
    """The whole of `params.yaml`."""

    experiment: str
    seed: int = Field(ge=0)
    model: ModelConfig
    data: DataConfig
    moe: MoEConfig
    mob: MoBConfig
    baselines: dict[str, BaselineConfig]
    models: dict[str, EvaluatedModel]
    kd: KDConfig
    eval: EvalConfig
    studies: dict[str, StudyConfig]
    compute: ComputeConfig

    @model_validator(mode="after")
    def _sections_agree(self) -> Params:
        check_levels(self.mob, self.baselines, self.models)
        check_baseline_starts(self.baselines)
        check_fit(self.moe, self.kd.joint)
        check_samples(self)
        check_workers(self)
        if self.model.transformer is not None:
            shape = self.model.transformer
            check_blocks(self.moe, self.mob, shape.num_layers, shape.num_single_layers)
            width = shape.num_attention_heads * shape.attention_head_dim
            check_widths(self.moe, width)
            check_baselines(self.baselines, self.moe, width, shape.num_layers, shape.num_single_layers)
        self._arms_are_whole()
        return self

    def _arms_are_whole(self) -> None:
        """What a study's arms change must come to parameters that hold."""
        values = self.model_dump(mode="json") if self.studies else {}
        for name, study in self.studies.items():
            if not name.isidentifier():
                raise ValueError(f"studies has '{name}'; a name must be of letters, digits and _ alone")
            if study.prompts > self.eval.prompts:
                raise ValueError(
                    f"studies.{name}.prompts is {study.prompts}, but eval.prompts makes {self.eval.prompts}"
                )
            for arm in study.arms:
                try:
                    Params.model_validate(arm_params(values, study, arm, next(iter(study.budgets)), self.seed))
                except ValidationError as error:
                    fault = error.errors()[0]
                    told = fault["msg"].removeprefix("Value error, ")
                    if key := ".".join(str(part) for part in fault["loc"]):
                        value = "" if fault["type"] == "value_error" else f" is {fault['input']!r}"
                        told = f"{key}{value}: {told}"
                    raise ValueError(f"studies.{name}.arms.{arm}: {told}") from None
