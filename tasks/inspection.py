"""What is known of one of our models beside its pictures: parameters, FLOPs, KD loss, and what its routers choose."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from moe_core.config import LATENT_PATCH, Params
from tasks.actors import actors


class Inspector:
    """One model in one process: the teacher (`dense`), or the transformer in a folder, sparse or a smaller dense one."""

    def __init__(self, root: Path, params: Params, transformer: Path, dense: bool) -> None:
        # diffusers loads in the actors, not in the driver, where it would cost seconds for nothing.
        from moe_core import sampling
        from moe_core.transformer import FluxMoETransformer2DModel
        from tasks.places import TEACHER

        torch.set_num_threads(params.compute.cpus_per_worker)
        self.root, self.params, self.dense = root, params, dense
        device = "cuda" if params.compute.use_gpu else "cpu"
        dtype = sampling.DTYPES[params.model.precision]
        self.pipeline = sampling.load_pipeline(root / TEACHER, None if dense else root / transformer, device, dtype)
        if isinstance(self.pipeline.transformer, FluxMoETransformer2DModel):
            self.pipeline.transformer.set_expert_backend(params.compute.expert_backend)
        self.pipeline.transformer.eval()

    def report(self, prompts: list[str]) -> dict[str, Any]:
        """Everything, as JSON can hold it."""
        validation = self.validation()
        return {
            "kd_loss": validation["distill"],
            "kd_loss_relative": validation["distill_relative"],
            **self.cost(),
            **self.routing(prompts),
        }

    def validation(self) -> dict[str, float]:
        """The distillation loss against the dense teacher on the fixed validation samples."""
        from moe_core import sampling
        from moe_core.data.latents import LatentDataset
        from tasks.places import SHARDS, TEACHER
        from tasks.validation import validation_loss

        device, precision = self.pipeline.device, self.params.model.precision
        teacher = self.pipeline.transformer
        if not self.dense:
            teacher = sampling.load_transformer(self.root / TEACHER / "transformer", sampling.DTYPES[precision]).to(
                device
            )
        data = LatentDataset(self.root / SHARDS, "val")
        with sampling.autocast(device, precision):
            pipeline = sampling.with_transformer(self.pipeline, teacher)
            size = self.params.eval.batch_size
            return validation_loss(pipeline, self.pipeline.transformer, data, self.params, size)

    def cost(self) -> dict[str, Any]:
        """Parameters, and FLOPs of one call for one picture."""
        from moe_core import accounting, sampling

        counts = accounting.count(self.pipeline.transformer)
        side = self.params.model.resolution // (self.pipeline.vae_scale_factor * LATENT_PATCH)
        text = sampling.text_length(self.pipeline, self.params.model.max_sequence_length)
        params = asdict(counts) | {
            "by_module": {name: round(module.activated) for name, module in counts.by_module.items()}
        }
        return {"params": params, "flops": accounting.flops(self.pipeline.transformer, side * side, text).total}

    def routing(self, prompts: list[str]) -> dict[str, Any]:
        """Shares of experts and blocks over one sampling of these prompts."""
        from moe_core import noise, sampling
        from moe_core.metrics import routing_use

        model = self.params.model
        use = routing_use.RoutingUse(self.pipeline.transformer, model.num_inference_steps)
        with use.recording():
            sampling.generate(
                self.pipeline,
                prompts,
                list(range(len(prompts))),
                noise.derive_seed(self.params.seed, "routing"),
                resolution=model.resolution,
                num_inference_steps=model.num_inference_steps,
                guidance_scale=model.guidance_scale,
                max_sequence_length=model.max_sequence_length,
            )
        experts, experts_by_step = routing_use.shares(use.experts)
        blocks, blocks_by_step = routing_use.shares(use.blocks)
        return {
            "expert_use": experts,
            "expert_use_by_timestep": experts_by_step,
            "block_use": blocks,
            "block_use_by_timestep": blocks_by_step,
        }


def inspect(root: Path, params: Params, transformer: Path, dense: bool, prompts: list[str]) -> dict[str, Any]:
    """What an `Inspector` says, from an actor of its own; routing on the first `eval.batch_size` prompts."""
    with actors(Inspector, (root, params, transformer, dense), params.compute, 1) as group:
        found: dict[str, Any] = group.first("report", prompts[: params.eval.batch_size])
    return found
