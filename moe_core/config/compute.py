"""Section `compute`: where and how a run takes place; no stage's identity includes it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from moe_core.config.section import Section

ComputingStage = Literal[
    "teacher",
    "shard",
    "importance",
    "shared_expert_kd",
    "moe_kd",
    "mob_kd",
    "generate",
    "evaluate",
    "sanity",
    "latency",
    "study_runs",
]
"""The stages that take from `compute`."""


class StageCompute(Section):
    """What one stage has otherwise than the others."""

    num_workers: int | None = Field(None, ge=0)
    cpus_per_worker: int | None = Field(None, gt=0)
    use_gpu: bool | None = None


class ComputeConfig(Section):
    """Where and how a run takes place; never part of a stage's identity."""

    num_workers: int = Field(1, ge=0, description="0 trains in the calling process: for unit tests only")
    cpus_per_worker: int = Field(2, gt=0)
    use_gpu: bool = False
    sharding: Literal["none", "full"] = Field(
        "none", description="distillation: none: every worker has both models; full: an equal part of them (FSDP2)"
    )
    text_encoders: Literal["resident", "sharded"] = Field(
        "resident", description="sharded: with sharding full, T5 too lies on all workers"
    )
    runs_per_gpu: int = Field(1, gt=0, description="study_runs: trainings side by side on one GPU")
    gpu_memory_gb: float | None = Field(None, gt=0, description="memory of one GPU, for planning")
    tflops: float | None = Field(None, gt=0, description="TFLOPs a second that one GPU sustains, for planning")
    expert_backend: Literal["auto", "by_shape", "loop", "by_expert", "grouped_mm", "triton", "megablocks"] = Field(
        "auto",
        description="auto: the fastest here, measured once for a size; by_shape: the same on every machine, so that results repeat to the bit",
    )
    compile: bool = Field(
        False,
        description="distillation and pictures: blocks go through torch.compile, which takes minutes when they are first called",
    )
    checkpoint_every: int = Field(gt=0, description="steps between resume checkpoints")
    log_every: int = Field(gt=0)
    max_failures: int = Field(1, ge=0, description="worker crashes that Ray Train restarts from the last checkpoint")
    stages: dict[ComputingStage, StageCompute] = Field(
        default_factory=dict, description="stage (`mob_kd` for all its levels) -> what it has otherwise"
    )

    @model_validator(mode="after")
    def _text_encoders_fit(self) -> ComputeConfig:
        if self.text_encoders == "sharded" and self.sharding == "none":
            raise ValueError("text_encoders is sharded, but sharding is none; it must be full")
        return self

    def of(self, stage: str) -> ComputeConfig:
        """What a stage, named as DVC addresses it (`mob_kd@M`), has: its own values where `stages` gives some."""
        own = {str(name): config.model_dump(exclude_none=True) for name, config in self.stages.items()}
        return self.model_copy(update=own.get(stage.partition("@")[0], {}))

    @property
    def most_cpus(self) -> int:
        """CPUs that the largest stage asks for."""
        every = [self, *(self.of(str(stage)) for stage in self.stages)]
        return max(max(each.num_workers, 1) * each.cpus_per_worker for each in every)
