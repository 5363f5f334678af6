"""What the three distillation stages train, in the workers: a student beside its frozen teacher, on the shards.

- `compute.sharding: none`: every worker has both models, and the stage's student is made in its memory.
- `full`: rank 0 makes the student once, as a folder that a resumed run finds again; all workers load their parts from it.
- Either way, with `precision: bf16` what is frozen is kept in bf16, what trains in fp32. The VAE is not loaded: nobody decodes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from moe_core import noise, sampling, sharding
from moe_core.config import KDStageConfig, Params
from moe_core.data.latents import LatentDataset
from moe_core.distill import KDBatch, KDStep
from moe_core.transformer import FluxMoETransformer2DModel
from tasks import outs
from tasks.batches import make_batch
from tasks.places import SHARDS, TEACHER
from tasks.validation import validation_loss
from tasks.worker import Worker

Convert = Callable[[FluxTransformer2DModel], FluxMoETransformer2DModel]
"""Makes a stage's student, of the dense teacher or of what an earlier stage left."""


def build(
    device: torch.device, root: Path, params: Params, stage: KDStageConfig, purpose: str, convert: Convert, made: Path
) -> KDTrainee:
    """The student of a stage, its teacher and the shards.

    `purpose` names the stage in its random numbers, so that stages of one seed do not see the same noise. `made`: where the
    student to begin with is kept, if it is to be loaded into shards.
    """
    parts = _sharded if params.compute.sharding == "full" else _whole
    pipeline, student = parts(device, root, params, stage, convert, made)
    return KDTrainee(pipeline, student, stage, params, root, purpose)


def _whole(
    device: torch.device, root: Path, params: Params, stage: KDStageConfig, convert: Convert, made: Path
) -> tuple[FluxPipeline, FluxMoETransformer2DModel]:
    pipeline = sampling.load_pipeline(root / TEACHER, without=("vae",))
    student = convert(pipeline.transformer)
    student.set_trainable(stage.train)
    if stage.optimizer.precision == "bf16":
        sharding.lower_frozen(student, torch.bfloat16)
        for part in (pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2):
            part.requires_grad_(False)
            sharding.lower_frozen(part, torch.bfloat16)
    return pipeline.to(device), student.to(device)


def _sharded(
    device: torch.device, root: Path, params: Params, stage: KDStageConfig, convert: Convert, made: Path
) -> tuple[FluxPipeline, FluxMoETransformer2DModel]:
    worker, dense = Worker.here(device), root / TEACHER / "transformer"
    if worker.rank == 0 and not made.exists():
        with outs.folder(made) as folder:
            student = convert(sampling.load_transformer(dense))
            sharding.save_flux(student, folder, None, writes=True)
            del student
    worker.barrier()
    precision = torch.bfloat16 if stage.optimizer.precision == "bf16" else torch.float32
    mesh = init_device_mesh(device.type, (worker.size,))
    pipeline = sampling.load_pipeline(root / TEACHER, dtype=precision, without=("vae", "transformer"))
    pipeline.text_encoder.to(device)
    pipeline.text_encoder_2.requires_grad_(False)
    if params.compute.text_encoders == "sharded":
        sharding.shard_text_encoder(pipeline.text_encoder_2, mesh)
    else:
        pipeline.text_encoder_2.to(device)
    pipeline.register_modules(transformer=sharding.load_flux(dense, mesh, device, precision))
    return pipeline, sharding.load_flux(made, mesh, device, precision, stage.train)


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
        self.module: nn.Module = KDStep(student, pipeline.transformer, config)
        self.student = student
        self.params = params
        self.train = LatentDataset(root / SHARDS, "train")
        self.validation = LatentDataset(root / SHARDS, "val")
        self.seed = noise.derive_seed(params.seed, purpose)
        self.optimizer = config.optimizer

    def batch(self, positions: Sequence[int]) -> KDBatch:
        """Samples, noise and noise levels at these positions."""
        rows = noise.sample_index(self.seed, positions, len(self.train))
        return make_batch(self.pipeline, self.train, rows, self.seed, positions, self.params)

    def validate(self) -> dict[str, float]:
        """The distillation loss on fixed samples with fixed noise: the same ones for every stage and model."""
        return validation_loss(self.pipeline, self.student, self.validation, self.params, self.optimizer.at_once)

    def save(self, folder: Path) -> None:
        """Writes the student as a diffusers model folder, in the precision that it computes in."""
        dtype = torch.bfloat16 if self.optimizer.precision == "bf16" else None
        sharding.save_flux(self.student, folder, dtype, writes=Worker.here(self.pipeline.device).rank == 0)
