"""What the three distillation stages train, in the workers: a student beside its frozen teacher, on the shards.

- Rank 0 makes the stage's student once, tensor by tensor, as a folder that a resumed run finds again.
- `compute.sharding: none`: every worker loads both models. `full`: it loads its parts of them.
- Either way, with `precision: bf16` what is frozen is kept in bf16, what trains in fp32. The VAE is not loaded: nobody decodes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from diffusers import FluxPipeline
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from moe_core import noise, sampling, sharding
from moe_core.compiling import compile_blocks
from moe_core.config import KDStageConfig, Params
from moe_core.data.latents import LatentDataset
from moe_core.distill import KDBatch, KDStep
from moe_core.transformer import FluxMoETransformer2DModel
from tasks.batches import make_batch
from tasks.places import SHARDS, TEACHER
from tasks.validation import validation_loss
from tasks.worker import Worker

Convert = Callable[[Path], None]
"""Writes a stage's student into a folder that is not there yet, whole or not at all."""


def build(
    device: torch.device, root: Path, params: Params, stage: KDStageConfig, purpose: str, convert: Convert, made: Path
) -> KDTrainee:
    """The student of a stage, its teacher and the shards.

    `purpose` names the stage in its random numbers, so that stages of one seed do not see the same noise. `made`: where the
    student to begin with is kept.
    """
    worker = Worker.here(device)
    if worker.rank == 0 and not made.exists():
        convert(made)
    worker.barrier()
    load = _sharded if params.compute.sharding == "full" else _whole
    pipeline, student = load(worker, root / TEACHER, made, params, stage)
    return KDTrainee(pipeline, student, stage, params, root, purpose)


def _whole(
    worker: Worker, teacher: Path, made: Path, params: Params, stage: KDStageConfig
) -> tuple[FluxPipeline, FluxMoETransformer2DModel]:
    precision = _precision(stage)
    pipeline = sampling.load_pipeline(teacher, dtype=precision, without=("vae",))
    student = sampling.load_transformer(made)
    student.set_trainable(stage.train)
    sharding.lower_frozen(student, precision)
    return pipeline.to(worker.device), student.to(worker.device)


def _sharded(
    worker: Worker, teacher: Path, made: Path, params: Params, stage: KDStageConfig
) -> tuple[FluxPipeline, FluxMoETransformer2DModel]:
    device, precision = worker.device, _precision(stage)
    mesh = init_device_mesh(device.type, (worker.size,))
    pipeline = sampling.load_pipeline(teacher, dtype=precision, without=("vae", "transformer"))
    pipeline.text_encoder.to(device)
    pipeline.text_encoder_2.requires_grad_(False)
    if params.compute.text_encoders == "sharded":
        sharding.shard_text_encoder(pipeline.text_encoder_2, mesh)
    else:
        pipeline.text_encoder_2.to(device)
    pipeline.register_modules(transformer=sharding.load_flux(teacher / "transformer", mesh, device, precision))
    return pipeline, sharding.load_flux(made, mesh, device, precision, stage.train)


def _precision(stage: KDStageConfig) -> torch.dtype:
    return torch.bfloat16 if stage.optimizer.precision == "bf16" else torch.float32


class KDTrainee:
    """A student, its frozen teacher and the shards, as the training loop wants them."""

    def __init__(
        self,
        pipeline: FluxPipeline,
        student: FluxMoETransformer2DModel,
        config: KDStageConfig,
        params: Params,
        root: Path,
        purpose: str,
    ) -> None:
        self.pipeline = pipeline
        student.set_expert_backend(params.compute.expert_backend)
        if params.compute.compile:
            for model in (student, pipeline.transformer):
                compile_blocks(model)
        self.module: nn.Module = KDStep(student, pipeline.transformer, config)
        self.student = student
        self.params = params
        self.train = LatentDataset(root / SHARDS, "train")
        self.validation = LatentDataset(root / SHARDS, "val")
        rates = {str(part): factor for part, factor in config.rates.items()}
        self.rates = {
            f"student.{name}": rates[part]
            for name, _ in student.named_parameters()
            if (part := student.part_of(name)) in rates
        }
        self.seed = noise.derive_seed(params.seed, purpose)
        self.optimizer = config.optimizer

    def batch(self, positions: Sequence[int]) -> KDBatch:
        """Samples, noise and noise levels at these positions."""
        rows = self.train.draw(self.seed, positions, self.optimizer.batch_size)
        return make_batch(self.pipeline, self.train, rows, self.seed, positions, self.params)

    def validate(self) -> dict[str, float]:
        """The distillation loss on fixed samples with fixed noise: the same ones for every stage and model."""
        return validation_loss(self.pipeline, self.student, self.validation, self.params, self.optimizer.at_once)

    def save(self, folder: Path) -> None:
        """Writes the student as a diffusers model folder, in the precision that it computes in."""
        dtype = torch.bfloat16 if self.optimizer.precision == "bf16" else None
        sharding.save_flux(self.student, folder, dtype, writes=Worker.here(self.pipeline.device).rank == 0)
