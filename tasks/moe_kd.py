"""Stage `moe_kd`: routers and normal experts join the distilled shared experts, and are distilled with load balancing (level L)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_core.config import Params, parse
from tasks.distillation import distil
from tasks.places import IMPORTANCE, MOE, SHARED_EXPERT, TEACHER
from tasks.stage import Stage, execute

if TYPE_CHECKING:
    import torch

    from tasks.kd_trainee import KDTrainee


def moe_kd(stage: Stage) -> None:
    """Writes data/checkpoints/moe/."""
    distil(stage, "tasks.moe_kd:build", stage.params.kd.moe, MOE, lambda folder: {})


def build(device: torch.device, root: str, params: dict[str, Any]) -> KDTrainee:
    """In a worker: the shared-expert student with experts and routers added; with `kd.joint`, the teacher converted at once."""
    # Torch and diffusers load in the workers, not in the driver.
    from moe_core import convert, noise, sampling
    from moe_core.transformer import FluxMoETransformer2DModel
    from tasks.importance_files import load
    from tasks.kd_trainee import KDTrainee

    config, place = parse(Params, params), Path(root)
    pipeline = sampling.load_pipeline(place / TEACHER)
    found = load(place / IMPORTANCE)
    # The same seed as in shared_expert_kd: a random split must be the same in both.
    seed = noise.derive_seed(config.seed, "conversion")
    if config.kd.joint:
        student = convert.to_moe_joint(pipeline.transformer, found.scores, config.moe, found.conditioning, seed)
    else:
        shared = FluxMoETransformer2DModel.from_pretrained(place / SHARED_EXPERT)
        student = convert.to_moe(shared, pipeline.transformer, found.scores, config.moe, seed)
    return KDTrainee(pipeline, student, config.kd.moe, config, place, "moe_kd", device)


if __name__ == "__main__":
    execute("moe_kd", moe_kd, resumable=True)
