"""What the three distillation stages train, in the workers: a student beside its frozen teacher, on the shards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import FluxPipeline
from torch import nn

from moe_core import noise
from moe_core.config import KDStageConfig, Params
from moe_core.data.latents import LatentDataset
from moe_core.distill import KDBatch, KDStep
from moe_core.transformer import FluxMoETransformer2DModel
from tasks.batches import make_batch
from tasks.places import SHARDS
from tasks.validation import validation_loss


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
        device: torch.device,
    ) -> None:
        """`purpose` names the stage in its random numbers, so that stages of one seed do not see the same noise."""
        self.pipeline = pipeline.to(device)
        student.set_expert_backend(params.compute.expert_backend)
        self.module: nn.Module = KDStep(student.to(device), pipeline.transformer, config)
        self.student = student
        self.params = params
        self.train = LatentDataset(root / SHARDS, "train")
        self.validation = LatentDataset(root / SHARDS, "val")
        self.seed = noise.derive_seed(params.seed, purpose)
        self.batch_size = config.optimizer.batch_size

    def batch(self, positions: Sequence[int]) -> KDBatch:
        """Samples, noise and noise levels at these positions."""
        rows = self.train.draw(self.seed, positions, self.batch_size)
        return make_batch(self.pipeline, self.train, rows, self.seed, positions, self.params)

    def validate(self) -> dict[str, float]:
        """The distillation loss on fixed samples with fixed noise: the same ones for every stage and model."""
        return validation_loss(self.pipeline, self.student, self.validation, self.params, self.batch_size)

    def save(self, folder: Path) -> None:
        """Writes the student as a diffusers model folder."""
        self.student.save_pretrained(folder)
