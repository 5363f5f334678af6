"""Parameters that every training has: the optimizer with its schedule, and the noise levels."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from moe_core.config.section import Section


class OptimizerConfig(Section):
    """The optimizer and its schedule, for one training run."""

    optimizer: Literal["adamw", "muon"] = Field(
        "adamw", description="muon: Muon for the linear layers' matrices, AdamW for the rest (`moe_core.muon`)"
    )
    steps: int = Field(gt=0)
    batch_size: int = Field(gt=0, description="global batch, over all workers")
    learning_rate: float = Field(gt=0)
    schedule: Literal["constant", "cosine", "one_cycle"] = "cosine"
    warmup_steps: int = Field(0, ge=0, description="linear warm-up; one_cycle: length of the rise")
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.99)
    grad_clip: float = Field(1.0, gt=0, description="largest global gradient norm")
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="bf16: autocast of the forward pass; weights stay fp32"
    )

    @model_validator(mode="after")
    def _warmup_fits(self) -> OptimizerConfig:
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps is {self.warmup_steps}; it must be less than steps, which is {self.steps}")
        return self


class TimestepConfig(Section):
    """Which noise levels sigma in (0, 1] training and distillation draw."""

    kind: Literal["logit_normal", "discrete"] = "logit_normal"
    mean: float = 0.0
    std: float = Field(1.0, gt=0)
    shift: float = Field(1.0, gt=0, description="FLUX's resolution shift: sigma -> shift*sigma / (1 + (shift-1)*sigma)")
    steps: int = Field(8, gt=0, description="kind=discrete: the sigmas of a sampler of so many steps")
