"""The validation loss of distillation: the same samples, noise and noise levels for every stage and model.

Every worker validates all of them: so nothing has to be gathered. Where the models are sharded, and a pass through them is all
workers' business, each takes an equal part of every batch.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from diffusers import FluxPipeline
from torch import nn

from moe_core import noise
from moe_core.config import Params
from moe_core.data.latents import LatentDataset
from moe_core.distill import KDBatch, kd_metrics, kd_sums
from moe_core.dtensors import is_sharded
from tasks.batches import make_batch
from tasks.worker import Worker


def validation_loss(
    pipeline: FluxPipeline, student: nn.Module, data: LatentDataset, params: Params, batch_size: int
) -> dict[str, float]:
    """What `validate_kd` says of the first `kd.validation_samples` of the validation split, of each bucket its share.

    A function of the weights alone.
    """
    seed = noise.derive_seed(params.seed, "kd-validation")
    worker = Worker.here(pipeline.device) if is_sharded(student) else Worker(0, 1, pipeline.device)

    def batches() -> Iterator[tuple[KDBatch, int]]:
        for cut in data.cuts(batch_size, params.kd.validation_samples):
            rows, counted = worker.dealt(cut)
            yield make_batch(pipeline, data, rows, seed, rows, params), counted

    sums = torch.tensor(kd_sums(student, pipeline.transformer, batches()), dtype=torch.float64, device=worker.device)
    return kd_metrics(*worker.sum(sums).tolist())
