"""Pictures, routing and validation loss of one model, made in Ray actors from fixed units of work.

A unit is a fixed run of prompts, made in one batch with a fixed number of threads: which actor makes it changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from torch import Tensor

from moe_core.config import LATENT_PATCH, ComputeConfig, Params

GENERATION = "generation"
"""What the noise of evaluation is drawn for; the same for every model."""


@dataclass(frozen=True)
class Unit:
    """Some prompts, with their numbers in the whole list."""

    numbers: list[int]
    prompts: list[str]


@dataclass(frozen=True)
class Pictures:
    """uint8 [B, S, S, 3] and the routing counts of making them."""

    images: NDArray[np.uint8]
    experts: dict[str, Tensor]
    blocks: dict[str, Tensor]


class Generator:
    """One model in one process."""

    def __init__(self, root: Path, params: Params, transformer: Path, dense: bool) -> None:
        # diffusers loads in the actors, not in the driver, where it would cost seconds for nothing.
        from moe_core import sampling
        from tasks.places import TEACHER

        torch.set_num_threads(params.compute.cpus_per_worker)
        self.root, self.params = root, params
        device = "cuda" if params.compute.use_gpu else "cpu"
        self.pipeline = sampling.load_pipeline(root / TEACHER, None if dense else root / transformer, device)
        if not dense:
            self.pipeline.transformer.set_expert_backend(params.compute.expert_backend)
        self.pipeline.transformer.eval()

    def pictures(self, unit: Unit) -> Pictures:
        """Makes a unit's pictures."""
        from moe_core import noise, sampling
        from moe_core.metrics.routing_use import RoutingUse

        model = self.params.model
        use = RoutingUse(self.pipeline.transformer, model.num_inference_steps)
        with use.recording():
            images = sampling.generate(
                self.pipeline,
                unit.prompts,
                unit.numbers,
                noise.derive_seed(self.params.seed, GENERATION),
                resolution=model.resolution,
                num_inference_steps=model.num_inference_steps,
                guidance_scale=model.guidance_scale,
                max_sequence_length=model.max_sequence_length,
            )
        return Pictures(images, use.experts, use.blocks)

    def validation(self, batch_size: int) -> dict[str, float]:
        """The distillation loss against the dense teacher on the fixed validation samples."""
        from moe_core import sampling
        from moe_core.data.latents import LatentDataset
        from tasks.places import SHARDS, TEACHER
        from tasks.validation import validation_loss

        teacher = sampling.load_pipeline(self.root / TEACHER, None, self.pipeline.device)
        return validation_loss(
            teacher, self.pipeline.transformer, LatentDataset(self.root / SHARDS, "val"), self.params, batch_size
        )

    def cost(self) -> dict[str, Any]:
        """Parameters, and FLOPs of one call for one picture."""
        from dataclasses import asdict

        from moe_core import accounting, sampling

        counts = accounting.count(self.pipeline.transformer)
        side = self.params.model.resolution // (self.pipeline.vae_scale_factor * LATENT_PATCH)
        text = sampling.text_length(self.pipeline, self.params.model.max_sequence_length)
        params = asdict(counts) | {
            "by_module": {name: round(module.activated) for name, module in counts.by_module.items()}
        }
        return {"params": params, "flops": accounting.flops(self.pipeline.transformer, side * side, text).total}


@dataclass(frozen=True)
class Made:
    """Everything that actors made of one model."""

    pictures: list[Pictures]
    validation: dict[str, float]
    cost: dict[str, Any]


def make(
    arguments: tuple[Path, Params, Path, bool], units: list[Unit], batch_size: int, done: Callable[[int, int], None]
) -> Made:
    """Deals the units to `compute.num_workers` actors; `done(units done, all)` is called as they come back."""
    compute: ComputeConfig = arguments[1].compute
    if compute.num_workers == 0:
        generator = Generator(*arguments)
        return Made([generator.pictures(unit) for unit in units], generator.validation(batch_size), generator.cost())
    with _actors(compute, arguments) as actors:
        waiting: list[Any] = [actors[i % len(actors)].pictures.remote(unit) for i, unit in enumerate(units)]
        validation, cost = actors[-1].validation.remote(batch_size), actors[0].cost.remote()
        for count in range(1, len(units) + 1):
            ray.wait(waiting, num_returns=count)
            done(count, len(units))
        return Made(ray.get(waiting), ray.get(validation), ray.get(cost))


@contextmanager
def _actors(compute: ComputeConfig, arguments: tuple[Path, Params, Path, bool]) -> Iterator[list[Any]]:
    """All actors or none: two evaluations side by side that each held half the machine would wait for each other for ever."""
    bundle = {"CPU": float(compute.cpus_per_worker)} | ({"GPU": 1.0} if compute.use_gpu else {})
    group = placement_group([bundle] * compute.num_workers, strategy="PACK")
    try:
        options = {
            "num_cpus": compute.cpus_per_worker,
            "num_gpus": int(compute.use_gpu),
            "max_restarts": compute.max_failures,
            "max_task_retries": compute.max_failures,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(group),
        }
        yield [ray.remote(Generator).options(**options).remote(*arguments) for _ in range(compute.num_workers)]
    finally:
        # Ends the actors too.
        remove_placement_group(group)
