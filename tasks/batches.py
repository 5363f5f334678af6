"""Batches of distillation and importance: rows of the shards with noise, a function of seed and position alone."""

from __future__ import annotations

from collections.abc import Sequence

from diffusers import FluxPipeline

from moe_core import noise, sampling
from moe_core.config import Params
from moe_core.data.latents import LatentDataset
from moe_core.distill import KDBatch


def make_batch(
    pipeline: FluxPipeline,
    data: LatentDataset,
    rows: Sequence[int],
    seed: int,
    positions: Sequence[int],
    params: Params,
) -> KDBatch:
    """Rows of a split, all of one bucket, with the noise of these positions, on the pipeline's device."""
    latents, captions = data.get(rows)
    drawn, sigma = noise.draw(seed, positions, tuple(latents.shape[1:]), params.kd.timesteps)
    model = params.model
    return sampling.prepare_batch(
        pipeline, latents, captions, drawn, sigma, model.guidance_scale, model.max_sequence_length, data.text(rows)
    )
