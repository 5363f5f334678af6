"""The validation loss of distillation: the same samples, noise and noise levels for every stage and model."""

from __future__ import annotations

from diffusers import FluxPipeline
from torch import nn

from moe_core import noise
from moe_core.config import Params
from moe_core.data.latents import LatentDataset
from moe_core.distill import validate_kd
from tasks.batches import make_batch


def validation_loss(
    pipeline: FluxPipeline, student: nn.Module, data: LatentDataset, params: Params, batch_size: int
) -> dict[str, float]:
    """`validate_kd` on the first `kd.validation_samples` of the validation split, of each bucket its share; a function of the weights alone."""
    seed = noise.derive_seed(params.seed, "kd-validation")
    cuts = data.cuts(batch_size, params.kd.validation_samples)
    return validate_kd(
        student, pipeline.transformer, (make_batch(pipeline, data, cut, seed, cut, params) for cut in cuts)
    )
