"""Parameters that every training has: the optimizer with its schedule, and the noise levels."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from moe_core.config.section import Section


class OptimizerConfig(Section):
    """The optimizer and its schedule, for one training run."""

    optimizer: Literal["adamw", "adamw8bit", "muon"] = Field(
        "adamw",
        description="muon: Muon for the linear layers' matrices, AdamW for the rest (`moe_core.muon`);"
        " adamw8bit: torchao's, with moments of a byte (extra `lowbit`)",
    )
    steps: int = Field(gt=0)
    batch_size: int = Field(gt=0, description="global batch, over all workers")
    micro_batch: int | None = Field(
        None,
        gt=0,
        description="samples of one forward and backward pass, over all workers; gradients add up to the batch's;"
        " null: the whole batch at once",
    )
    learning_rate: float = Field(gt=0)
    schedule: Literal["constant", "cosine", "one_cycle"] = "cosine"
    warmup_steps: int = Field(0, ge=0, description="linear warm-up; one_cycle: length of the rise")
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.99)
    grad_clip: float = Field(1.0, gt=0, description="largest global gradient norm")
    precision: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="bf16: computed by autocast; in distillation frozen weights and the product are bf16 too, and fp32 what trains",
    )
    ema_decay: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="decay of the trained weights' moving average, which is validated and saved; null: none",
    )

    @model_validator(mode="after")
    def _warmup_fits(self) -> OptimizerConfig:
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps is {self.warmup_steps}; it must be less than steps, which is {self.steps}")
        return self

    @model_validator(mode="after")
    def _micro_batch_divides(self) -> OptimizerConfig:
        if self.micro_batch is not None and self.batch_size % self.micro_batch:
            raise ValueError(
                f"micro_batch is {self.micro_batch}; it must divide batch_size, which is {self.batch_size}"
            )
        return self

    @property
    def at_once(self) -> int:
        """Samples of one forward and backward pass, over all workers."""
        return self.micro_batch or self.batch_size


class TimestepConfig(Section):
    """Which noise levels sigma in (0, 1] training and distillation draw."""

    kind: Literal["logit_normal", "discrete"] = "logit_normal"
    mean: float = 0.0
    std: float = Field(1.0, gt=0)
    shift: float = Field(1.0, gt=0, description="FLUX's resolution shift: sigma -> shift*sigma / (1 + (shift-1)*sigma)")
    steps: int = Field(8, gt=0, description="kind=discrete: the sigmas of a sampler of so many steps")
