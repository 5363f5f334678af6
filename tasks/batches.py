"""Batches of distillation, importance and validation: rows of the shards with noise, a function of seed and position alone."""

from __future__ import annotations

from collections.abc import Sequence

from diffusers import FluxPipeline
from torch import nn

from moe_core import noise, sampling
from moe_core.config import Params
from moe_core.data.latents import LatentDataset
from moe_core.distill import KDBatch, validate_kd


def make_batch(
    pipeline: FluxPipeline,
    data: LatentDataset,
    rows: Sequence[int],
    seed: int,
    positions: Sequence[int],
    params: Params,
) -> KDBatch:
    """Rows of a split with the noise of these positions, on the pipeline's device."""
    latents, captions = data.get(rows)
    drawn, sigma = noise.draw(seed, positions, tuple(latents.shape[1:]), params.kd.timesteps)
    return sampling.prepare_batch(pipeline, latents, captions, drawn, sigma, params.model.guidance_scale)


def validation_loss(
    pipeline: FluxPipeline, student: nn.Module, data: LatentDataset, params: Params, batch_size: int
) -> dict[str, float]:
    """`validate_kd` on the first `kd.validation_samples` of the validation split; a function of the weights alone."""
    seed = noise.derive_seed(params.seed, "kd-validation")
    count = min(params.kd.validation_samples, len(data))
    cuts = [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
    return validate_kd(
        student, pipeline.transformer, (make_batch(pipeline, data, cut, seed, cut, params) for cut in cuts)
    )
